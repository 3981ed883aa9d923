"""The same tokens alone, batched, chunked, preempted, and at either async depth; with a real model."""

import numpy as np
import pytest
from engine_fakes import make, prompts, run

OPTIONS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.2, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.2},
    {"temperature": 0.0, "logit_bias": {10: 5.0}, "bad_token_ids": [11]},
]


@pytest.fixture(scope="module")
def requests():
    rng = np.random.default_rng(7)
    return [make(str(i), prompt, seed=i, max_tokens=15, **OPTIONS[i % len(OPTIONS)]) for i, prompt in enumerate(prompts(10, rng))]


@pytest.fixture(scope="module")
def alone(small, requests):
    tokens = {}
    for request in requests:
        tokens |= run(small.engine(async_depth=0), [request])
    return tokens


@pytest.mark.parametrize("depth", [0, 1])
def test_batched(small, requests, alone, depth):
    assert run(small.engine(async_depth=depth), requests) == alone


def test_in_small_chunks(small, requests, alone):
    engine = small.engine(buckets=(1, 4))
    assert run(engine, requests) == alone
    assert engine.stats().padding_tokens < engine.stats().step_tokens


@pytest.mark.parametrize("depth", [0, 1])
def test_preempted(small, requests, alone, depth):
    engine = small.engine(num_pages=9, async_depth=depth)
    assert run(engine, requests) == alone
    assert engine.scheduler.num_preemptions > 1


def test_in_another_order(small, requests, alone):
    assert run(small.engine(), requests[::-1]) == alone


def test_aborts_of_others_change_nothing(small, requests, alone):
    engine = small.engine()
    for request in requests:
        engine.add(request)
    tokens = {key: [] for key in alone}
    steps = 0
    while engine.has_work:
        events = engine.step()
        steps += 1
        if steps in (3, 7, 12):
            events += engine.abort(str(steps % len(requests)))
        for event in events:
            tokens[event.request_id, event.index] += event.token_ids
        engine.scheduler.check()
    for (request_id, index), ids in tokens.items():
        if request_id in ("3", "7", "2"):
            assert ids == alone[request_id, index][: len(ids)]
        else:
            assert ids == alone[request_id, index]


def test_samples_of_one_request_differ_and_the_first_is_the_request_alone(small):
    prompt = [5, 6, 7, 8]
    several = run(small.engine(), [make("a", prompt, seed=9, n=3)])
    assert several["a", 0] == run(small.engine(), [make("b", prompt, seed=9)])["b", 0]
    assert len({tuple(ids) for ids in several.values()}) == 3


def test_one_sample_can_be_aborted_alone(small):
    engine = small.engine()
    engine.add(make("a", [5, 6], n=2, max_tokens=20))
    tokens = {0: 0, 1: 0}
    ends = {}
    for step in range(100):
        events = engine.step() + (engine.abort("a", 1) if step == 4 else [])
        for event in events:
            tokens[event.index] += len(event.token_ids)
            if event.finish_reason is not None:
                ends[event.index] = str(event.finish_reason)
        if not engine.has_work:
            break
    assert ends == {0: "length", 1: "abort"}
    assert tokens[0] == 20 > tokens[1]
    engine.check()


def test_stop_tokens_and_min_tokens(small):
    free = run(small.engine(), [make("a", [9, 8, 7], temperature=0.0, max_tokens=10)])["a", 0]
    stop = free[3]
    first = free.index(stop)
    ended = run(small.engine(), [make("a", [9, 8, 7], temperature=0.0, max_tokens=10, stop_token_ids=[stop])])["a", 0]
    assert ended == free[: first + 1]
    later = run(small.engine(), [make("a", [9, 8, 7], temperature=0.0, max_tokens=10, stop_token_ids=[stop], min_tokens=6)])["a", 0]
    assert len(later) >= 7 and stop not in later[:6]
    assert later[:first] == free[:first]


def test_stats_add_up(small, requests):
    engine = small.engine()
    tokens = run(engine, requests)
    stats = engine.stats()
    assert stats.generation_tokens == sum(map(len, tokens.values()))
    assert stats.prompt_tokens == sum(len(request.prompt) for request in requests)
    assert stats.finished == {"length": len(requests)}
    assert stats.pages_used == stats.running == stats.waiting == 0
    assert stats.histograms["e2e_request_latency_seconds"].total > 0
    assert sum(stats.histograms["time_to_first_token_seconds"].counts) == len(requests)
    assert sum(stats.histograms["inter_token_latency_seconds"].counts) == stats.generation_tokens - len(requests)
    assert 0 < stats.kv_waste < 0.5
    assert engine.telemetry.num_live == 0
