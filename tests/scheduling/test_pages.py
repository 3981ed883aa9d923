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


def test_a_kept_page_is_cached_when_its_last_reader_leaves_and_counts_as_free():
    pages = PageAllocator(4)
    first, second = pages.take(2)
    pages.keep(first)
    pages.release([first])
    pages.release([second])
    assert (pages.num_free, pages.num_cached, pages.num_used) == (3, 1, 0)
    assert pages.is_kept(first)
    pages.share([first])
    assert (pages.num_free, pages.num_cached, pages.num_used) == (2, 0, 1)
    pages.check([[first]])


def test_a_kept_page_behind_the_fence_is_cached_when_the_step_is_complete():
    pages = PageAllocator(3)
    table = pages.take(1)
    pages.keep(table[0])
    pages.release_after(table, 2)
    assert (pages.num_cached, pages.num_deferred) == (0, 1)
    pages.complete(2)
    assert (pages.num_cached, pages.num_deferred) == (1, 0)


def test_cached_pages_are_evicted_when_no_other_is_free_the_one_used_longest_ago_first():
    evicted: list[int] = []
    pages = PageAllocator(6, evicted.append)
    tables = [pages.take(1) for _ in range(4)]
    for table in tables:
        pages.keep(table[0])
    for table in (tables[2], tables[0], tables[3], tables[1]):
        pages.release(table)
    pages.share(tables[2])  # used again
    pages.release(tables[2])
    assert pages.take(1) not in tables
    assert evicted == []
    assert pages.take(3) == [tables[0][0], tables[3][0], tables[1][0]] == evicted
    assert not any(map(pages.is_kept, evicted))
    assert pages.is_kept(tables[2][0])


def test_a_page_is_told_of_before_it_is_given_away():
    seen = []
    pages = PageAllocator(2, lambda page_id: seen.append((page_id, pages.is_kept(page_id), pages.reference_count(page_id))))
    table = pages.take(1)
    pages.keep(table[0])
    pages.release(table)
    pages.take(1)
    assert seen == [(1, True, 0)]


def test_what_cannot_be_taken_evicts_nothing():
    evicted: list[int] = []
    pages = PageAllocator(4, evicted.append)
    table = pages.take(2)
    pages.keep(table[0])
    pages.release(table[:1])
    with pytest.raises(OutOfPages):
        pages.take(3)
    assert evicted == []
    assert pages.num_cached == 1


def test_drop_makes_a_cached_page_free_and_a_read_one_common():
    pages = PageAllocator(4)
    cached, read = pages.take(2)
    pages.keep(cached)
    pages.keep(read)
    pages.release([cached])
    pages.drop(cached)
    pages.drop(read)
    assert (pages.num_free, pages.num_cached) == (2, 0)
    pages.release([read])
    assert (pages.num_free, pages.num_cached) == (3, 0)
    pages.check([])


def test_reset_makes_everything_free_whoever_has_it():
    pages = PageAllocator(6)
    tables = [pages.take(1) for _ in range(4)]
    pages.keep(tables[0][0])
    pages.keep(tables[1][0])
    pages.release(tables[0])
    pages.release_after(tables[2], 8)
    pages.reset()
    pages.check([])
    assert (pages.num_free, pages.num_cached, pages.num_deferred, pages.last_fence) == (5, 0, 0, 0)
    assert not pages.is_complete(8)


def test_only_the_one_reader_of_a_page_that_is_not_kept_may_write():
    pages = PageAllocator(4)
    (page_id,) = pages.take(1)
    assert pages.is_exclusive(page_id)
    pages.share([page_id])
    assert not pages.is_exclusive(page_id)
    assert pages.is_exclusive(page_id, fewer=1)
    pages.release_after([page_id], 1)  # a step may still read it
    assert not pages.is_exclusive(page_id)
    pages.complete(1)
    assert pages.is_exclusive(page_id)
    pages.keep(page_id)
    assert not pages.is_exclusive(page_id)


