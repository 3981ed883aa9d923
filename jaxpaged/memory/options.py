"""What ``jaxpaged memory`` can be told."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxpaged.config import TINY_MODEL, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """The memory study."""

    model: str = option(
        str(TINY_MODEL), "a directory in Hugging Face layout, a config.json, or a shape by name (llama-3-8b); default: the tiny model"
    )
    workload: str = option("chat", "alpaca, chat, multi-turn, shared-prefix, sharegpt, or a JSON file of requests")
    num_requests: int = option(400, "requests of a workload by name", low=1, high=10**6)
    seed: int = option(0, "of lengths, tokens and beam candidates", low=0)
    memory: float | None = option(None, "GiB for keys and values; default: room for 16 requests of max_model_len", low=1e-6)
    num_pages: int | None = option(None, "pages of the (first) page size, the null page included; instead of memory", low=2)
    page_size: tuple[int, ...] = option((16,), "tokens in a page; further ones, after commas, are compared with the first")
    kv_cache_dtype: Literal["auto", "bfloat16", "float16", "float32", "fp8", "fp8_e4m3", "int8"] = option(
        "auto", "of keys and values; auto: the checkpoint's"
    )
    max_model_len: int | None = option(None, "longest context in tokens; default: the model's", low=2)
    max_num_seqs: int = option(256, "sequences that run at once", low=1, high=4096)
    max_num_batched_tokens: int = option(2048, "tokens of a step", low=1, high=2**20)
    async_depth: int = option(1, "steps dispatched before the tokens of the first are read", low=0, high=1)
    n: tuple[int, ...] = option((1,), "samples of each request; further ones, after commas, each get a row of their own")
    beam_width: tuple[int, ...] = option((), "beam search instead of samples, of these widths; each gets a row of its own")
    beam_entropy: float = option(1.0, "mean entropy, in nats, of the made-up next tokens that beams choose from", low=0.01, high=10.0)
    beam_likeness: float = option(0.9, "probability that beams have the same next tokens in a step", low=0.0, high=1.0)
    enable_prefix_caching: bool = option(True, "reuse the pages of a prompt's beginning that was computed before")
    swap_space: float = option(0.0, "GiB of host memory that evicted pages of the prefix cache go to", low=0.0)
    contiguous: Literal["first-fit", "buddy"] = option("first-fit", "how the baselines find a free run of memory")
    reserved: int | None = option(None, "worked example, with used: tokens that a contiguous system reserves", low=1)
    used: int | None = option(None, "worked example, with reserved: tokens that one request really holds", low=1)
    json: str | None = option(None, "file for the report as JSON; - for standard output instead of text")
    html: str | None = option(None, "file for the report as one HTML page with plots")
