"""8,000 random worlds (see simulation.py), those that once failed first, and worlds that Hypothesis steers call by call."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
from fakes import DeviceFault
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduling.simulation import World, make_request, make_scheduler, simulate

BLOCK = 100
FAST_BLOCKS, SLOW_BLOCKS = 20, 80
LINES = (Path(__file__).parent / "failed_seeds.txt").read_text().splitlines()
FAILED_SEEDS = [int(line.split("#")[0]) for line in LINES if not line.startswith("#")]


@pytest.mark.parametrize("seed", FAILED_SEEDS)
def test_seeds_that_failed_once(seed):
    simulate(seed)


FAILED_WORLDS = [(100083, {"enable_prefix_caching": True, "cache_by_prompt_length": True})]
"""As FAILED_SEEDS, where some options were not drawn."""


@pytest.mark.parametrize(("seed", "options"), FAILED_WORLDS)
def test_worlds_that_failed_once(seed, options):
    simulate(seed, **options)


def run_block(block: int) -> None:
    totals: Counter[str] = Counter()
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        totals.update(dataclasses.asdict(simulate(seed)))
    # The worlds are worth something only if what is to be tested happens in them.
    least = {"finished": 700, "preemptions": 20, "faults": 10, "aborted": 100, "swaps": 2, "copies": 100, "hits": 30, "restored": 5}
    assert {name: totals[name] for name, count in least.items() if totals[name] < count} == {}


@pytest.mark.parametrize("block", range(FAST_BLOCKS))
def test_random_worlds(block):
    run_block(block)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(FAST_BLOCKS, SLOW_BLOCKS))
def test_more_random_worlds(block):
    run_block(block)


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of calls that an engine can make."""

    @initialize(
        num_pages=st.integers(2, 12),
        page_size=st.integers(1, 4),
        seqs=st.integers(1, 4),
        spare=st.integers(0, 6),
        chunk=st.sampled_from((0, 1, 3)),
        caching=st.booleans(),
        places=st.sampled_from((0, 0, 2, 6, 20)),
        mode=st.sampled_from(("recompute", "swap", "auto")),
        window=st.sampled_from((None, None, None, 2, 5)),
    )
    def start(self, num_pages, page_size, seqs, spare, chunk, caching, places, mode, window):
        scheduler = make_scheduler(
            num_pages=num_pages,
            page_size=page_size,
            max_num_seqs=seqs,
            max_num_batched_tokens=seqs + spare,
            max_model_len=60,
            long_prefill_token_threshold=chunk,
            enable_prefix_caching=caching,
            num_host_pages=places,
            preemption_mode=mode if places else "recompute",
            prefers_swap=lambda num_tokens, num_pages: num_tokens % 2 == 0,
            sliding_window=window,
            clock=lambda: 0.0,
        )
        scheduler.headroom = 0
        self.fail = False
        self.world = World(scheduler, depth=3, fails=lambda plan: self.fail)
        self.number = 0

    @rule(
        prompt=st.integers(1, 14),
        max_tokens=st.integers(1, 14),
        n=st.integers(1, 3),
        eos=st.sampled_from(((), (0, 1, 2, 3, 4))),
        tenant=st.sampled_from("ab"),
        topic=st.sampled_from((None, 1, 1)),
    )
    def add(self, prompt, max_tokens, n, eos, tenant, topic):
        self.number += 1
        self.world.add(make_request(f"r{self.number}", prompt, max_tokens, n=n, eos=eos, seed=self.number, tenant=tenant, topic=topic))

    @rule(prompt=st.integers(1, 14), max_tokens=st.integers(1, 6), width=st.integers(1, 3), early=st.sampled_from((True, False, "never")))
    def search(self, prompt, max_tokens, width, early):
        self.number += 1
        beams = {"use_beam_search": True, "beam_width": width, "early_stopping": early, "temperature": 0.0}
        self.world.add(make_request(f"r{self.number}", prompt, max_tokens, topic=1, eos=(0, 1), **beams))

    @rule(tenant=st.sampled_from((None, "a", "b")))
    def reset_prefix_cache(self, tenant):
        self.world.scheduler.reset_prefix_cache(tenant)
        self.world.verify()

    @precondition(lambda self: self.world.samples)
    @rule(data=st.data(), whole=st.booleans())
    def abort(self, data, whole):
        request_id, index = data.draw(st.sampled_from(sorted(self.world.samples)))
        self.world.abort(request_id, None if whole else index)

    @precondition(lambda self: len(self.world.handles) <= self.world.depth)
    @rule(fail=st.sampled_from((False, False, False, False, False, True)))
    def dispatch(self, fail):
        self.fail = fail
        self.world.dispatch()
        self.fail = False

    @precondition(lambda self: self.world.handles)
    @rule()
    def commit(self):
        self.world.commit()

    @precondition(lambda self: self.world.handles)
    @rule()
    def lose_everything(self):
        """A fault of which nobody knows the step."""
        world = self.world
        alive = {work.sequence.group for plan, _ in world.handles for work in plan.work if work.sequence.finish_reason is None}
        if len(alive) == 1:
            for sequence in alive.pop().sequences:
                world.sample(sequence).failed_alone += 1
        world.num_faults += 1
        world.handles.clear()
        world.device.reset()
        world.receive(world.scheduler.recover(None))
        world.verify()

    @invariant()
    def fits_in_the_pool(self):
        assert 0 <= self.world.scheduler.kv_usage <= 1

    def teardown(self):
        if hasattr(self, "world"):
            self.world.drain()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=200, stateful_step_count=60, deadline=None, derandomize=True)


