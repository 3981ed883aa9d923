"""A step that fails costs time, not tokens; a request that breaks steps, or has NaN logits, ends alone."""

import itertools
import time

import numpy as np
import pytest
from engine_fakes import NAN_TOKEN, make, prompts, run
from fakes import DeviceFault, FakeRunner, first_cell, golden_tokens

from jaxpaged.engine.engine import Engine
from jaxpaged.engine.recovery import RESET_PAUSES_S
from jaxpaged.errors import EngineStopped
from jaxpaged.scheduling.faults import MAX_FAULTS
from jaxpaged.scheduling.plan import StepResult
from jaxpaged.scheduling.request import FinishReason
from jaxpaged.scheduling.scheduler import Scheduler

VOCAB = 50


class Faulty(FakeRunner):
    """Fails chosen calls, at dispatch or at read; ``broken`` is how many resets after that fail too."""

    def __init__(self, num_pages=40, *, dispatch_fails=frozenset(), read_fails=frozenset(), blames=(), broken=0, **more):
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
            self.broken -= 1
            raise DeviceFault("the device is gone")
        super().reset()


def engine_of(runner, *, depth=1, num_pages=40, clock=time.monotonic, sleep=time.sleep):
    scheduler = Scheduler(
        num_pages=num_pages, page_size=4, max_num_seqs=8, max_num_batched_tokens=16, max_model_len=64, token_buckets=(1, 2, 4, 8, 16)
    )
    return Engine(scheduler, runner, async_depth=depth, clock=clock, sleep=sleep)


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
    requests = some_requests()
    runner = Faulty(blames={"r0", "r1", "r2"})
    tokens, errors = collect(engine_of(runner), requests)
    assert runner.resets >= 3 * MAX_FAULTS
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


@pytest.mark.parametrize("depth", [0, 1])
def test_a_client_that_leaves_a_request_that_breaks_steps_costs_nobody_anything(depth):
    """Again and again on an idle engine: with no step between that shows that the device works, its resets do."""
    runner = Faulty(blames={f"bad{i}" for i in range(9)})
    engine = engine_of(runner, depth=depth)
    for i in range(9):
        engine.add(make(f"bad{i}", [1, 2, 3], n=1 + i % 3))
        for _ in range(20):
            if runner.resets < 3 * (i + 1):
                engine.step()
        assert len(engine.abort(f"bad{i}")) == 1 + i % 3
        assert not engine.recovering and not engine.has_work
    assert collect(engine, some_requests())[0] == golden(some_requests())
    assert runner.resets == 27


@pytest.mark.parametrize("depth", [0, 1])
def test_the_accusation_stands_while_a_sample_of_the_request_is_left(depth):
    """A stop string ends one sample after another; what is left of the request has broken as many steps."""
    runner = Faulty(blames={"bad"})
    engine = engine_of(runner, depth=depth)
    engine.add(make("bad", [1, 2, 3], n=3))
    events = []
    for sample in range(2):
        for _ in range(20):
            if runner.resets < sample + 2:
                events += engine.step()
        events += engine.abort("bad", sample, reason=FinishReason.STOP)
        engine.scheduler.check()
    while engine.has_work:
        events += engine.step()
    assert [(event.index, event.finish_reason) for event in events] == [(0, "stop"), (1, "stop"), (2, "error")]
    assert runner.resets == MAX_FAULTS


@pytest.mark.parametrize("depth", [0, 1])
def test_a_sample_that_stops_leaves_its_request_suspect_until_the_others_got_a_token(depth):
    """Only the sample that stops was in the steps that failed: the others had not forked from it yet."""
    runner = Faulty(blames={"a"})
    engine = engine_of(runner, depth=depth)
    requests = [make("a", [1, 2, 3], n=2, max_tokens=6), make("b", [4], max_tokens=6)]
    for request in requests:
        engine.add(request)
    for _ in range(20):
        if runner.resets < 3:
            engine.step()
    runner.blames = ()
    engine.abort("a", 0)
    engine.scheduler.check()
    (left,) = [sequence for sequence in engine.scheduler.live_sequences() if sequence.request.id == "a"]
    assert left.suspect and left.group.num_faults == 3 - 1
    tokens = {key: [] for key in (("a", 1), ("b", 0))}
    while engine.has_work:
        for event in engine.step():
            tokens[event.request_id, event.index] += event.token_ids
        engine.scheduler.check()
    assert tokens == {(r.id, i): golden_tokens(r, i, VOCAB, first=first_cell(r)) for r, i in zip(requests, (1, 0), strict=True)}


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("kind", ["dispatch_fails", "read_fails"])
def test_an_idle_engine_that_has_proven_itself_is_ready(depth, kind):
    """One fault, and its client leaves: nobody else comes, and none needs to."""
    engine = engine_of(Faulty(**{kind: {2}}), depth=depth)
    engine.add(make("a", [1, 2, 3]))
    while not engine.telemetry.recoveries:
        engine.step()
    engine.abort("a")
    assert not engine.recovering and not engine.has_work and engine.wait_s == 0.0


def test_resets_that_fail_are_tried_again_after_a_pause_and_blame_nobody():
    now = [100.0]
    runner = Faulty(read_fails={2}, broken=len(RESET_PAUSES_S))
    slept = []
    engine = engine_of(runner, clock=lambda: now[0], sleep=lambda seconds: (slept.append(seconds), now.__setitem__(0, now[0] + seconds)))
    requests = some_requests()
    for request in requests:
        engine.add(request)
    tokens = {request.id: [] for request in requests}
    waits = []
    while engine.has_work:
        resets = runner.resets
        for event in engine.step():
            assert event.error_code is None
            tokens[event.request_id] += event.token_ids
        if engine.recovering:
            assert runner.resets == resets + 1
            waits.append(engine.wait_s)
            now[0] += engine.wait_s * 0.75  # a driver that comes too early waits for the rest
    assert waits == list(RESET_PAUSES_S) and slept == [pause / 4 for pause in RESET_PAUSES_S]
    assert tokens == golden(requests)
    assert engine.telemetry.recoveries == 1


def test_an_engine_whose_device_is_away_takes_aborts_and_comes_back_without_work():
    now = [0.0]
    runner = Faulty(read_fails={2}, broken=2)
    engine = engine_of(runner, clock=lambda: now[0])
    engine.add(make("a", [1, 2, 3]))
    while not engine.recovering:
        engine.step()
    (event,) = engine.abort("a")
    assert event.finish_reason is FinishReason.ABORT
    assert engine.recovering and engine.has_work and not engine.scheduler.has_work
    while engine.has_work:
        now[0] += engine.wait_s
        assert engine.step() == []
    assert not engine.recovering and runner.resets == 3


def test_the_engine_gives_up_when_the_device_does_not_come_back():
    now = [0.0]
    runner = Faulty(read_fails={2}, broken=1000)
    engine = engine_of(runner, clock=lambda: now[0])
    for request in some_requests():
        engine.add(request)
    events = []
    with pytest.raises(EngineStopped, match="device is gone"):
        for _ in range(100):
            events += engine.step()
            now[0] += engine.wait_s
    assert runner.resets == 1 + len(RESET_PAUSES_S) and now[0] == sum(RESET_PAUSES_S)
    assert not any(event.error_code for event in events)
    assert engine.failed is not None
    with pytest.raises(EngineStopped):
        engine.step()
    assert len(engine.reset()) == 5  # of the books alone
    assert engine.failed is not None and not engine.scheduler.has_work


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