def test_misuse_is_an_error_not_a_corruption():
    pages = PageAllocator(3)
    table = pages.take(1)
    pages.release(table)
    for misuse in (pages.release, pages.share, lambda ids: pages.release_after(ids, 9), lambda ids: pages.keep(ids[0])):
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
        self.real = make(num_pages, lambda page_id: self.evicted.append(page_id))
        self.num_pages = num_pages
        self.kept: set[int] = set()
        self.cached: list[int] = []  # used longest ago first
        self.evicted: list[int] = []
        self.tables: list[list[int]] = []
        self.leaving: list[tuple[int, list[int]]] = []
        self.completed = 0

    def take(self, count: int) -> None:
        free = self.num_pages - 1 - len({page for _, table in self.leaving for page in table}.union(*self.tables))
        self.look_at_cached()
        self.evicted.clear()
        try:
            table = self.real.take(count)
        except OutOfPages:
            assert count > free
            return
        assert len(table) == count <= free
        assert self.evicted == self.cached[: max(0, count - (free - len(self.cached)))]
        self.kept.difference_update(self.evicted)
        del self.cached[: len(self.evicted)]
        self.tables.append(table)

    def keep(self, index: int) -> None:
        for page in self.tables[index]:
            self.real.keep(page)
            self.kept.add(page)

    def drop(self, page: int) -> None:
        self.real.drop(page)
        self.kept.discard(page)

    def share_cached(self, index: int) -> None:
        """Somebody finds what is in a cached page."""
        self.look_at_cached()
        if self.cached:
            page = self.cached[index % len(self.cached)]
            self.real.share([page])
            self.tables.append([page])

    def look_at_cached(self) -> None:
        """Takes out what is not cached any more; what is new there goes to the end."""
        busy = {page for _, table in self.leaving for page in table}.union(*self.tables)
        old = [page for page in self.cached if page in self.kept and page not in busy]
        new = self.kept - busy - set(old)
        self.cached = old + [page for page in self.real._cached if page in new]
        assert len(self.cached) == len(old) + len(new)

    def share(self, index: int) -> None:
        self.real.share(self.tables[index])
        self.tables.append(list(self.tables[index]))

    def release(self, index: int) -> None:
        self.look_at_cached()
        self.real.release(self.tables.pop(index))
        self.look_at_cached()

    def release_after(self, index: int, ahead: int) -> None:
        self.look_at_cached()
        table = self.tables.pop(index)
        self.real.release_after(table, self.completed + ahead)
        if ahead > 0:
            self.leaving.append((self.completed + ahead, table))
        self.look_at_cached()

    def complete(self) -> None:
        self.look_at_cached()
        self.completed += 1
        self.real.complete(self.completed)
        self.leaving = [(step, table) for step, table in self.leaving if step > self.completed]
        self.look_at_cached()

    def flush(self) -> None:
        self.completed = max([self.completed, *(step for step, _ in self.leaving)])
        self.look_at_cached()
        self.real.flush()
        self.leaving = []
        self.look_at_cached()

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
        self.look_at_cached()
        assert list(self.real._cached) == self.cached
        assert self.real.num_cached == len(self.cached)
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

    @precondition(lambda self: self.model.tables)
    @rule(data=st.data())
    def keep(self, data):
        self.model.keep(data.draw(st.integers(0, len(self.model.tables) - 1)))

    @rule(page=st.integers(1, 8))
    def drop(self, page):
        self.model.drop(page)

    @precondition(lambda self: self.model.cached)
    @rule(index=st.integers(0, 8))
    def share_cached(self, index):
        self.model.share_cached(index)

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
        elif kind < 0.47 and len(tables) < 24:
            model.share(int(draw() * len(tables)))
        elif kind < 0.50 and model.cached:
            model.share_cached(int(draw() * 64))
        elif kind < 0.53:
            model.keep(int(draw() * len(tables)))
        elif kind < 0.54:
            model.drop(1 + int(draw() * (model.num_pages - 1)))
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


@pytest.mark.parametrize("block", range(5))
def test_five_million_random_calls(block):
    for seed in range(block * 100, block * 100 + 100):
        random_calls(seed, 10_000)
