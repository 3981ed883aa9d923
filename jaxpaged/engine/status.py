"""What the engine tells the outside about itself: frozen snapshots, safe to pass between threads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxpaged.config import ModelConfig
from jaxpaged.engine.tokenizer import Tokenizer

EngineState = Literal["loading", "compiling", "ready", "recovering", "draining", "stopped", "failed"]

STALL_FLOOR_S = 30.0
"""A busy engine counts as stalled when no step has finished for this long (and for ten times its own p99)."""


@dataclasses.dataclass(frozen=True)
class EngineStatus:
    """How the engine is doing now; what the health routes answer from.

    Attributes:
        state: ``ready`` is the only state in which requests are taken.
        detail: For people: progress while loading (``loading or compiling programs, 9/12``), the reason once failed.
        running: Sequences that hold pages.
        waiting: Sequences in the queue.
        last_step_age_s: Seconds since a step finished or, if later, since there was work to do; 0 while idle.
        step_p99_s: 99th percentile of the recent steps' durations, in seconds; 0 before the first.
    """

    state: EngineState
    detail: str = ""
    running: int = 0
    waiting: int = 0
    last_step_age_s: float = 0.0
    step_p99_s: float = 0.0

    @property
    def stalled(self) -> bool:
        """Whether there is work and no step has finished for longer than any legal step takes."""
        return self.last_step_age_s > max(STALL_FLOOR_S, 10.0 * self.step_p99_s)

    @property
    def ready(self) -> bool:
        """Whether requests are taken and steps make progress."""
        return self.state == "ready" and not self.stalled


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What is fixed once the engine has been loaded.

    Attributes:
        model_name: Last part of the model's path or hub id; the default served name.
        max_model_len: Longest context, prompt and output together, in tokens.
        max_request_tokens: The same, or less when the pool is smaller than one such context; what a request must fit in.
        eos_token_ids: Ids that end a sequence unless a request ignores them.
        default_sampling: Values from generation_config.json for fields that a request leaves out (temperature, top_p, top_k,
            min_p, repetition_penalty, max_tokens); empty with ``--generation-config vllm``.
        max_logprobs: Most log-probabilities per position that a request may ask for.
        seed: The engine's seed, from which requests without one get theirs.
        platform: ``cpu``, ``gpu`` or ``tpu``.
        device_kind: The device's name.
        attention_backend: Implementation of paged attention.
        dtype, kv_dtype: Of the weights and of the keys and values in the pages.
        weight_bytes, pool_bytes: On the device.
        num_host_pages: Pages that host memory holds, for preempted requests and the prefix cache.
        enable_prefix_caching: Whether pages of earlier texts are used again.
        preemption_mode: ``recompute``, ``swap``, or ``auto``: what costs less.
        load_s: Seconds from start to ready.
    """

    model_name: str
    model_config: ModelConfig
    tokenizer: Tokenizer
    max_model_len: int
    max_request_tokens: int
    num_pages: int
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_waiting: int
    token_buckets: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    default_sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_logprobs: int = 20
    seed: int = 0
    platform: str = "cpu"
    device_kind: str = ""
    attention_backend: str = "xla"
    dtype: str = "float32"
    kv_dtype: str = "float32"
    weight_bytes: int = 0
    pool_bytes: int = 0
    num_host_pages: int = 0
    enable_prefix_caching: bool = True
    preemption_mode: str = "recompute"
    load_s: float = 0.0
