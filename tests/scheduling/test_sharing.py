"""What sharing promises, in numbers: pages at the peak, copies for each fork, tokens that are not computed again."""

from __future__ import annotations

import pytest
from scheduling.simulation import World, make_request, make_scheduler


def drain_watching(world: World) -> int:
    """Runs a world to its end; returns the most pages that were in use at one time."""
    peak = 0
    while world.scheduler.has_work:
        world.step()
        peak = max(peak, world.scheduler.num_pages_in_use)
    world.drain()
    return peak


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("prompt", [505, 512])
def test_eight_samples_of_a_long_prompt_hold_it_once(prompt, depth):
    scheduler = make_scheduler(num_pages=1000, page_size=16, max_num_seqs=16, max_num_batched_tokens=256)
    world = World(scheduler, depth=depth)
    world.add(make_request("a", prompt, 100, n=8))
    assert drain_watching(world) <= 512 // 16 + 8 * -(-100 // 16) + 8
    assert scheduler.memory.num_copies <= 7  # one for each fork; the prompt's own page stays with one of them


@pytest.mark.parametrize("width", [2, 4, 8])
def test_a_beam_step_copies_at_most_one_page_for_each_fork(width):
    scheduler = make_scheduler(num_pages=300, page_size=8, max_num_seqs=16, max_num_batched_tokens=64)
    world = World(scheduler)
    world.add(make_request("a", 21, 20, use_beam_search=True, beam_width=width, temperature=0.0))
    while scheduler.has_work:
        plan = world.dispatch()
        if plan is not None:
            assert len(plan.copies) <= width - 1
        while world.handles and (plan is None or len(world.handles) > 1):
            world.commit()
    world.drain()


@pytest.mark.parametrize("prompt", range(1, 26))
def test_a_second_request_computes_what_is_not_cached(prompt):
    """All full pages hit, and at least one token is computed, at every length."""
    scheduler = make_scheduler(num_pages=64, page_size=4, max_num_batched_tokens=32)
    world = World(scheduler, depth=0)
    for name in ("first", "second"):
        world.add(make_request(name, prompt, 3, topic=1, seed=len(name)))
        computed = sum(work.num_new_tokens for work in world.dispatch().work)
        assert computed == (prompt if name == "first" else max(1, prompt % 4))
        world.drain()
    assert scheduler.memory.prefix_hits == min(prompt // 4 * 4, prompt - 1)


def test_tenants_never_share_and_one_tenant_does():
    scheduler = make_scheduler(num_pages=64, page_size=4, max_num_batched_tokens=32)
    world = World(scheduler, depth=0)
    computed = {}
    for name, tenant in (("a", "one"), ("b", "two"), ("c", "one"), ("d", "two"), ("e", "")):
        world.add(make_request(name, 13, 2, topic=1, tenant=tenant))
        computed[name] = sum(work.num_new_tokens for work in world.dispatch().work)
        world.drain()
    assert computed == {"a": 13, "b": 13, "c": 1, "d": 1, "e": 13}


def test_a_finished_requests_output_is_found_too():
    """As in a chat, whose next turn repeats the answer."""
    scheduler = make_scheduler(num_pages=64, page_size=4, max_num_batched_tokens=64)
    world = World(scheduler, depth=0)
    first = make_request("first", 10, 11, seed=3)
    world.add(first)
    world.drain()
    answer = world.samples["first", 0].received
    turn = make_request("next", 1, 2, seed=4)
    world.add(type(turn)(id="next", prompt=(*first.prompt, *answer, 1, 2), params=turn.params, seed=4))
    assert [work.start for work in world.dispatch().work] == [20]  # the last token of the answer was never computed
    world.drain()


def test_evicted_pages_come_back_from_host_memory():
    scheduler = make_scheduler(num_pages=9, page_size=4, max_num_batched_tokens=40, num_host_pages=20)
    world = World(scheduler, depth=0)
    for name, topic in (("a", 1), ("b", 2), ("c", 1)):
        world.add(make_request(name, 29, 2, topic=topic))
        world.drain()
    assert scheduler.memory.prefix_hits == 28
    assert world.num_restored > 0


def test_an_evicted_text_loses_its_end_first():
    scheduler = make_scheduler(num_pages=9, page_size=4, max_num_batched_tokens=40)
    world = World(scheduler, depth=0)
    for name, length, topic in (("a", 21, 1), ("b", 13, 2), ("c", 21, 1)):
        world.add(make_request(name, length, 2, topic=topic))
        world.drain()
    assert scheduler.memory.prefix_hits == 16  # b needed four pages: three were free, and the last of a's five went


def test_a_window_lets_in_texts_longer_than_the_pool():
    scheduler = make_scheduler(num_pages=9, page_size=4, max_num_batched_tokens=8, sliding_window=10, max_model_len=500)
    world = World(scheduler, depth=1)
    world.add(make_request("a", 200, 60))
    assert drain_watching(world) <= scheduler.memory.most_pages(260) + 2  # a chunk more while a step is in flight


def test_swapping_computes_nothing_again():
    computed = {}
    for mode in ("recompute", "swap"):
        host = {"num_host_pages": 60} if mode == "swap" else {}
        scheduler = make_scheduler(
            num_pages=17, page_size=4, max_num_seqs=6, max_num_batched_tokens=24, preemption_mode=mode, enable_prefix_caching=False, **host
        )
        world = World(scheduler, depth=1)
        for i in range(6):
            world.add(make_request(f"r{i}", 9, 25, seed=i))
        computed[mode] = 0
        while scheduler.has_work:
            plan = world.dispatch()
            computed[mode] += plan.num_tokens if plan else 0
            while world.handles and (plan is None or len(world.handles) > 1):
                world.commit()
        world.drain()
        assert scheduler.num_preemptions > 0
        assert (scheduler.num_swaps > 0) == (mode == "swap")
    assert computed["swap"] == 6 * (9 + 25 - 1) < computed["recompute"]
