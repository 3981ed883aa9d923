"""Pages of sequences, on the device and in host memory: random calls against a model whose pages are lists of what was written to them."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduling.simulation import make_request

from jaxpaged.scheduling.kv_memory import KVMemory
from jaxpaged.scheduling.pages import NULL_PAGE
from jaxpaged.scheduling.prefix_cache import tenant_mark
from jaxpaged.scheduling.request import Group, Sequence

MOST_GROUPS = 3
LONGEST = 30


def content(sequence: Sequence, position: int) -> tuple:
    """What a cell holds: all that it may depend on."""
    return (sequence.request.tenant, *sequence.tokens[: position + 1])


def owned(page_ids) -> list[int]:
    return [page_id for page_id in page_ids if page_id != NULL_PAGE]


class Model:
    """Makes the calls that a scheduler could make, writes what steps would write, and verifies all of it.

    A step is a number of rows, and what makes room for them: ``begin``, ``fork``, ``swap_in``, ``swap_out``, ``preempt``, ``append``
    collect them, ``step`` does them. Steps complete later, in their order, and pages are settled then.
    """

    def __init__(
        self, *, num_pages: int, page_size: int, places: int = 0, caching: bool = True, window: int | None = None, make=KVMemory
    ) -> None:
        self.memory = make(
            num_pages=num_pages,
            page_size=page_size,
            enable_prefix_caching=caching,
            num_host_pages=places,
            sliding_window=window,
            longest_chunk=LONGEST,
        )
        self.size, self.window = page_size, window
        self.cells: dict[int, list] = {page_id: [None] * page_size for page_id in range(num_pages)}
        self.places: dict[int, list] = {}
        self.groups: list[Group] = []
        self.rows: dict[Sequence, tuple[int, int]] = {}
        self.touched: set[Group] = set()
        self.unsettled: list[tuple[int, Sequence, int, int]] = []
        self.dispatched = self.completed = self.number = 0
        self.fresh = 2
        self.forgot = False

    # ----------------------------------------------------------------------------------------------------- inside a step

    def begin(self, tenant: str, tokens: list[int], n: int) -> None:
        """A request comes, and is admitted if it fits."""
        if len(self.groups) >= MOST_GROUPS:
            return
        self.number += 1
        request = make_request(f"r{self.number}", len(tokens), 99, tenant=tenant, n=n)
        object.__setattr__(request, "prompt", tuple(tokens))
        group = Group(request)
        group.sequences += [Sequence(group, index) for index in range(n)]
        self.groups.append(group)
        self.readmit(len(self.groups) - 1)

    def readmit(self, number: int) -> None:
        """A request that has no pages begins, or is swapped in, if it fits."""
        group, memory = self.groups[number], self.memory
        if group in self.touched or any(sequence.page_ids for sequence in group.sequences):
            return
        if memory.to_admit(group) > memory.pages.num_free:
            return
        self.touched.add(group)
        if any(sequence.host_ids for sequence in group.sequences):
            memory.swap_in(group)
            return
        leader = group.sequences[0]
        found = self.find(leader)
        memory.begin(leader)
        assert leader.num_computed < len(leader.tokens)
        assert leader.num_computed >= min(found, len(leader.tokens) - self.size), "a page that is known was not found"
        self.compute(leader, len(leader.tokens))

    def fork(self, number: int) -> None:
        """Samples without pages get those of the prompt."""
        group = self.groups[number]
        source = next((each for each in group.sequences if each.page_ids), None)
        if source is None or source in self.rows or source.num_computed < source.num_prompt:
            return
        for sequence in group.sequences:
            if not sequence.page_ids:
                self.memory.fork(sequence, source)
                self.touched.add(group)

    def append(self, number: int, index: int, count: int) -> None:
        """A sequence computes its next tokens, known ones and new ones, if there is room."""
        sequence = self.sequence(number, index)
        if sequence.page_ids and sequence not in self.rows:
            self.compute(sequence, count)

    def compute(self, sequence: Sequence, count: int) -> None:
        """Takes the pages of a row, if there is room."""
        end = min(sequence.num_computed + count, LONGEST)
        end = end if sequence.num_computed >= len(sequence.tokens) - 1 else min(end, len(sequence.tokens))
        if end <= sequence.num_computed or self.memory.shortfall([(sequence, end)]) > self.memory.pages.num_free:
            return
        while len(sequence.tokens) < end:
            self.fresh += 1
            sequence.tokens.append(self.fresh % 3)
        known = len(self.known())
        room = self.memory.host.pages.num_free - self.memory.host.pages.num_cached if self.memory.host else 0
        self.memory.grow(sequence, end)
        if room >= 3 + self.memory.num_pages(end):
            assert len(self.known()) >= known, "a page was evicted and not moved to host memory, though there is room"
        for at in range(sequence.num_computed // self.size, -(-end // self.size)):
            assert not self.memory.pages.is_kept(sequence.page_ids[at]), "a page that others can find is written"
        self.rows[sequence] = (sequence.num_computed, end)
        self.touched.add(sequence.group)
        sequence.num_computed = end
        sequence.num_listed = len(sequence.page_ids)
        sequence.last_step = self.dispatched + 1

    def preempt(self, number: int, swap: bool) -> None:
        """A request gives its pages back, or moves them to host memory."""
        group = self.groups[number]
        if group in self.touched or not any(sequence.page_ids for sequence in group.sequences):
            return
        self.unsettled = [entry for entry in self.unsettled if entry[1].group is not group]
        if swap and self.memory.swap_out(group):
            return
        for sequence in group.sequences:
            self.release(sequence)

    # -------------------------------------------------------------------------------------------------- between two steps

    def step(self) -> None:
        """The device does what was collected: transfers, copies, then writes."""
        transfers, copies = self.memory.take_moves()
        for to_host, page_id, place in transfers:
            if to_host:
                self.places[place] = list(self.cells[page_id])
            else:
                self.cells[page_id] = list(self.places[place])
        assert {copy.source for copy in copies}.isdisjoint(copy.destination for copy in copies)
        for destination, cells in [(copy.destination, list(self.cells[copy.source])) for copy in copies]:
            self.cells[destination] = cells
        self.dispatched += 1
        for sequence, (start, end) in self.rows.items():
            for position in range(start, end):
                self.cells[sequence.page_ids[position // self.size]][position % self.size] = content(sequence, position)
            self.unsettled.append((self.dispatched, sequence, start, end))
        self.rows.clear()
        self.touched.clear()
        self.verify()

    def complete(self) -> None:
        """The oldest step in flight is complete; what it computed is settled. Never while a plan is made."""
        if self.completed < self.dispatched and not self.rows and not self.touched:
            self.completed += 1
            self.memory.pages.complete(self.completed)
            due = [entry for entry in self.unsettled if entry[0] <= self.completed]
            self.unsettled = [entry for entry in self.unsettled if entry[0] > self.completed]
            for _, sequence, start, end in due:
                self.memory.settle(sequence, end)
                kept = [cells for page_id, cells in self.cells.items() if self.memory.pages.is_kept(page_id)]
                for at in range(start // self.size, end // self.size if self.memory.enable_prefix_caching else 0):
                    cells = [content(sequence, position) for position in range(at * self.size, (at + 1) * self.size)]
                    # Another page of the same text may have gone since, or been forgotten with one that had no numbers.
                    gone = self.forgot or (sequence.index > 0 and at < sequence.num_prompt // self.size)
                    assert cells in kept or gone or NULL_PAGE in sequence.page_ids, "a page that is settled cannot be found"

    def finish(self, number: int, index: int) -> None:
        """A sequence ends."""
        sequence = self.sequence(number, index)
        if self.rows or self.touched:
            self.step()
        self.unsettled = [entry for entry in self.unsettled if entry[1] is not sequence]
        self.release(sequence)
        sequence.group.sequences.remove(sequence)
        if not sequence.group.sequences:
            self.groups.remove(sequence.group)

    def forget(self, number: int, index: int) -> None:
        """A sequence had no numbers: nobody finds its pages any more."""
        sequence = self.sequence(number, index)
        keys = list(sequence.page_keys)
        self.forgot = True
        self.memory.forget(sequence)
        assert not self.memory.device.longest(keys)
        self.finish(number, index)

    def follow(self, number: int, index: int, parent: int) -> None:
        """A beam goes on as another one."""
        child, parent = self.sequence(number, index), self.sequence(number, parent)
        settled = not any(entry[1] in (child, parent) for entry in self.unsettled)
        if child is parent or self.rows or self.touched or not settled or not parent.page_ids or not child.page_ids:
            return
        child.tokens = list(parent.tokens)
        child.page_keys.clear()
        self.memory.follow(child, parent)

    def reset(self, tenant: str | None = None) -> None:
        """Everything that is cached, or all of one tenant, is forgotten, and nothing else."""
        known = self.known()
        self.memory.reset_prefix_cache(tenant)
        assert self.known() == {key for key in known if tenant is not None and not key.startswith(tenant_mark(tenant))}
        if tenant is None:
            assert self.memory.pages.num_cached == 0

    def lose(self) -> None:
        """A step failed and took the pool with it."""
        self.rows.clear()
        self.touched.clear()
        self.unsettled.clear()
        self.completed = self.dispatched
        sequences = [sequence for group in self.groups for sequence in group.sequences]
        for sequence in sequences:
            sequence.num_computed = 0
        self.memory.lose(sequences)
        self.memory.pages.complete(self.completed)
        self.cells = {page_id: [None] * self.size for page_id in self.cells}
        self.places.clear()
        assert self.memory.pages.num_free == self.memory.pages.num_pages - 1

    def leave_window(self, number: int, index: int) -> None:
        """A sequence gives back what it cannot see any more."""
        if not self.rows and not self.touched:
            self.memory.leave_window(self.sequence(number, index))

    # --------------------------------------------------------------------------------------------------------- questions

    def sequence(self, number: int, index: int) -> Sequence:
        sequences = self.groups[number].sequences
        return sequences[index % len(sequences)]

    def release(self, sequence: Sequence) -> None:
        """Takes a sequence's pages; those of them that are cached at once go to the end of the line, the text's head last."""
        before = set(self.memory.pages._cached)
        page_ids = list(sequence.page_ids)
        self.memory.release(sequence)
        sequence.num_computed = 0
        line = [page_ids.index(page_id) for page_id in self.memory.pages._cached if page_id not in before]
        assert line == sorted(line, reverse=True), "the head of a text is evicted before its tail"

    def find(self, sequence: Sequence) -> int:
        """Returns how many tokens of a sequence are known, by looking into every page; the head on the device, then in host memory."""
        if not self.memory.enable_prefix_caching:
            return 0
        device = [self.cells[page_id] for page_id in self.cells if self.memory.pages.is_kept(page_id)] if not self.memory._transfers else []
        host, tier = self.memory.host, device
        count = 0
        while count + self.size <= len(sequence.tokens):
            wanted = [content(sequence, position) for position in range(count, count + self.size)]
            if wanted not in tier and host is not None and tier is device and not self.memory._transfers:
                tier = [cells for place, cells in self.places.items() if host.pages.is_kept(place)]
            if wanted not in tier:
                break
            count += self.size
        return count

    def known(self) -> set[bytes]:
        """Returns the keys of the texts that are known, here or there."""
        tiers = [tier for tier in (self.memory.device, self.memory.host) if tier is not None]
        return set().union(*(tier._page_of for tier in tiers))

    def verify(self) -> None:
        """Verifies the books, and every cell of every sequence that it can still see."""
        memory = self.memory
        if self.rows or self.touched:
            return  # in the middle of a plan
        sequences = [sequence for group in self.groups for sequence in group.sequences]
        memory.pages.check(owned(sequence.page_ids) for sequence in sequences)
        if memory.host is not None:
            memory.host.pages.check(owned(sequence.host_ids) for sequence in sequences)
        if memory._transfers:
            return  # swapped out since the last step
        for sequence in sequences:
            held, where = (sequence.host_ids, self.places) if sequence.host_ids else (sequence.page_ids, self.cells)
            first = 0 if self.window is None else max(0, sequence.num_computed - self.window + 1)
            for position in range(first, sequence.num_computed):
                assert where[held[position // self.size]][position % self.size] == content(sequence, position)
            at, left = divmod(sequence.num_computed, self.size)
            assert len(held) >= at + (left > 0)

    def drain(self) -> None:
        """Ends everything; nothing is left."""
        self.step()
        while self.groups:
            self.finish(0, 0)
        self.memory.pages.flush()
        self.verify()
        pages, host = self.memory.pages, self.memory.host
        assert pages.num_free == pages.num_pages - 1
        assert host is None or host.pages.num_free == host.pages.num_pages - 1


TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=12)


class KVMemoryMachine(RuleBasedStateMachine):
    """Any order of calls that a scheduler could make."""

    @initialize(
        num_pages=st.integers(3, 12),
        page_size=st.integers(1, 4),
        places=st.sampled_from((0, 0, 2, 8, 20)),
        caching=st.sampled_from((True, True, True, False)),
        window=st.sampled_from((None, None, None, 2, 5)),
    )
    def start(self, num_pages, page_size, places, caching, window):
        self.model = Model(num_pages=num_pages, page_size=page_size, places=places, caching=caching, window=window)

    def draw_group(self, data) -> int:
        return data.draw(st.integers(0, len(self.model.groups) - 1))

    @rule(tenant=st.sampled_from("ab"), tokens=TEXTS, n=st.integers(1, 3))
    def begin(self, tenant, tokens, n):
        self.model.begin(tenant, tokens, n)

    @precondition(lambda self: self.model.groups)
    @rule(data=st.data())
    def readmit(self, data):
        self.model.readmit(self.draw_group(data))

    @precondition(lambda self: self.model.groups)
    @rule(data=st.data())
    def fork(self, data):
        self.model.fork(self.draw_group(data))

    @precondition(lambda self: self.model.groups)
    @rule(data=st.data(), index=st.integers(0, 2), count=st.integers(1, 9))
    def append(self, data, index, count):
        self.model.append(self.draw_group(data), index, count)

    @precondition(lambda self: self.model.groups)
    @rule(data=st.data(), swap=st.booleans())
    def preempt(self, data, swap):
        self.model.preempt(self.draw_group(data), swap)

    @rule()
    def step(self):
        self.model.step()

    @rule()
    def complete(self):
        self.model.complete()

    @precondition(lambda self: self.model.groups)
    @rule(data=st.data(), index=st.integers(0, 2), forget=st.booleans())
    def finish(self, data, index, forget):
        (self.model.forget if forget else self.model.finish)(self.draw_group(data), index)

    @precondition(lambda self: self.model.groups)
    @rule(data=st.data(), index=st.integers(0, 2), parent=st.integers(0, 2))
    def follow(self, data, index, parent):
        self.model.follow(self.draw_group(data), index, parent)

    @precondition(lambda self: self.model.groups)
    @rule(data=st.data(), index=st.integers(0, 2))
    def leave_window(self, data, index):
        self.model.leave_window(self.draw_group(data), index)

    @rule(tenant=st.sampled_from((None, "a", "b")))
    def reset(self, tenant):
        self.model.reset(tenant)

    @rule()
    def lose(self):
        self.model.lose()

    @invariant()
    def books_balance_and_cells_are_right(self):
        if hasattr(self, "model"):
            self.model.verify()

    def teardown(self):
        if hasattr(self, "model"):
            self.model.drain()


TestKVMemoryMachine = KVMemoryMachine.TestCase
TestKVMemoryMachine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None, derandomize=True)


def random_memory_calls(seed: int, calls: int, *, make=KVMemory) -> None:
    """Makes random calls, many that fill the pool and few that empty it; what is left at the end is ended."""
    rng = random.Random(seed)
    model = Model(
        num_pages=rng.choice((4, 9, 14, 20)),
        page_size=rng.choice((1, 2, 3)),
        places=rng.choice((0, 3, 8, 40)),
        caching=rng.random() < 0.8,
        window=rng.choice((None, None, None, 3)),
        make=make,
    )
    for _ in range(calls):
        kind = rng.random()
        some = rng.randrange(len(model.groups)) if model.groups else 0
        if kind < 0.1 or not model.groups:
            model.begin(rng.choice("ab"), [rng.randrange(2) for _ in range(rng.randint(1, 9))], rng.choice((1, 1, 2, 3)))
        elif kind < 0.2:
            model.readmit(some)
        elif kind < 0.3:
            model.fork(some)
        elif kind < 0.58:
            model.append(some, rng.randrange(3), rng.randint(1, 6))
        elif kind < 0.63:
            model.preempt(some, rng.random() < 0.6)
        elif kind < 0.75:
            model.step()
        elif kind < 0.9:
            model.complete()
        elif kind < 0.95:
            model.finish(some, rng.randrange(3))
        elif kind < 0.96:
            model.forget(some, rng.randrange(3))
        elif kind < 0.98:
            model.follow(some, rng.randrange(3), rng.randrange(3))
        elif kind < 0.995:
            model.leave_window(some, rng.randrange(3))
        else:
            (model.reset if rng.random() < 0.5 else model.lose)()
        model.verify()
    model.drain()


def test_a_hundred_thousand_random_calls():
    for seed in range(200):
        random_memory_calls(seed, 500)


@pytest.mark.slow
def test_a_million_random_calls():
    for seed in range(200, 2200):
        random_memory_calls(seed, 500)
