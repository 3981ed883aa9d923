"""Our side of the comparison: what is counted, against a recount of every page; and the made-up device."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from jaxpaged.memory.paged import PagedSetting, PagedSystem
from jaxpaged.memory.stand_in import StandIn, theta_of_entropy
from jaxpaged.memory.worked import work_example
from jaxpaged.memory.workloads import Call, Workload, load_workload
from jaxpaged.scheduling.pages import NULL_PAGE


class RecountingSystem(PagedSystem):
    """Counts every cell of every page anew in each step, with no shortcut."""

    def _measure(self, plan):
        sample = super()._measure(plan)
        size = self.scheduler.page_size
        now, later, unshared = {}, {}, 0
        for sequence in self.scheduler.running:
            total = self._calls[sequence.request.id].num_tokens
            for index, page_id in enumerate(sequence.page_ids):
                if page_id != NULL_PAGE:
                    unshared += size
                    for counts, tokens in ((now, sequence.num_computed), (later, total)):
                        counts.setdefault(page_id, set()).update(range(max(0, min(size, tokens - index * size))))
        deferred = size * self.scheduler.pages.num_deferred
        assert sample.tokens == sum(map(len, now.values()))
        assert sample.allocated == size * len(now) + deferred
        assert sample.unshared == unshared + deferred
        assert sample.to_come == sum(len(later[page_id] - now[page_id]) for page_id in now)
        self.scheduler.check()
        return sample


def setting(**changes) -> PagedSetting:
    values = {"num_pages": 60, "page_size": 4, "max_model_len": 64, "max_num_seqs": 12, "max_num_batched_tokens": 40}
    return PagedSetting(**{**values, **changes})


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_every_cell_is_counted(depth, page_size):
    workload = load_workload("chat", num_requests=40, seed=1, max_model_len=64)
    system = RecountingSystem(workload, setting(page_size=page_size, num_pages=241 // page_size, async_depth=depth))
    steps = system.replay()
    assert system.scheduler.num_preemptions, "the case is to be a hard one"
    assert any(step.waits for step in steps)
    assert steps[-1].requests == 1
    assert system.scheduler.pages.num_used == 0


@pytest.mark.parametrize(("beams", "num_sequences"), [(False, 3), (True, 3), (True, 4)])
@pytest.mark.parametrize("depth", [0, 1])
def test_every_cell_is_counted_once_where_sequences_share(beams, num_sequences, depth):
    workload = load_workload("multi-turn", num_requests=30, seed=2, max_model_len=64)
    system = RecountingSystem(workload, setting(num_sequences=num_sequences, beams=beams, async_depth=depth))
    steps = system.replay()
    assert any(step.unshared > step.allocated for step in steps)
    assert system.scheduler.pages.num_used == 0
    assert len(system.scheduler.running) + len(system.scheduler.waiting) == 0


def test_pages_behind_the_window_are_given_back():
    workload = Workload("long", (Call((1,) * 30, (5,) * 30 + (0,)),))
    whole = RecountingSystem(workload, setting(async_depth=0)).replay()
    window = RecountingSystem(workload, setting(async_depth=0, sliding_window=8)).replay()
    assert whole[-1].tokens == 60
    assert window[-1].tokens <= 8 + 2 * 4


def test_hits_are_counted():
    calls = (Call((1,) * 20, (5, 0)), Call((1,) * 20 + (5, 9), (5, 0), after=0))
    assert PagedSystem(Workload("turns", calls), setting()).hit_tokens == 0
    system = PagedSystem(Workload("turns", calls), setting())
    system.replay()
    assert system.hit_tokens == 20
    system = PagedSystem(Workload("turns", calls), setting(prefix_caching=False))
    system.replay()
    assert system.hit_tokens == 0


def test_host_memory_keeps_what_the_pool_must_forget():
    workload = load_workload("multi-turn", num_requests=60, seed=3, max_model_len=64)
    found = []
    for num_host_pages in (0, 500):
        system = PagedSystem(workload, setting(num_host_pages=num_host_pages, num_pages=40))
        system.replay()
        found.append(system.hit_tokens)
    assert 0 < found[0] < found[1] <= workload.repeated_tokens()


def test_a_request_waits_for_memory_only_where_memory_is_what_lacks():
    calls = (Call((1,) * 8, (5,) * 7 + (0,)),) * 2
    small = PagedSystem(Workload("two", calls), setting(num_pages=5)).replay()
    assert any(step.waits for step in small)
    one_slot = PagedSystem(Workload("two", calls), setting(max_num_seqs=1)).replay()
    assert not any(step.waits for step in one_slot)
    small_steps = PagedSystem(Workload("two", calls), setting(max_num_seqs=2, max_num_batched_tokens=8)).replay()
    assert not any(step.waits for step in small_steps)


def test_the_scheduler_cannot_foresee_the_end():
    """The stop token ends a sample; nothing in the request says when, and one step too many is planned behind it."""
    workload = Workload("one", (Call((1, 2, 3), (5, 6, 0)),))
    system = PagedSystem(workload, setting())
    assert system._request("0").max_tokens > 3
    assert len(system.replay()) == 4
    assert len(PagedSystem(workload, setting(async_depth=0)).replay()) == 3


@pytest.mark.parametrize(
    ("reserved", "used", "page_size", "pages", "before", "after"),
    [(2048, 600, 16, 38, 0.707, 0.013), (4096, 900, 32, 29, 0.780, 0.030), (64, 64, 16, 4, 0.0, 0.0), (5, 1, 8, 1, 0.8, 0.875)],
)
def test_worked_examples(reserved, used, page_size, pages, before, after):
    example = work_example(reserved=reserved, used=used, page_size=page_size)
    assert example.num_pages == pages
    assert example.used == used
    assert example.contiguous_waste == pytest.approx(before, abs=5e-4)
    assert example.paged_waste == pytest.approx(after, abs=5e-4)


def test_theta_follows_from_the_entropy():
    assert theta_of_entropy(1.0) == pytest.approx(1.0, abs=1e-3)
    assert theta_of_entropy(1.5) == pytest.approx(2.0, abs=2e-3)
    assert theta_of_entropy(11 / 6) == pytest.approx(3.0, abs=3e-3)


def test_candidates_are_the_best_of_the_distribution():
    """At one nat the likeliest token has 0.6243 on average (the Golomb-Dickman constant), and all candidates together less than 1."""
    device = StandIn({}, entropy=1.0, likeness=0.0, seed=3)
    best, sums = [], []
    for _ in range(6000):
        candidates = device._candidates([0.0], 8)
        scores = [candidate.score for candidate in candidates]
        assert scores == sorted(scores, reverse=True)
        assert len({candidate.token_id for candidate in candidates}) == len(candidates) == 8
        best.append(math.exp(scores[0]))
        sums.append(sum(map(math.exp, scores)))
    assert statistics.fmean(best) == pytest.approx(0.6243, abs=0.01)
    assert max(sums) <= 1 + 1e-9


def test_candidates_come_from_the_parents_by_their_scores():
    device = StandIn({}, entropy=1.0, likeness=0.0, seed=4)
    candidates = device._candidates([-1.0, -50.0], 4)
    assert {candidate.parent for candidate in candidates} == {0}
    parents = [candidate.parent for _ in range(200) for candidate in device._candidates([-1.0, -1.0, -1.0], 6)]
    shares = [parents.count(parent) / len(parents) for parent in range(3)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.05)


def test_replays_are_the_same_every_time():
    workload = load_workload("chat", num_requests=30, seed=random.Random(5).randrange(100), max_model_len=64)
    assert PagedSystem(workload, setting()).replay() == PagedSystem(workload, setting()).replay()


def test_beams_that_are_alike_have_the_same_next_tokens():
    candidates = StandIn({}, entropy=1.0, likeness=1.0, seed=5)._candidates([-1.0, -1.0], 6)
    children = [[(each.token_id, each.score) for each in candidates if each.parent == parent] for parent in range(2)]
    assert children[0] == children[1]
    assert len(children[0]) == 3


def test_sharing_grows_with_the_width_and_shrinks_with_likeness():
    """What is shared is no constant of ours: it follows from the search."""
    workload = load_workload("alpaca", num_requests=15, seed=0, max_model_len=512)

    def saved(width: int, likeness: float) -> float:
        values = {"num_pages": 800, "page_size": 16, "max_model_len": 512, "max_num_seqs": 64, "max_num_batched_tokens": 512}
        steps = PagedSystem(workload, PagedSetting(**values, num_sequences=width, beams=True, likeness=likeness)).replay()
        return 1 - sum(step.allocated for step in steps) / sum(step.unshared for step in steps)

    assert saved(1, 0.0) == 0
    assert saved(2, 0.0) < saved(4, 0.0) < 0.75
    assert saved(4, 1.0) < saved(4, 0.0)


def test_eight_samples_of_a_long_prompt_hold_its_pages_once():
    """The bound of issue 4: its prompt's pages, eight times its answers' pages, and a page more for each sample."""
    prompt, output, page_size = 512, 64, 16
    workload = Workload("one", (Call(tuple(range(1, prompt + 1)), (5,) * (output - 1) + (0,)),))
    values = {"num_pages": 400, "page_size": page_size, "max_model_len": 640, "max_num_seqs": 8, "max_num_batched_tokens": 2048}
    steps = PagedSystem(workload, PagedSetting(**values, num_sequences=8)).replay()
    peak = max(step.allocated for step in steps) // page_size
    assert peak <= prompt // page_size + 8 * (output // page_size) + 8


def test_four_beams_save_as_much_as_the_paper_says_at_least():
    workload = load_workload("alpaca", num_requests=40, seed=0, max_model_len=2048)
    values = {"num_pages": 983, "page_size": 16, "max_model_len": 2048, "max_num_seqs": 256, "max_num_batched_tokens": 2048}
    steps = PagedSystem(workload, PagedSetting(**values, num_sequences=4, beams=True)).replay()
    assert 1 - sum(step.allocated for step in steps) / sum(step.unshared for step in steps) >= 0.37
