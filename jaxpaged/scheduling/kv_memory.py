"""Whose keys and values lie where: sequences and their pages, on the device and in host memory.

The scheduler decides who runs and who has to go; this module says what that takes and does it. It knows four ways to get pages:

* **grow**: pages of one's own for tokens to come;
* **begin**: the longest beginning of the tokens that is in the prefix cache, shared, or brought back from host memory;
* **fork**: all pages of the prompt of another sequence of the same request, the last and partly filled one too;
* **swap in**: what ``swap_out`` had moved to host memory.

**Copy-on-write.** A page may be written only by a sequence that is its only reader, and only if the prefix cache does not know it. One that
is about to write to another page gets a copy of it first. The copy is made by the step itself, before it writes.

**Moves.** What has to be copied and transferred is collected and goes with the next plan: transfers in the order in which they were
decided, then all copies. The device does them in this order before the step, and steps one after the other, so a page that was moved
out can be given away at once.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import NamedTuple

from jaxpaged.scheduling.pages import NULL_PAGE, PageAllocator
from jaxpaged.scheduling.plan import PageCopy, Transfer
from jaxpaged.scheduling.prefix_cache import Key, PrefixCache, extend_keys, partition_key, tenant_mark
from jaxpaged.scheduling.request import Group, Request, Sequence


class _Hits(NamedTuple):
    """What is cached of a sequence's beginning.

    Attributes:
        num_unread: Pages at the beginning that nobody can read any more (sliding window); they are not needed.
        pages: After them, pages on the device.
        places: After these, places in host memory.
    """

    num_unread: int
    pages: list[int]
    places: list[int]

    @property
    def num_pages(self) -> int:
        return self.num_unread + len(self.pages) + len(self.places)


class KVMemory:
    """Gives sequences their pages and takes them back.

    Args:
        num_pages: Pages of the pool, the null page included.
        page_size: B.
        enable_prefix_caching: Whether settled, full pages can be found again.
        num_host_pages: Places for pages in host memory; 0 for none.
        sliding_window: Tokens that a token sees, itself included, in the layer that sees most; None if a layer sees all.
        longest_chunk: Most tokens that a step computes of one sequence.
        cache_by_prompt_length: Whether keys and values depend on the length of the prompt (some RoPE scalings), so that only prompts
            of the same length can share.

    Attributes:
        device, host: The tiers: pages, and places in host memory (None without); each with its prefix cache.
        num_copies: Pages copied on write, since the start.
        prefix_queries, prefix_hits: Prompt tokens that were looked up in the prefix cache, and those found.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        enable_prefix_caching: bool = True,
        num_host_pages: int = 0,
        sliding_window: int | None = None,
        longest_chunk: int = 1,
        cache_by_prompt_length: bool = False,
    ) -> None:
        self.page_size = page_size
        self.enable_prefix_caching = enable_prefix_caching
        self.sliding_window = sliding_window
        self.device = PrefixCache(num_pages, self._spill)
        self.host = PrefixCache(num_host_pages + 1) if num_host_pages else None
        self.num_copies = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._by_prompt_length = cache_by_prompt_length
        self._longest_chunk = longest_chunk
        self._transfers: list[Transfer] = []
        self._copies: list[PageCopy] = []
        self._sources: list[tuple[int, int]] = []

    @property
    def pages(self) -> PageAllocator:
        """The allocator of the pool."""
        return self.device.pages

    # ------------------------------------------------------------------------------------------------------------- numbers

    def num_pages(self, num_tokens: int) -> int:
        """Returns how many pages hold this many tokens."""
        return -(-num_tokens // self.page_size)

    def most_pages(self, num_tokens: int) -> int:
        """Returns how many pages a sequence of this length holds at most at one time."""
        if self.sliding_window is None:
            return self.num_pages(num_tokens)
        return min(self.num_pages(num_tokens), self.num_pages(self.sliding_window + self._longest_chunk) + 1)

    def worst_case(self, request: Request) -> int:
        """Returns the most pages that a request can need: its prompt's once, the last one and what follows for each sequence."""
        count, num_prompt = request.params.num_sequences, len(request.prompt)
        longest = self.most_pages(num_prompt + request.max_tokens)
        shared = (num_prompt - 1) // self.page_size
        return min(count * longest, shared + count * (self.num_pages(num_prompt + request.max_tokens) - shared))

    def to_admit(self, group: Group) -> int:
        """Returns how many free pages it takes to compute, or bring back, all tokens that the sequences of a waiting group have."""
        leader, *others = group.sequences
        if not any(sequence.host_ids for sequence in group.sequences):
            return self.to_begin(leader) + sum(self._to_fork(sequence) for sequence in others)
        places = set(_without_null(itertools.chain.from_iterable(sequence.host_ids for sequence in group.sequences)))
        on_device = [page_id for page_id in map(self._on_device, places) if page_id is not None]
        return len(places) - sum(map(self._is_read, on_device)) + sum(map(self.spoken_for, group.sequences))

    def spoken_for(self, sequence: Sequence) -> int:
        """Returns how many more pages a sequence needs for the tokens it has, beside those it holds here or in host memory."""
        held = sequence.page_ids or sequence.host_ids
        if not held:
            return self._to_fork(sequence)
        missing = self.num_pages(len(sequence.tokens)) - len(held)
        if self.sliding_window is not None:
            missing = min(missing, self.most_pages(len(sequence.tokens)) - len(_without_null(held)))
        return max(0, missing)

    def to_begin(self, sequence: Sequence) -> int:
        """Returns how many free pages it takes to compute all tokens that a sequence has, from the longest cached beginning on."""
        hits = self._hits(sequence, short_of=1)
        return self.most_pages(len(sequence.tokens)) - sum(self._is_read(page_id) for page_id in hits.pages)

    def shortfall(self, ends: Seq[tuple[Sequence, int]]) -> int:
        """Returns how many free pages it takes for these sequences to compute their tokens up to these ends in one step.

        Of several that read the page they are about to write to, all but one need a copy.
        """
        missing = 0
        copied: Counter[int] = Counter()
        for sequence, end in ends:
            missing += max(0, self.num_pages(end) - len(sequence.page_ids))
            page_id = self._next_written(sequence)
            if page_id is not None and not self.pages.is_exclusive(page_id, copied[page_id]):
                missing += 1
                copied[page_id] += not self.pages.is_kept(page_id) and self.pages.is_complete(sequence.last_step)
        return missing

    def has_room(self, sequence: Sequence, end: int) -> bool:
        """Whether a sequence needs no page to compute its tokens up to ``end``: a shortfall of 0, found quickly."""
        page_ids, at = sequence.page_ids, sequence.num_computed // self.page_size
        return end <= len(page_ids) * self.page_size and at < len(page_ids) and self.pages.is_exclusive(page_ids[at])

    # -------------------------------------------------------------------------------------------------------------- to pages

    def begin(self, sequence: Sequence) -> None:
        """Gives a sequence that is admitted the pages of its longest beginning that is cached; there must be pages for the rest."""
        hits = self._hits(sequence)
        if hits.num_pages * self.page_size >= len(sequence.tokens) and not self._has_room_for_copy(sequence, hits):
            hits = self._hits(sequence, short_of=1)
        self.pages.share(hits.pages)
        if self.host is not None:
            self.host.pages.share(hits.places)
        sequence.page_ids = [NULL_PAGE] * hits.num_unread + hits.pages + self._restore(hits.places)
        sequence.num_registered = hits.num_pages
        sequence.num_computed = sequence.num_settled = min(hits.num_pages * self.page_size, len(sequence.tokens) - 1)
        group = sequence.group
        if group.num_cached_tokens is None:
            group.num_cached_tokens = sequence.num_computed
            if self._may_hit(sequence):
                self.prefix_queries += sequence.num_prompt
                self.prefix_hits += sequence.num_computed

    def fork(self, sequence: Sequence, source: Sequence) -> None:
        """Shares all pages of the prompt with another sequence of the request, which has computed it.

        The prompt's last token is computed again: a sequence samples after a token of its own.
        """
        sequence.num_computed = sequence.num_settled = min(source.num_prompt, len(sequence.tokens) - 1)
        unread = self._num_unread(sequence.num_computed)
        sequence.page_ids = [NULL_PAGE] * unread + source.page_ids[unread : self.num_pages(source.num_prompt)]
        self.pages.share(_without_null(sequence.page_ids))
        sequence.num_registered = min(source.num_registered, source.num_prompt // self.page_size)
        sequence.num_listed = 0

    def grow(self, sequence: Sequence, end: int) -> None:
        """Takes the pages for tokens up to ``end``, and a copy of the page that the next token is written to, if others read it.

        Raises:
            OutOfPages: ``shortfall`` pages are not free.
        """
        page_id = self._next_written(sequence)
        if page_id is not None and not self.pages.is_exclusive(page_id):
            at = sequence.num_computed // self.page_size
            (sequence.page_ids[at],) = self.pages.take(1)
            sequence.num_listed = min(sequence.num_listed, at)
            sequence.num_registered = min(sequence.num_registered, at)  # the copy can be found once the page it is of is not there
            self._copies.append(PageCopy(page_id, sequence.page_ids[at]))
            self.num_copies += 1
            if self.pages.is_kept(page_id) or self.pages.num_readers(page_id) == 1:
                self._sources.append((page_id, sequence.last_step))  # nothing may be moved there before the copy is made
            else:
                self.pages.release_after([page_id], sequence.last_step)  # another sequence of the request still reads it
        sequence.page_ids += self.pages.take(self.num_pages(end) - len(sequence.page_ids))

    def settle(self, sequence: Sequence, end: int) -> None:
        """Says that the steps which computed the first ``end`` tokens are complete: their full pages go into the prefix cache."""
        sequence.num_settled = max(sequence.num_settled, end)
        full = min(end, len(sequence.tokens)) // self.page_size
        if full > sequence.num_registered and self.enable_prefix_caching:
            keys = self._keys(sequence)
            for at in range(sequence.num_registered, full):
                if sequence.page_ids[at] != NULL_PAGE:
                    self.device.put(keys[at], sequence.page_ids[at])
            sequence.num_registered = full

    def leave_window(self, sequence: Sequence) -> None:
        """Gives back the pages that no later token of a sequence can read, and no fork of it that is still to come."""
        if self.sliding_window is None or not sequence.page_ids:
            return
        end = sequence.num_settled
        if any(not other.page_ids for other in sequence.group.active):
            end = min(end, sequence.num_prompt - 1)
        for at in range(min(self._num_unread(end), len(sequence.page_ids)) - 1, -1, -1):
            if sequence.page_ids[at] == NULL_PAGE:
                break
            self.pages.release_after([sequence.page_ids[at]], sequence.last_step)
            sequence.page_ids[at] = NULL_PAGE

    def release(self, sequence: Sequence) -> None:
        """Takes all pages, and places in host memory, from a sequence. The first pages of a text are evicted last."""
        self.pages.release_after(_without_null(reversed(sequence.page_ids)), sequence.last_step)
        if self.host is not None:
            self.host.pages.release(_without_null(reversed(sequence.host_ids)))
        self._clear(sequence)

    def follow(self, sequence: Sequence, parent: Sequence) -> None:
        """Gives a beam all that another one has computed, in place of its own; both go on from there."""
        self.pages.share(_without_null(parent.page_ids))
        if self.host is not None:
            self.host.pages.share(_without_null(parent.host_ids))
        self.release(sequence)
        sequence.page_ids = list(parent.page_ids)
        sequence.host_ids = list(parent.host_ids)
        sequence.page_keys = list(parent.page_keys)
        sequence.num_registered = parent.num_registered
        sequence.num_computed = parent.num_computed
        sequence.num_settled = parent.num_settled

    # ------------------------------------------------------------------------------------------------------------ host memory

    def swap_out(self, group: Group) -> bool:
        """Moves the pages of a group to host memory; does nothing and returns False if there is too little of it."""
        pages = set(_without_null(itertools.chain.from_iterable(sequence.page_ids for sequence in group.sequences)))
        host = self.host
        if host is None or len(pages) > host.pages.num_free:
            return False
        place_of = {NULL_PAGE: NULL_PAGE}
        for page_id in sorted(pages):
            key = self.device.key_of(page_id)
            place = None if key is None else host.find(key)
            if place is not None:
                host.pages.share([place])
                place_of[page_id] = place
        missing = sorted(pages - place_of.keys())
        for page_id, place in zip(missing, host.pages.take(len(missing)), strict=True):
            place_of[page_id] = place
            self._transfers.append(Transfer(True, page_id, place))
            if (key := self.device.key_of(page_id)) is not None:
                host.put(key, place)
        held = set(pages)
        for sequence in group.sequences:
            host_ids = [place_of[page_id] for page_id in sequence.page_ids]
            for page_id in _without_null(sequence.page_ids):
                if page_id in held:
                    held.remove(page_id)  # taking or finding the place made its first reader
                else:
                    host.pages.share([place_of[page_id]])
            self.release(sequence)
            sequence.host_ids = host_ids
        return True

    def swap_in(self, group: Group) -> None:
        """Brings the pages of a group back; there must be ``to_admit`` free pages."""
        host = self.host
        if host is None:
            return
        page_of: dict[int, int] = {NULL_PAGE: NULL_PAGE}
        places = list(dict.fromkeys(_without_null(itertools.chain.from_iterable(sequence.host_ids for sequence in group.sequences))))
        for place in places:
            page_id = self._on_device(place)
            if page_id is not None:
                self.pages.share([page_id])
                page_of[place] = page_id
        missing = [place for place in places if place not in page_of]
        host.pages.share(missing)
        page_of.update(zip(missing, self._restore(missing), strict=True))
        held = set(places)
        for sequence in group.sequences:
            for place in _without_null(sequence.host_ids):
                if place in held:
                    held.remove(place)
                else:
                    self.pages.share([page_of[place]])
            sequence.page_ids = [page_of[place] for place in sequence.host_ids]
            host.pages.release(_without_null(reversed(sequence.host_ids)))
            sequence.host_ids = []
            sequence.num_settled = sequence.num_computed

    # ------------------------------------------------------------------------------------------------------------ all at once

    def take_moves(self) -> tuple[tuple[Transfer, ...], tuple[PageCopy, ...]]:
        """Returns what the next step has to move first; call when it is planned."""
        moves = tuple(self._transfers), tuple(self._copies)
        for page_id, step in self._sources:
            self.pages.release_after([page_id], step)
        self._transfers, self._copies, self._sources = [], [], []
        return moves

    def forget(self, sequence: Sequence) -> None:
        """Forgets what a sequence computed: it holds no numbers."""
        for key in sequence.page_keys:
            self.device.forget(key)
            if self.host is not None:
                self.host.forget(key)

    def reset_prefix_cache(self, tenant: str | None = None) -> None:
        """Forgets the keys of one tenant, or all; pages that are read stay with their readers."""
        mark = b"" if tenant is None else tenant_mark(tenant)
        self.device.clear(mark)
        if self.host is not None:
            self.host.clear(mark)

    def lose(self, sequences: Iterable[Sequence]) -> None:
        """The device has lost all pages, and what it was about to move: nobody holds anything, here or in host memory.

        The books start anew, so it does not matter in the middle of what they were left.
        """
        for sequence in sequences:
            self._clear(sequence)
        self._transfers, self._copies, self._sources = [], [], []
        for tier in (self.device, self.host):
            if tier is not None:
                tier.reset()

    # ------------------------------------------------------------------------------------------------------------ the inside

    def _clear(self, sequence: Sequence) -> None:
        sequence.page_ids = []
        sequence.host_ids = []
        sequence.num_registered = 0
        sequence.num_settled = 0
        sequence.num_listed = 0

    def _keys(self, sequence: Sequence) -> list[Key]:
        if len(sequence.page_keys) < len(sequence.tokens) // self.page_size:
            request = sequence.request
            length = str(len(request.prompt)) if self._by_prompt_length else ""
            start = partition_key(request.tenant, ("prompt length", length))
            extend_keys(sequence.page_keys, start, sequence.tokens, self.page_size)
        return sequence.page_keys

    def _may_hit(self, sequence: Sequence) -> bool:
        """Whether a sequence may skip tokens that are cached; log-probabilities of a prompt need all of it computed."""
        return self.enable_prefix_caching and sequence.request.params.prompt_logprobs is None

    def _hits(self, sequence: Sequence, short_of: int = 0) -> _Hits:
        """Looks for the longest beginning of a sequence that is cached.

        Args:
            sequence: Whose tokens.
            short_of: Tokens at the end to leave out.
        """
        if not self._may_hit(sequence):
            return _Hits(0, [], [])
        keys = self._keys(sequence)[: (len(sequence.tokens) - short_of) // self.page_size]
        pages = self.device.longest(keys)
        places = self.host.longest(keys[len(pages) :]) if self.host is not None else []
        # Forks that are still to come begin at the prompt's last token.
        unread = self._num_unread(min((len(pages) + len(places)) * self.page_size, sequence.num_prompt - 1))
        return _Hits(unread, pages[unread:], places[max(0, unread - len(pages)) :])

    def _num_unread(self, position: int) -> int:
        """Returns how many pages at the beginning no token from this position on can read."""
        return 0 if self.sliding_window is None else max(0, position - self.sliding_window + 1) // self.page_size

    def _has_room_for_copy(self, sequence: Sequence, hits: _Hits) -> bool:
        """Whether there is a page more than needed, for a copy of the last page of a text that is cached whole."""
        idle = sum(not self._is_read(page_id) for page_id in hits.pages)
        return self.pages.num_free > self.num_pages(len(sequence.tokens)) - hits.num_unread - len(hits.pages) + idle

    def _to_fork(self, sequence: Sequence) -> int:
        """Returns how many pages of its own a sequence needs beside those of its prompt that it will share."""
        own = self.num_pages(len(sequence.tokens)) - (sequence.num_prompt - 1) // self.page_size
        return min(own, self.most_pages(len(sequence.tokens)))

    def _is_read(self, page_id: int) -> bool:
        """Whether a page has readers, so that sharing it takes no free page."""
        return self.pages.reference_count(page_id) > 0

    def _next_written(self, sequence: Sequence) -> int | None:
        """Returns the page of the sequence's own that its next token is written to; None if that page is not taken yet."""
        at = sequence.num_computed // self.page_size
        return sequence.page_ids[at] if at < len(sequence.page_ids) else None

    def _on_device(self, place: int) -> int | None:
        """Returns the page that holds the same as a place in host memory."""
        key = self.host.key_of(place) if self.host is not None else None
        return None if key is None else self.device.find(key)

    def _restore(self, places: Seq[int]) -> list[int]:
        """Brings places back, each of which somebody reads, and takes this reader away; returns their pages."""
        host = self.host
        if host is None:
            return []
        pages = self.pages.take(len(places))
        for place, page_id in zip(places, pages, strict=True):
            self._transfers.append(Transfer(False, page_id, place))
            if (key := host.key_of(place)) is not None:
                self.device.put(key, page_id)
            host.pages.release([place])
        return pages

    def _spill(self, key: Key, page_id: int) -> None:
        """Moves a page that is evicted to host memory, if there is any."""
        host = self.host
        if host is None:
            return
        place = host.find(key)
        if place is not None:
            host.pages.share([place])  # and put down again: now it was used last
        elif host.pages.num_free:
            (place,) = host.pages.take(1)
            host.put(key, place)
            self._transfers.append(Transfer(True, page_id, place))
        else:
            return
        host.pages.release([place])


def _without_null(page_ids: Iterable[int]) -> list[int]:
    return [page_id for page_id in page_ids if page_id != NULL_PAGE]
