"""Who holds which page: reference counts, a free list, the step fence, and pages that are kept for their content.

A page is in exactly one of four states::

              take                     release_after                complete, flush
    free ------------> used (readers) ---------------> deferred ----------------------> free, or cached
      ^                 |  |   ^                                                           if it is kept
      +-----------------+  |   | share
      |      release       v   |
      +---------------- cached, if it is kept
        take (evicts), drop

*Cached* pages have no reader, but what is in them may be of use again (``prefix_cache``). They count as free: ``take`` evicts them, the
one that lost its last reader first, when no other page is left.

*Deferred* is the step fence. A step that was dispatched may still read or write a page although the host has no more use for it
(its sequence ended, or was preempted, while the step ran). Such a page must not be given to somebody else until the last step that
contains it is complete. And the flush rule: with nothing in flight nothing is deferred, or a scheduler that waits for
deferred pages would wait for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

NULL_PAGE = 0
"""Padding reads this page; the allocator never hands it out."""


class OutOfPages(Exception):
    """Fewer pages are free than asked for; a signal inside the scheduler that never reaches a client."""


class InvariantError(AssertionError):
    """The books do not balance: a bug of ours, found before it could become a wrong answer."""


class PageAllocator:
    """Hands out page ids ``1 .. num_pages - 1`` and takes them back, at once or behind the step fence.

    Ids that came back last go out first: they are the likeliest to be warm in a cache, and a page that is given away too early
    shows in the very next test.

    Args:
        num_pages: Pages of the pool, the null page included.
        on_evict: Called with a cached page that ``take`` is about to give to somebody else; its content is still there.

    Attributes:
        num_pages: Pages of the pool, the null page included.
    """

    def __init__(self, num_pages: int, on_evict: Callable[[int], None] = lambda page_id: None) -> None:
        if num_pages < 2:
            raise ValueError(f"num_pages must be at least 2 (one of them is the null page); got {num_pages}")
        self.num_pages = num_pages
        self._on_evict = on_evict
        self._kept: set[int] = set()
        self._cached: dict[int, None] = {}  # in the order in which they lost their last reader
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))
        self._readers = [0] * num_pages
        self._leaving = [0] * num_pages
        self._fences: dict[int, list[int]] = {}
        self._completed = 0
        self._num_deferred = 0

    @property
    def num_free(self) -> int:
        """Pages that ``take`` can give now, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages without readers that are kept for their content."""
        return len(self._cached)

    @property
    def num_deferred(self) -> int:
        """Pages without readers that come back once steps in flight are complete."""
        return self._num_deferred

    @property
    def num_used(self) -> int:
        """Pages with at least one reader."""
        return self.num_pages - 1 - self.num_free - self._num_deferred

    @property
    def last_fence(self) -> int:
        """Highest step that a deferred page waits for; 0 if none does."""
        return max(self._fences, default=0)

    def num_readers(self, page_id: int) -> int:
        """Readers of a page, without those that leave when a step is complete."""
        return self._readers[page_id]

    def is_complete(self, step: int) -> bool:
        """Whether a step is known to be complete."""
        return step <= self._completed

    def reference_count(self, page_id: int) -> int:
        """Readers of a page, those included that leave when a step is complete."""
        return self._readers[page_id] + self._leaving[page_id]

    def is_exclusive(self, page_id: int, fewer: int = 0) -> bool:
        """Whether a page has one reader, if ``fewer`` of them were gone, and is not kept: only then may the reader write to it."""
        return self._readers[page_id] + self._leaving[page_id] - fewer == 1 and page_id not in self._kept

    def take(self, count: int) -> list[int]:
        """Takes ``count`` free pages for one reader: all or nothing. Evicts cached pages only where no others are left.

        Raises:
            OutOfPages: Fewer are free; nothing was taken.
        """
        free = self._free
        if count > self.num_free:
            raise OutOfPages(f"{count} pages wanted, {self.num_free} free")
        if count <= 0:
            return []
        page_ids = free[-count:][::-1]
        del free[-count:]
        while len(page_ids) < count:
            page_id = next(iter(self._cached))
            self._on_evict(page_id)
            del self._cached[page_id]
            self._kept.discard(page_id)
            page_ids.append(page_id)
        for page_id in page_ids:
            self._readers[page_id] = 1
        return page_ids

    def keep(self, page_id: int) -> None:
        """Marks a page that is used: it becomes cached, not free, when its last reader is gone."""
        if self.reference_count(page_id) == 0:
            raise InvariantError(f"page {page_id} has no reader and cannot be kept")
        self._kept.add(page_id)

    def drop(self, page_id: int) -> None:
        """Takes the mark of ``keep`` away; a cached page is free."""
        self._kept.discard(page_id)
        if page_id in self._cached:
            del self._cached[page_id]
            self._free.append(page_id)

    def is_kept(self, page_id: int) -> bool:
        """Whether a page's content is of use to others, so that nothing may be written to it."""
        return page_id in self._kept

    def share(self, page_ids: Iterable[int]) -> None:
        """Adds a reader to pages that are used, cached or deferred: these are used again."""
        for page_id in page_ids:
            if page_id in self._cached:
                del self._cached[page_id]
            elif self.reference_count(page_id) == 0:
                raise InvariantError(f"page {page_id} is free and cannot be shared")
            elif self._readers[page_id] == 0:
                self._num_deferred -= 1
            self._readers[page_id] += 1

    def release(self, page_ids: Iterable[int]) -> None:
        """Removes a reader from each page; a page without any is free or cached, or deferred if another reader is still leaving it."""
        for page_id in page_ids:
            self._remove_reader(page_id)
            if self._readers[page_id] == 0:
                if self._leaving[page_id]:
                    self._num_deferred += 1
                else:
                    self._put_down(page_id)

    def release_after(self, page_ids: Sequence[int], step: int) -> None:
        """As ``release``, but each page counts as referenced until ``complete(step)``; at once if that has been."""
        if step <= self._completed:
            self.release(page_ids)
            return
        for page_id in page_ids:
            self._remove_reader(page_id)
            self._leaving[page_id] += 1
            self._num_deferred += self._readers[page_id] == 0
        self._fences.setdefault(step, []).extend(page_ids)

    def complete(self, step: int) -> None:
        """Says that ``step`` and all before it are complete: pages deferred until then are free or cached."""
        self._completed = max(self._completed, step)
        for fence in sorted(fence for fence in self._fences if fence <= step):
            self._let_go(self._fences.pop(fence))

    def flush(self) -> None:
        """Says that nothing is in flight: whatever is deferred is free or cached."""
        if self._fences:
            self.complete(max(self._fences))

    def reset(self) -> None:
        """Makes all pages free, whoever thought to have one; what waited for a step waits no more."""
        self._kept.clear()
        self._cached.clear()
        self._fences.clear()
        self._num_deferred = 0
        self._free = list(range(self.num_pages - 1, NULL_PAGE, -1))
        self._readers = [0] * self.num_pages
        self._leaving = [0] * self.num_pages

    def check(self, owners: Iterable[Iterable[int]]) -> None:
        """Verifies the books against the tables of all owners, page by page.

        Args:
            owners: The page ids that each reader holds.

        Raises:
            InvariantError: A page leaked, is owned twice over its count, is free and owned, or a counter is wrong.
        """
        readers = self._count(owners)
        leaving = self._count(self._fences.values())
        if readers != self._readers or leaving != self._leaving:
            found, written = list(zip(readers, leaving, strict=True)), list(zip(self._readers, self._leaving, strict=True))
            page_id = next(page_id for page_id in range(self.num_pages) if found[page_id] != written[page_id])
            raise InvariantError(
                f"page {page_id} has {found[page_id][0]} readers and {found[page_id][1]} leaving; "
                f"in the books are {written[page_id][0]} and {written[page_id][1]}"
            )
        unowned = [page_id for page_id in range(1, self.num_pages) if not readers[page_id] and not leaving[page_id]]
        if sorted([*self._free, *self._cached]) != unowned:
            raise InvariantError(
                f"pages {unowned} have no owner, but those free are {sorted(self._free)} and {sorted(self._cached)} cached"
            )
        if not self._kept.isdisjoint(self._free) or not self._kept.issuperset(self._cached):
            raise InvariantError("a free page is kept, or a cached page is not")
        if self.num_used != sum(map(bool, readers)):
            raise InvariantError(f"{sum(map(bool, readers))} pages have readers, {self.num_used} are counted")
        if any(fence <= self._completed for fence in self._fences):
            raise InvariantError("a page waits for a step that is complete")

    def _count(self, holders: Iterable[Iterable[int]]) -> list[int]:
        counts = [0] * self.num_pages
        for page_ids in holders:
            for page_id in page_ids:
                if not NULL_PAGE < page_id < self.num_pages:
                    raise InvariantError(f"page {page_id} is owned, but is the null page or does not exist")
                counts[page_id] += 1
        return counts

    def _remove_reader(self, page_id: int) -> None:
        if self._readers[page_id] == 0:
            raise InvariantError(f"page {page_id} has no reader that could release it")
        self._readers[page_id] -= 1

    def _let_go(self, page_ids: Iterable[int]) -> None:
        for page_id in page_ids:
            self._leaving[page_id] -= 1
            if self._leaving[page_id] == 0 and self._readers[page_id] == 0:
                self._num_deferred -= 1
                self._put_down(page_id)

    def _put_down(self, page_id: int) -> None:
        if page_id in self._kept:
            self._cached[page_id] = None
        else:
            self._free.append(page_id)
