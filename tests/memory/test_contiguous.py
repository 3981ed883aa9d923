"""Contiguous reservation, against examples worked out by hand."""

from __future__ import annotations

import random

import pytest

from jaxpaged.memory.contiguous import (
    FINDERS,
    Buddy,
    ContiguousSystem,
    FirstFit,
    NeverFitsError,
    reserve_most,
    reserve_power,
    reserve_true,
)
from jaxpaged.memory.ledger import Sample, summarize
from jaxpaged.memory.workloads import Call, Workload


def call(prompt: int, output: int, after: int | None = None) -> Call:
    return Call(tuple(range(1, prompt + 1)), (7,) * (output - 1) + (0,), after)


def system(
    calls: list[Call], cells: int, reservation, *, num_sequences: int = 1, max_model_len: int = 8, budget: int = 100, slots: int = 10
):
    return ContiguousSystem(
        Workload("by hand", tuple(calls)),
        runs=FirstFit(cells),
        reservation=reservation,
        num_sequences=num_sequences,
        max_model_len=max_model_len,
        max_num_seqs=slots,
        max_num_batched_tokens=budget,
    )


def test_first_fit_takes_the_lowest_run_that_is_long_enough_and_joins_neighbours():
    runs = FirstFit(10)
    assert [runs.take(3), runs.take(3), runs.take(3)] == [(0, 3), (3, 3), (6, 3)]
    runs.free(0, 3)
    runs.free(6, 3)
    assert runs.take(5) is None, "seven cells are free, but no five in a row"
    assert runs.take(4) == (6, 4)
    assert runs.take(2) == (0, 2)
    runs.free(3, 3)
    assert runs.take(4) == (2, 4), "2 and 3 to 5 have become one run"


def test_buddy_rounds_up_splits_and_joins():
    runs = Buddy(12)  # an arena of 8 and one of 4
    assert runs.take(3) == (8, 4), "the smallest block that is large enough"
    assert runs.take(2) == (0, 2)
    assert runs.take(1) == (2, 1)
    assert runs.take(5) is None, "nine cells are taken or split off"
    runs.free(0, 2)
    runs.free(2, 1)
    assert runs.take(8) == (0, 8)


@pytest.mark.parametrize("name", FINDERS)
def test_runs_never_overlap_and_all_come_back(name):
    rng = random.Random(0)
    runs, taken = FINDERS[name](1000), []
    for _ in range(3000):
        if taken and rng.random() < 0.5:
            runs.free(*taken.pop(rng.randrange(len(taken))))
        else:
            size = rng.randint(1, 120)
            run = runs.take(size)
            if run is not None:
                assert run[1] >= size
                taken.append(run)
        cells = [cell for start, size in taken for cell in range(start, start + size)]
        assert len(cells) == len(set(cells))
        assert all(0 <= cell < 1000 for cell in cells)
    for run in taken:
        runs.free(*run)
    assert runs.take(512) is not None


def test_what_each_system_reserves():
    each = call(prompt=10, output=25)
    assert reserve_most(each, 2048) == 2048
    assert reserve_power(each, 2048) == 10 + 32
    assert reserve_power(call(10, 32), 2048) == 10 + 32
    assert reserve_power(each, 40) == 40, "never more than the context"
    assert reserve_true(each, 2048) == 34, "the last token's keys and values are never stored"


def test_two_requests_step_by_step():
    """The first holds 3, 4, 5 of 5 cells; the second waits for memory, and then holds 2, 3 of 3."""
    steps = system([call(3, 3), call(2, 2)], 7, reserve_true).replay()
    assert steps == [
        Sample(tokens=3, to_come=2, allocated=5, unshared=5, requests=1, waits=True),
        Sample(tokens=4, to_come=1, allocated=5, unshared=5, requests=1, waits=True),
        Sample(tokens=5, to_come=0, allocated=5, unshared=5, requests=1, waits=True),
        Sample(tokens=2, to_come=1, allocated=3, unshared=3, requests=1, waits=False),
        Sample(tokens=3, to_come=0, allocated=3, unshared=3, requests=1, waits=False),
    ]
    figures = summarize(steps, 7)
    assert figures.used == pytest.approx(17 / 21)
    assert figures.tokens == pytest.approx(12 / 21)
    assert figures.to_come == pytest.approx(3 / 21)
    assert figures.never == 0
    assert figures.external == pytest.approx(6 / 21)
    assert (figures.steps, figures.waiting_steps, figures.peak_requests, figures.mean_requests) == (5, 3, 1, 1.0)
    assert figures.saved == 0
    assert figures.peak_cells == 5


def test_reserving_the_longest_context_wastes_the_rest():
    (step,) = system([call(3, 1)], 8, reserve_most).replay()
    assert step == Sample(tokens=3, to_come=0, allocated=8, unshared=8, requests=1, waits=False)


def test_samples_each_have_a_run_of_their_own():
    steps = system([call(3, 2)], 8, reserve_true, num_sequences=2).replay()
    assert steps[-1] == Sample(tokens=8, to_come=0, allocated=8, unshared=8, requests=1, waits=False)


def test_a_step_holds_no_more_tokens_than_its_budget():
    steps = system([call(5, 2), call(4, 1)], 100, reserve_true, budget=4).replay()
    assert [sample.tokens for sample in steps] == [4, 8, 10]
    assert not any(sample.waits for sample in steps), "what waits for the budget does not wait for memory"


def test_a_later_turn_waits_for_the_answer():
    steps = system([call(2, 3), call(6, 1, after=0)], 100, reserve_true).replay()
    assert [sample.tokens for sample in steps] == [2, 3, 4, 6]


def test_a_full_batch_does_not_wait_for_memory():
    steps = system([call(2, 2), call(2, 2)], 100, reserve_true, slots=1).replay()
    assert [sample.requests for sample in steps] == [1, 1, 1, 1]
    assert not any(sample.waits for sample in steps)


def test_a_reservation_that_can_never_fit_is_reported():
    with pytest.raises(NeverFitsError, match="2 x 8 tokens"):
        system([call(2, 2)], 15, reserve_most, num_sequences=2).replay()
