"""Each request against itself: alone, and in random crowds, budgets, pools, orders and async depths; tokens and log-probabilities.

Every sampling option is in play at once, so that state that leaks from one slot, step or neighbour into another shows.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from engine_fakes import Small, make

from jaxpaged.engine.engine import Engine
from jaxpaged.scheduling.request import Request

STOPS = tuple(range(100, 1100))
"""Half of the small model's vocabulary ends a text, so that min_tokens has something to hold back."""

OPTIONS: list[dict] = [
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 1.0, "logprobs": 0, "prompt_logprobs": 2},
    {"temperature": 0.9, "top_k": 12, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.0, "repetition_penalty": 3.0, "frequency_penalty": 1.5, "presence_penalty": 1.0, "logprobs": 2},
    {"temperature": 1.3, "repetition_penalty": 1.7, "frequency_penalty": 0.8, "logit_bias": {7: 3.0, 8: -5.0}},
    {"temperature": 0.0, "allowed_token_ids": list(range(3, 60)), "bad_token_ids": [9], "prompt_logprobs": 0},
    {"temperature": 0.7, "min_tokens": 6, "stop_token_ids": STOPS, "frequency_penalty": -0.5, "max_tokens": 14},
    {"temperature": 0.0, "min_tokens": 9, "stop_token_ids": STOPS, "bad_token_ids": list(range(1200, 1500)), "max_tokens": 14},
]

SETTINGS = [
    {"async_depth": 0},
    {"async_depth": 1},
    {"async_depth": 1, "buckets": (1, 4)},
    {"async_depth": 0, "num_pages": 9},
    {"async_depth": 1, "num_pages": 9},
    {"async_depth": 1, "num_pages": 11, "buckets": (1, 4)},
    {"async_depth": 1, "long_prefill_token_threshold": 3},
]


@dataclasses.dataclass
class Answer:
    """Everything that a client hears."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list = dataclasses.field(default_factory=list)
    prompt_logprobs: list = dataclasses.field(default_factory=list)
    finish_reason: object = None
    stop_reason: object = None


def answers(engine: Engine, requests: list[Request]) -> dict[str, Answer]:
    found = {request.id: Answer() for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for event in engine.step():
            answer = found[event.request_id]
            answer.tokens += event.token_ids
            answer.logprobs += event.logprobs
            answer.prompt_logprobs += event.prompt_logprobs
            answer.finish_reason, answer.stop_reason = event.finish_reason, event.stop_reason
    engine.check()
    return found


def assert_same(one: Answer, other: Answer) -> None:
    assert one.tokens == other.tokens
    assert (one.finish_reason, one.stop_reason) == (other.finish_reason, other.stop_reason)
    for mine, theirs in ((one.logprobs, other.logprobs), (one.prompt_logprobs, other.prompt_logprobs)):
        assert [entry.token_id for entry in mine] == [entry.token_id for entry in theirs]
        np.testing.assert_allclose([e.logprob for e in mine], [e.logprob for e in theirs], atol=1e-4)
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_allclose([p for _, p in a.top], [p for _, p in b.top], atol=1e-4)


@pytest.fixture(scope="module")
def needles() -> list[Request]:
    rng = np.random.default_rng(20)
    seeds = [0, -1, 2**63 - 1, -(2**63), 5, 5, 6, 7]
    return [
        make(f"needle{i}", rng.integers(3, 2000, 5 + 6 * i).tolist(), seed=seeds[i], **{"max_tokens": 12, **options})
        for i, options in enumerate(OPTIONS)
    ]


@pytest.fixture(scope="module")
def alone(small: Small, needles: list[Request]) -> dict[str, Answer]:
    found: dict[str, Answer] = {}
    for request in needles:
        found |= answers(small.engine(async_depth=0), [request])
    return found


def test_the_options_do_what_they_are_here_for(alone: dict[str, Answer], needles: list[Request]) -> None:
    """Otherwise the comparisons below could agree on requests that exercise nothing."""
    by_option = [alone[f"needle{i}"] for i in range(len(OPTIONS))]
    assert len(by_option[1].prompt_logprobs) == len(needles[1].prompt) - 1
    assert len(set(by_option[3].tokens)) == len(by_option[3].tokens)
    assert set(by_option[5].tokens) <= set(range(3, 60)) - {9}
    for i, minimum in ((6, 6), (7, 9)):
        ends = [at for at, token in enumerate(by_option[i].tokens) if token in STOPS]
        assert all(at >= minimum for at in ends)
        assert by_option[i].stop_reason in STOPS


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(f"{key}={value}" for key, value in s.items()))
def test_crowds_change_nothing(small: Small, needles: list[Request], alone: dict[str, Answer], settings: dict) -> None:
    rng = np.random.default_rng(len(str(settings)))
    crowd = []
    for i in range(8):
        options = {**OPTIONS[rng.integers(len(OPTIONS))], "max_tokens": 14}
        crowd.append(make(f"crowd{i}", rng.integers(3, 2000, int(rng.integers(1, 30))).tolist(), seed=100 + i, **options))
    requests = [*needles, *crowd]
    engine = small.engine(**settings)
    found = answers(engine, [requests[i] for i in rng.permutation(len(requests))])
    for request in needles:
        assert_same(alone[request.id], found[request.id])
    if "num_pages" in settings:
        assert engine.scheduler.num_preemptions > 0
