"""The k-th allocation of pages, places or slots fails: an error of ours in the middle of planning a step, which nobody may notice."""

from __future__ import annotations

import random

import pytest
from fakes import FakeRunner, first_cell, golden_beams, golden_tokens
from scheduling.simulation import make_request, make_scheduler

from jaxpaged.engine.engine import MAX_UNPLANNED, Engine
from jaxpaged.errors import EngineStopped
from jaxpaged.scheduling.pages import OutOfPages, PageAllocator
from jaxpaged.scheduling.request import FinishReason

VOCAB = 50


class Failing:
    """Counts what is taken from allocators; the k-th time fails."""

    def __init__(self, fails) -> None:
        self.fails = fails
        self.count = 0

    def break_in(self, allocator: PageAllocator) -> None:
        take = allocator.take

        def failing_take(count):
            self.count += count > 0
            if count > 0 and self.fails(self.count):
                raise OutOfPages("planted")
            return take(count)

        allocator.take = failing_take


def make_engine(fails, rng: random.Random, depth: int) -> tuple[Engine, Failing]:
    """An engine over a small pool with everything that takes pages: forks, beams, hits, swaps, spills."""
    scheduler = make_scheduler(
        num_pages=15,
        page_size=2,
        max_num_seqs=6,
        max_num_batched_tokens=11,
        num_host_pages=10,
        preemption_mode="swap",
        long_prefill_token_threshold=rng.choice((0, 3)),
    )
    scheduler.headroom = 0
    failing = Failing(fails)
    for allocator in (scheduler.pages, scheduler.memory.host.pages, scheduler.slots):
        failing.break_in(allocator)
    return Engine(scheduler, FakeRunner(15, 2, vocab_size=VOCAB), async_depth=depth), failing


def make_requests(rng: random.Random):
    for i in range(9):
        beams = {"use_beam_search": True, "beam_width": 2, "temperature": 0.0} if i == 3 else {"n": 1 + i % 3}
        yield make_request(f"r{i}", rng.randint(1, 6), rng.randint(2, 6), seed=i, topic=1 + i % 2, **beams)


def expected(request) -> dict[tuple[str, int], list[int]]:
    if request.params.use_beam_search:
        found = golden_beams(request, VOCAB, first=first_cell(request))
        return {(request.id, i): list(found[i].tokens) if i < len(found) else [] for i in range(request.params.num_sequences)}
    return {(request.id, i): golden_tokens(request, i, VOCAB, first=first_cell(request)) for i in range(request.params.n)}


def run(engine: Engine, requests) -> dict[tuple[str, int], list[int]]:
    """Runs everything; returns the tokens of each sequence. Every sequence has one last event, and nothing is left."""
    tokens: dict[tuple[str, int], list[int]] = {}
    ends: dict[tuple[str, int], FinishReason] = {}
    for request in requests:
        engine.add(request)
    for _ in range(2000):
        if not engine.has_work:
            break
        for event in engine.step():
            key = event.request_id, event.index
            assert key not in ends
            tokens.setdefault(key, []).extend(event.token_ids)
            if event.finish_reason is not None:
                ends[key] = event.finish_reason
        engine.scheduler.check()
    assert not engine.has_work
    assert ends.keys() == tokens.keys()
    assert set(ends.values()) <= {FinishReason.LENGTH, FinishReason.STOP}
    engine.check()
    scheduler = engine.scheduler
    assert scheduler.pages.num_free == scheduler.pages.num_pages - 1
    assert scheduler.memory.host.pages.num_free == scheduler.memory.host.pages.num_pages - 1
    assert scheduler.slots.num_free == scheduler.max_num_seqs
    return tokens


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("world", range(2))
def test_the_kth_allocation_fails(world, depth):
    """For each k until none is left, at least a hundred in all: the same tokens as without."""
    failures = 0
    for k in range(1, 200):
        rng = random.Random(world)
        engine, failing = make_engine(lambda count, k=k: count == k, rng, depth)
        requests = list(make_requests(rng))
        golden = {key: tokens for request in requests for key, tokens in expected(request).items()}
        assert run(engine, requests) == golden
        assert engine.stats().recoveries == (failing.count >= k)
        failures += engine.stats().recoveries
        if failing.count < k:
            break
    assert failures > 50


def test_some_allocations_in_a_row_fail():
    """Up to three, nobody is blamed; whatever was in flight is computed again."""
    for k in range(1, 60):
        rng = random.Random(7)
        engine, _ = make_engine(lambda count, k=k: k <= count < k + 3, rng, 1)
        requests = list(make_requests(rng))
        assert run(engine, requests) == {key: tokens for request in requests for key, tokens in expected(request).items()}


def test_an_engine_that_can_never_plan_gives_up():
    """Though whoever is first in line is blamed, and ended."""
    engine, failing = make_engine(lambda count: True, random.Random(0), 1)
    for name in "ab":
        engine.add(make_request(name, 3, 3))
    ended = []
    with pytest.raises(EngineStopped, match="steps in a row could not be planned"):
        for _ in range(MAX_UNPLANNED + 1):
            ended += engine.step()
    assert failing.count == MAX_UNPLANNED + 1
    assert [(event.request_id, event.error_code) for event in ended] == [("a", "internal_error")]
    engine.scheduler.check()


@pytest.mark.parametrize("depth", [0, 1])
def test_a_request_that_can_never_be_planned_beyond_a_point_ends_alone(depth):
    """The steps between are good, so that the failures are not in a row: without a culprit they would come back for ever."""
    engine, _ = make_engine(lambda count: False, random.Random(0), depth)
    take = engine.scheduler.pages.take

    def failing(count):
        if count and any(sequence.request.id == "bad" and sequence.num_output > 2 for sequence in engine.scheduler.running):
            raise OutOfPages("planted")
        return take(count)

    engine.scheduler.pages.take = failing
    requests = [make_request(name, 3, 8, seed=i) for i, name in enumerate(("good", "bad", "other"))]
    for request in requests:
        engine.add(request)
    tokens, errors = {request.id: [] for request in requests}, {}
    for _ in range(500):
        for event in engine.step() if engine.has_work else ():
            tokens[event.request_id] += event.token_ids
            if event.error_code:
                errors[event.request_id] = event.error_code
        engine.scheduler.check()
    assert not engine.has_work
    assert errors == {"bad": "internal_error"}
    assert {name: tokens[name] for name in ("good", "other")} == {r.id: expected(r)[r.id, 0] for r in requests if r.id != "bad"}
