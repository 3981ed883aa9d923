"""Every order of calls, up to a length, in worlds so small that everything happens at once: no randomness, nothing left out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fakes import DeviceFault
from scheduling.simulation import World, make_request, make_scheduler

ADD, DISPATCH, COMMIT, FAIL, ABORT = "add", "dispatch", "commit", "fail", "abort"


def interleavings(length: int, depth: int, requests: int) -> Iterator[tuple[str, ...]]:
    """Yields every sequence of calls that an engine could make: commits follow dispatches, one abort, two faults at most."""

    def grow(calls: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if len(calls) == length:
            yield calls
            return
        in_flight = 0
        for call in calls:  # a dispatch may find nothing to do and a fault empties the line, so this is the most there can be
            in_flight = {DISPATCH: in_flight + 1, COMMIT: in_flight - 1, FAIL: 0}.get(call, in_flight)
        if calls.count(ADD) < requests:
            yield from grow((*calls, ADD))
        if in_flight <= depth:
            yield from grow((*calls, DISPATCH))
        if in_flight > 0:
            yield from grow((*calls, COMMIT))
            if calls.count(FAIL) < 2:
                yield from grow((*calls, FAIL))
        if calls.count(ADD) and not calls.count(ABORT):
            yield from grow((*calls, ABORT))

    return grow((ADD,))


def play(calls: tuple[str, ...], depth: int, num_pages: int, page_size: int) -> int:
    """Makes the calls, then drains; returns how many sequences were preempted."""
    scheduler = make_scheduler(num_pages=num_pages, page_size=page_size, max_num_seqs=3, max_num_batched_tokens=4)
    scheduler.headroom = 0
    world = World(scheduler, depth=depth)
    capacity = scheduler.max_request_tokens
    for call in calls:
        if call == ADD:
            number = len(world.samples)
            prompt = 1 + number % 2
            world.add(make_request(f"r{number}", prompt, capacity - prompt, seed=number, eos=tuple(range(8))))
        elif call == DISPATCH:
            world.dispatch()
        elif call == ABORT:
            world.abort("r0")
        elif world.handles:
            if call == FAIL:
                world.handles[0][1].fault = DeviceFault("planted")
            world.commit()
    world.drain()
    return scheduler.num_preemptions


@pytest.mark.parametrize("depth", [0, 1])
def test_every_order_of_eight_calls(depth):
    assert sum(play(calls, depth, 5, 1) for calls in interleavings(8, depth, 3)) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "num_pages", "page_size"), [(0, 5, 1), (1, 5, 1), (1, 4, 2), (1, 6, 1), (2, 5, 1)])
def test_every_order_of_ten_calls(depth, num_pages, page_size):
    assert sum(play(calls, depth, num_pages, page_size) for calls in interleavings(10, depth, 3)) > 0
