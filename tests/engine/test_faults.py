"""A step that fails costs time, not tokens; a request that breaks steps, or has NaN logits, ends alone."""

import itertools

import numpy as np
import pytest
from engine_fakes import NAN_TOKEN, make, prompts, run
from fakes import DeviceFault, FakeRunner, first_cell, golden_tokens

from jaxpaged.engine.engine import MAX_FAILURES, Engine
from jaxpaged.errors import EngineStopped
from jaxpaged.scheduling.plan import StepResult
from jaxpaged.scheduling.scheduler import Scheduler

VOCAB = 50


class Faulty(FakeRunner):
    """Fails chosen calls, at dispatch or at read; ``broken`` also makes resets fail."""

    def __init__(self, num_pages=40, *, dispatch_fails=frozenset(), read_fails=frozenset(), blames=(), broken=False, **more):
        super().__init__(num_pages, 4, vocab_size=VOCAB, fails=self._fails, **more)
        self.dispatch_fails, self.read_fails, self.blames, self.broken = dispatch_fails, read_fails, blames, broken
        self.calls = itertools.count(1)
        self.call = 0
        self.resets = 0

    def _fails(self, plan):
        return self.call in self.read_fails or any(work.sequence.request.id in self.blames for work in plan.work)

    def dispatch(self, plan):
        self.call = next(self.calls)
        if self.call in self.dispatch_fails:
            raise DeviceFault(f"dispatch {self.call}")
        return super().dispatch(plan)

    def reset(self):
        self.resets += 1
        if self.broken:
            raise DeviceFault("the device is gone")
        super().reset()


def engine_of(runner, *, depth=1, num_pages=40):
    scheduler = Scheduler(
        num_pages=num_pages, page_size=4, max_num_seqs=8, max_num_batched_tokens=16, max_model_len=64, token_buckets=(1, 2, 4, 8, 16)
    )
    return Engine(scheduler, runner, async_depth=depth)


def some_requests(count=5):
    rng = np.random.default_rng(1)
    return [make(f"r{i}", rng.integers(0, VOCAB, int(rng.integers(1, 20))).tolist(), seed=i, max_tokens=12) for i in range(count)]


def collect(engine, requests):
    """Runs to the end; returns tokens and the error code per request."""
    for request in requests:
        engine.add(request)
    tokens, errors = {request.id: [] for request in requests}, {}
    for _ in range(5000):
        if not engine.has_work:
            break
        for event in engine.step():
            tokens[event.request_id] += event.token_ids
            if event.error_code is not None:
                errors[event.request_id] = event.error_code
        engine.scheduler.check()
    engine.check()
    return tokens, errors


def golden(requests):
    return {request.id: golden_tokens(request, 0, VOCAB, first=first_cell(request)) for request in requests}


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("kind", ["dispatch_fails", "read_fails"])
@pytest.mark.parametrize("which", [{1}, {2}, {7}, {5, 6, 7}, {1, 2, 3}, {3, 9, 15}, {4, 5, 8, 9}], ids=str)
def test_streams_go_on_without_a_lost_or_repeated_token(depth, kind, which):
    requests = some_requests()
    runner = Faulty(**{kind: which})
    engine = engine_of(runner, depth=depth)
    tokens, errors = collect(engine, requests)
    assert tokens == golden(requests)
    assert errors == {}
    assert engine.telemetry.recoveries >= 1 and runner.resets == engine.telemetry.recoveries
    assert not engine.recovering


@pytest.mark.parametrize("depth", [0, 1])
def test_a_single_request_survives_three_failures_in_a_row(depth):
    requests = some_requests(1)
    tokens, errors = collect(engine_of(Faulty(read_fails={3, 4, 5}), depth=depth), requests)
    assert tokens == golden(requests) and errors == {}


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("victim", range(5))
def test_a_request_that_breaks_every_step_ends_alone(depth, victim):
    requests = some_requests()
    engine = engine_of(Faulty(blames={f"r{victim}"}), depth=depth)
    tokens, errors = collect(engine, requests)
    assert errors == {f"r{victim}": "internal_error"}
    expected = golden(requests)
    expected[f"r{victim}"] = []
    assert tokens == expected
    assert engine.stats().finished == {"length": 4, "error": 1}


def test_several_requests_that_break_steps_end_one_by_one():
    """More failures in a row than the engine recovers from, but each time a culprit is found."""
    requests = some_requests()
    runner = Faulty(blames={"r0", "r1", "r2"})
    tokens, errors = collect(engine_of(runner), requests)
    assert runner.resets > MAX_FAILURES
    assert errors == dict.fromkeys(("r0", "r1", "r2"), "internal_error")
    assert {key: tokens[key] for key in ("r3", "r4")} == {key: golden(requests)[key] for key in ("r3", "r4")}


