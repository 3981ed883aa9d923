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


SHARING = {"num_host_pages": 4, "preemption_mode": "swap"}
SAMPLES = {"n": 2}
BEAMS = {"use_beam_search": True, "beam_width": 2, "temperature": 0.0}


def play_shared(calls: tuple[str, ...], depth: int, kinds: tuple[dict, ...], options: dict) -> tuple[int, int, int, int]:
    """Makes the calls with requests of these kinds, one after the other, whose prompts begin alike, on five pages of two tokens.

    Returns:
        How many pages were copied, swaps made, prompt tokens found in the cache, and sequences preempted.
    """
    scheduler = make_scheduler(num_pages=6, page_size=2, max_num_seqs=3, max_num_batched_tokens=4, **options)
    scheduler.headroom = 0
    world = World(scheduler, depth=depth)
    for call in calls:
        if call == ADD:
            number = len({name for name, _ in world.samples})
            kind = kinds[number % len(kinds)]
            prompt, max_tokens = 3 + number % 2, 3 - number % 2
            assert world.add(make_request(f"r{number}", prompt, max_tokens, seed=number, topic=1, eos=tuple(range(8)), **kind))
        else:
            make_call(world, call)
    world.drain()
    memory = scheduler.memory
    return memory.num_copies, scheduler.num_swaps, memory.prefix_hits, scheduler.num_preemptions


def make_call(world: World, call: str) -> None:
    if call == DISPATCH:
        world.dispatch()
    elif call == ABORT:
        world.abort("r0")
    elif world.handles:
        if call == FAIL:
            world.handles[0][1].fault = DeviceFault("planted")
        world.commit()


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
        else:
            make_call(world, call)
    world.drain()
    return scheduler.num_preemptions


@pytest.mark.parametrize("depth", [0, 1])
def test_every_order_of_eight_calls(depth):
    assert sum(play(calls, depth, 5, 1) for calls in interleavings(8, depth, 3)) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "num_pages", "page_size"), [(0, 5, 1), (1, 5, 1), (1, 4, 2), (1, 6, 1), (2, 5, 1)])
def test_every_order_of_ten_calls(depth, num_pages, page_size):
    assert sum(play(calls, depth, num_pages, page_size) for calls in interleavings(10, depth, 3)) > 0


KINDS = [(SAMPLES, {}), (BEAMS, {}), ({}, SAMPLES), (SAMPLES, SAMPLES), (BEAMS, SAMPLES, {})]


def ids(kinds: tuple[dict, ...]) -> str:
    return "-".join("beams" if "beam_width" in kind else "samples" if kind else "one" for kind in kinds)


def check_shared(length: int, depth: int, kinds: tuple[dict, ...]) -> None:
    """What shares pages shares them in some of the orders: copies, hits, and swaps where there is somebody to preempt."""
    totals = [
        sum(counts)
        for counts in zip(*(play_shared(calls, depth, kinds, SHARING) for calls in interleavings(length, depth, 3)), strict=True)
    ]
    copies, swaps, hits, preemptions = totals
    assert copies > 0
    assert hits > 0
    assert preemptions == 0 or swaps > 0


@pytest.mark.parametrize("kinds", KINDS, ids=ids)
def test_every_order_of_six_calls_of_requests_that_share(kinds):
    check_shared(6, 1, kinds)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", KINDS, ids=ids)
@pytest.mark.parametrize("depth", [0, 1])
def test_every_order_of_eight_calls_of_requests_that_share(kinds, depth):
    check_shared(8, depth, kinds)