@pytest.mark.parametrize("page_size", [1, 2, 3, 4])
@pytest.mark.parametrize("depth", [0, 1])
def test_every_length_on_every_boundary(page_size, depth):
    """Prompts of 1 to 4B + 1 tokens, in chunks of any size up to B + 1, followed by decodes over the next boundary."""
    for chunk in range(1, page_size + 2):
        scheduler = make_scheduler(
            num_pages=16, page_size=page_size, max_num_seqs=2, max_num_batched_tokens=page_size + 2, long_prefill_token_threshold=chunk
        )
        world = World(scheduler, depth=depth)
        for length in range(1, 4 * page_size + 2):
            world.add(make_request(f"{length}", length, page_size + 1, seed=length))
            if length % 2:
                world.drain()
        world.drain()
        assert len(world.samples) == 4 * page_size + 1


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("page_size", [1, 2, 3, 4])
def test_every_length_whatever_is_shared(page_size, n, caching):
    """Prompts of 1 to 4B + 1 tokens, each twice, so that the second time all of it is cached, and beside its own beginning."""
    scheduler = make_scheduler(
        num_pages=40, page_size=page_size, max_num_seqs=2 * n, max_num_batched_tokens=2 * n + page_size, enable_prefix_caching=caching
    )
    world = World(scheduler)
    lengths = [length for length in range(1, 4 * page_size + 2) for _ in range(2)]
    for i, length in enumerate(lengths):
        assert world.add(make_request(f"{i}", length, page_size + 1, n=n, topic=1, seed=i))
        if i % 3:
            world.drain()
    world.drain()
    assert len(world.samples) == n * len(lengths)
    assert (scheduler.memory.prefix_hits > 0) == caching


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_every_length_with_the_smallest_pool_that_holds_it(n, caching):
    """Twice each, alone and beside another: what is cached or shared never makes a request need more than the worst case."""
    for page_size in (1, 2, 4, 8):
        for total in range(2, 4 * page_size + 2):
            prompt, max_tokens = max(1, total - 3), min(3, total - 1)
            shared = (prompt - 1) // page_size
            pages = shared + n * (-(-total // page_size) - shared)
            for num_pages in (max(2, pages), pages + 1):
                scheduler = make_scheduler(
                    num_pages=num_pages,
                    page_size=page_size,
                    max_num_seqs=n,
                    max_num_batched_tokens=n + 3,
                    enable_prefix_caching=caching,
                )
                scheduler.headroom = 0
                world = World(scheduler)
                taken = [world.add(make_request(name, prompt, max_tokens, n=n, topic=1)) for name in "abc"]
                assert taken == [num_pages == pages + 1] * 3
                world.drain()


def test_the_simulation_notices_a_failing_device():
    """The harness itself: a step that raises reaches ``recover``, and nothing else may raise."""
    world = World(make_scheduler(), fails=lambda plan: plan.step == 1)
    world.add(make_request("a", 3, 3))
    world.dispatch()
    with pytest.raises(DeviceFault):
        world.device.complete(world.handles[0][1])
