"""A small real engine for tests, and helpers to run requests through it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxpaged import LLM
from jaxpaged.engine.engine import Engine
from jaxpaged.engine.runner import Runner
from jaxpaged.engine.status import EngineInfo
from jaxpaged.scheduling.request import Request, SamplingParams
from jaxpaged.scheduling.scheduler import Scheduler

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
BUCKETS = (1, 4, 16)
MAX_SEQS = 4
PAGE_SIZE = 8
POOL_PAGES = 1025
HOST_PAGES = 200
PAGE_BYTES = SMALL["num_hidden_layers"] * PAGE_SIZE * 2 * SMALL["num_key_value_heads"] * SMALL["head_dim"] * 4
NAN_TOKEN = 2047
"""A token whose embedding is not a number: a request with it in its prompt has NaN logits, and nobody else."""


@dataclasses.dataclass
class Small:
    """The engine's parts; tests make their own schedulers over the one runner."""

    llm: LLM
    runner: Runner

    @property
    def info(self) -> EngineInfo:
        return self.llm.info

    def scheduler(self, *, num_pages: int = 65, buckets: tuple[int, ...] = BUCKETS, **more: Any) -> Scheduler:
        sizes = {"max_num_seqs": MAX_SEQS, "max_num_batched_tokens": buckets[-1], "max_model_len": 256, **more}
        return Scheduler(num_pages=num_pages, page_size=PAGE_SIZE, token_buckets=buckets, **sizes)

    def engine(self, *, async_depth: int = 1, **more) -> Engine:
        self.runner.reset()
        return Engine(self.scheduler(**more), self.runner, async_depth=async_depth)


def load_small() -> Small:
    """Loads it; compiling is what costs time, so tests share one."""
    llm = LLM(
        load_format="dummy",
        hf_overrides=SMALL,
        seed=3,
        page_size=PAGE_SIZE,
        num_pages=POOL_PAGES,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=BUCKETS[-1],
        token_buckets=BUCKETS,
        swap_space=HOST_PAGES * PAGE_BYTES / 2**30,
        compilation_cache_dir="",
        show_progress=False,
    )
    return Small(llm, llm._engine.runner)


def make(request_id: str, prompt, *, seed: int = 0, eos=(), **params) -> Request:
    params.setdefault("max_tokens", 12)
    return Request(id=request_id, prompt=tuple(int(i) for i in prompt), params=SamplingParams(**params), seed=seed, eos_token_ids=eos)


def run(engine: Engine, requests, *, check: bool = True) -> dict[tuple[str, int], list[int]]:
    """Runs requests to their ends; returns the tokens of every sample."""
    tokens: dict[tuple[str, int], list[int]] = {}
    for request in requests:
        engine.add(request)
        tokens |= {(request.id, index): [] for index in range(request.params.num_sequences)}
    steps = 0
    while engine.has_work:
        for event in engine.step():
            assert event.error is None, event.error
            tokens[event.request_id, event.index] += event.token_ids
        if check:
            engine.scheduler.check()
        steps += 1
        assert steps < 10_000
    engine.check()
    return tokens


def prompts(count: int, rng: np.random.Generator, *, low: int = 1, high: int = 40) -> list[list[int]]:
    return [rng.integers(3, 2000, int(rng.integers(low, high))).tolist() for _ in range(count)]