@pytest.mark.parametrize("depth", [0, 1])
def test_a_nan_row_ends_alone(depth):
    requests = some_requests()
    runner = Faulty(invalid=lambda sequence, num_output: sequence.request.id == "r2" and num_output == 4)
    tokens, errors = collect(engine_of(runner, depth=depth), requests)
    assert errors == {"r2": "numerical_error"}
    expected = golden(requests)
    expected["r2"] = expected["r2"][:4]
    assert tokens == expected


def test_an_id_outside_the_vocabulary_ends_its_request_alone():
    class Wild(Faulty):
        def complete(self, handle):
            result = super().complete(handle)
            ids = [
                VOCAB + 5 if w.sequence.request.id == "r1" and w.num_output == 2 else t
                for w, t in zip(handle.plan.work, result.tokens, strict=True)
            ]
            return StepResult(ids, result.logprobs, result.prompt_logprobs)

    requests = some_requests()
    tokens, errors = collect(engine_of(Wild()), requests)
    assert errors == {"r1": "numerical_error"}
    assert tokens["r1"] == golden(requests)["r1"][:2]
    assert {k: v for k, v in tokens.items() if k != "r1"} == {k: v for k, v in golden(requests).items() if k != "r1"}


def test_the_engine_gives_up_when_the_device_does_not_come_back():
    engine = engine_of(Faulty(read_fails={2}, broken=True))
    with pytest.raises(EngineStopped, match="device is gone"):
        collect(engine, some_requests())
    assert engine.failed is not None
    with pytest.raises(EngineStopped):
        engine.step()


def test_the_engine_gives_up_when_failures_are_nobodys_fault():
    """Every step fails, yet recovering never ends a request: more than MAX_FAILURES are not tried."""
    runner = Faulty(read_fails=set(range(1, 1000)))
    engine = engine_of(runner)
    engine.scheduler.recover = lambda plan, recover=engine.scheduler.recover: [e for e in recover(plan) if e.finish_reason is None]
    with pytest.raises(EngineStopped, match="in a row"):
        collect(engine, some_requests())
    assert runner.resets == MAX_FAILURES


def test_an_interrupted_engine_starts_anew():
    runner = Faulty()
    engine = engine_of(runner)
    for request in some_requests():
        engine.add(request)
    for _ in range(4):
        engine.step()
    events = engine.reset()
    assert {event.request_id for event in events if event.finish_reason is not None} <= {f"r{i}" for i in range(5)}
    assert not engine.has_work
    engine.check()
    requests = [make("new", [1, 2, 3])]
    assert collect(engine, requests)[0] == golden(requests)


# ------------------------------------------------------------------------------------------------- the same with the real model


def test_a_real_step_that_fails_is_recovered_from(small, monkeypatch):
    rng = np.random.default_rng(3)
    requests = [make(str(i), prompt, seed=i, max_tokens=10, temperature=0.9) for i, prompt in enumerate(prompts(6, rng))]
    expected = run(small.engine(), requests)
    engine = small.engine()
    dispatch, calls = small.runner.dispatch, itertools.count(1)

    def failing(plan):
        handle = dispatch(plan)
        if next(calls) in (2, 3, 9):
            for layer in small.runner._pool.layers:
                layer.kv.delete()
            raise DeviceFault("as if XLA had raised")
        return handle

    monkeypatch.setattr(small.runner, "dispatch", failing)
    assert run(engine, requests) == expected
    assert engine.telemetry.recoveries == 3


def test_nan_logits_of_a_real_model_end_their_request_alone(small, monkeypatch):
    runner = small.runner
    names = list(runner.model.specs)
    index = next(i for i, name in enumerate(sorted(names)) if "embed" in name)
    leaves = list(runner._leaves)
    assert leaves[index].shape == (2048, 64)
    rng = np.random.default_rng(4)
    good = [make(str(i), prompt, seed=i, max_tokens=10) for i, prompt in enumerate(prompts(5, rng))]
    expected = run(small.engine(), good)
    leaves[index] = leaves[index].at[NAN_TOKEN].set(np.nan)
    monkeypatch.setattr(runner, "_leaves", tuple(leaves))
    engine = small.engine()
    bad = [make("bad", [5, NAN_TOKEN, 6]), make("bad too", [*range(3, 30), NAN_TOKEN])]
    for request in [good[0], bad[0], *good[1:], bad[1]]:
        engine.add(request)
    tokens, errors = {key: [] for key in expected}, {}
    while engine.has_work:
        for event in engine.step():
            if event.error_code:
                errors[event.request_id] = event.error_code
            elif event.request_id not in ("bad", "bad too"):
                tokens[event.request_id, event.index] += event.token_ids
    assert errors == {"bad": "numerical_error", "bad too": "numerical_error"}
    assert tokens == expected
    again = [make(f"again {i}", prompt, seed=i, max_tokens=10) for i, prompt in enumerate(prompts(5, np.random.default_rng(4)))]
    assert list(run(engine, again).values()) == list(expected.values())  # on pages that held NaN
