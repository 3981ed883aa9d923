"""The page allocator: its rules one by one, then random calls against a model that is too simple to be wrong."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxpaged.scheduling.pages import InvariantError, OutOfPages, PageAllocator


def test_the_null_page_is_never_handed_out():
    assert sorted(PageAllocator(5).take(4)) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="null page"):
        PageAllocator(1)


def test_take_is_all_or_nothing():
    pages = PageAllocator(5)
    pages.take(3)
    with pytest.raises(OutOfPages):
        pages.take(2)
    assert pages.num_free == 1
    assert pages.take(0) == []


def test_a_shared_page_is_free_when_its_last_reader_leaves():
    pages = PageAllocator(3)
    table = pages.take(1)
    pages.share(table)
    pages.release(table)
    assert pages.reference_count(table[0]) == 1
    assert pages.num_free == 1
    pages.release(table)
    assert pages.num_free == 2


def test_the_step_fence():
    pages = PageAllocator(4)
    first, second = pages.take(1), pages.take(1)
    pages.release_after(first, 7)
    pages.release_after(second, 8)
    assert (pages.num_free, pages.num_deferred, pages.num_used, pages.last_fence) == (1, 2, 0, 8)
    pages.complete(6)
    assert pages.num_deferred == 2
    pages.complete(7)
    assert (pages.num_free, pages.num_deferred) == (2, 1)
    pages.complete(8)
    assert (pages.num_free, pages.num_deferred, pages.last_fence) == (3, 0, 0)


def test_behind_a_step_that_is_complete_pages_are_free_at_once():
    pages = PageAllocator(3)
    pages.complete(5)
    pages.release_after(pages.take(2), 5)
    assert pages.num_free == 2


def test_flush_frees_all_that_is_deferred():
    pages = PageAllocator(3)
    pages.release_after(pages.take(2), 99)
    pages.flush()
    assert pages.num_free == 2


def test_a_deferred_page_can_be_shared_and_is_used_again():
    pages = PageAllocator(3)
    table = pages.take(1)
    pages.release_after(table, 3)
    pages.share(table)
    assert (pages.num_used, pages.num_deferred) == (1, 0)
    pages.complete(3)
    assert (pages.num_used, pages.num_free) == (1, 1)
    pages.release(table)
    assert pages.num_free == 2


def test_misuse_is_an_error_not_a_corruption():
    pages = PageAllocator(3)
    table = pages.take(1)
    pages.release(table)
    for misuse in (pages.release, pages.share, lambda ids: pages.release_after(ids, 9)):
        with pytest.raises(InvariantError):
            misuse(table)
    pages.check([])


@pytest.mark.parametrize("wrong", [[], [[1]], [[1, 2], [2]], [[1, 2, 3]], [[1, 0]], [[1, 9]]])
def test_check_compares_page_by_page(wrong):
    pages = PageAllocator(4)
    table = pages.take(2)
    pages.check([table])
    with pytest.raises(InvariantError):
        pages.check(wrong)


class Model:
    """An allocator with its books kept the slow way: a list of readers, and a list of those that leave with their step."""

    def __init__(self, num_pages: int, make=PageAllocator) -> None:
        self.real = make(num_pages)
        self.num_pages = num_pages
        self.tables: list[list[int]] = []
        self.leaving: list[tuple[int, list[int]]] = []
        self.completed = 0

    def take(self, count: int) -> None:
        free = self.num_free
        try:
            table = self.real.take(count)
        except OutOfPages:
            assert count > free
            return
        assert len(table) == count <= free
        self.tables.append(table)

    def share(self, index: int) -> None:
        self.real.share(self.tables[index])
        self.tables.append(list(self.tables[index]))

    def release(self, index: int) -> None:
        self.real.release(self.tables.pop(index))

    def release_after(self, index: int, ahead: int) -> None:
        table = self.tables.pop(index)
        self.real.release_after(table, self.completed + ahead)
        if ahead > 0:
            self.leaving.append((self.completed + ahead, table))

    def complete(self) -> None:
        self.completed += 1
        self.real.complete(self.completed)
        self.leaving = [(step, table) for step, table in self.leaving if step > self.completed]

    def flush(self) -> None:
        self.completed = max([self.completed, *(step for step, _ in self.leaving)])
        self.real.flush()
        self.leaving = []

    @property
    def num_free(self) -> int:
        return self.real.num_free

    def check_counts(self) -> None:
        """The cheap part: the three states add up, in O(1)."""
        real = self.real
        assert real.num_free + real.num_used + real.num_deferred == self.num_pages - 1
        assert min(real.num_free, real.num_used, real.num_deferred) >= 0

    def check(self) -> None:
        """The whole truth, page by page."""
        self.check_counts()
        self.real.check(self.tables)
        readers = Counter(page for table in self.tables for page in table)
        leaving = Counter(page for _, table in self.leaving for page in table)
        assert 0 not in readers
        for page in range(1, self.num_pages):
            assert self.real.reference_count(page) == readers[page] + leaving[page]
        assert self.real.num_used == len(readers)
        assert self.real.num_deferred == len(leaving.keys() - readers.keys())


class AllocatorMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model(9)

    @rule(count=st.integers(0, 9))
    def take(self, count):
        self.model.take(count)

    @precondition(lambda self: self.model.tables)
    @rule(data=st.data())
    def share(self, data):
        self.model.share(data.draw(st.integers(0, len(self.model.tables) - 1)))

    @precondition(lambda self: self.model.tables)
    @rule(data=st.data())
    def release(self, data):
        self.model.release(data.draw(st.integers(0, len(self.model.tables) - 1)))

    @precondition(lambda self: self.model.tables)
    @rule(data=st.data(), ahead=st.integers(-1, 3))
    def release_after(self, data, ahead):
        self.model.release_after(data.draw(st.integers(0, len(self.model.tables) - 1)), ahead)

    @rule()
    def complete(self):
        self.model.complete()

    @rule()
    def flush(self):
        self.model.flush()

    @invariant()
    def books_balance(self):
        self.model.check()


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None, derandomize=True)


def random_calls(seed: int, calls: int, *, make=PageAllocator, check_every: int = 25) -> None:
    """Makes random calls; counters are checked after each, every page after ``check_every`` of them, and nothing is left at the end."""
    rng = random.Random(seed)
    draw = rng.random
    model = Model(rng.choice((2, 3, 9, 33, 65)), make)
    tables = model.tables
    widest = max(2, model.num_pages // rng.choice((2, 4, 8)))
    for call in range(calls):
        kind = draw()
        if kind < 0.42 or not tables:
            model.take(int(draw() * widest))
        elif kind < 0.52 and len(tables) < 24:
            model.share(int(draw() * len(tables)))
        elif kind < 0.70:
            model.release(int(draw() * len(tables)))
        elif kind < 0.88:
            model.release_after(int(draw() * len(tables)), int(draw() * 4))
        elif kind < 0.995:
            model.complete()
        else:
            model.flush()
        model.check_counts()
        if call % check_every == 0:
            model.check()
    while tables:
        model.release_after(0, 2)
    model.flush()
    model.check()
    assert model.num_free == model.num_pages - 1


@pytest.mark.parametrize("block", range(10))
def test_five_million_random_calls(block):
    for seed in range(block * 50, block * 50 + 50):
        random_calls(seed, 10_000)
