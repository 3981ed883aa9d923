"""The systems before paging: one contiguous run of memory for each sequence, reserved when its request is let in.

They are what section 6.1 of the PagedAttention paper (arXiv 2309.06180) calls Orca (Max), (Pow2) and (Oracle): iteration-level
scheduling with a run as long as the longest context, as the prompt and the next power of two above the answer, or exactly as long as
it turns out.
To their advantage, a run is found by first fit by default (a buddy allocator also rounds each run up), nothing is ever preempted, the
prompt of several samples is computed once, and its copies cost nothing.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Protocol

from jaxpaged.memory.arrivals import Arrivals
from jaxpaged.memory.ledger import Sample
from jaxpaged.memory.workloads import Call, Workload


class NeverFitsError(Exception):
    """A request cannot be let in although nothing runs; its text says what would have to fit."""


class Runs(Protocol):
    """Finds and frees contiguous runs of cells."""

    def take(self, size: int) -> tuple[int, int] | None:
        """Returns the start and the size of a run of at least ``size`` cells, which is taken; None if there is none."""
        ...

    def free(self, start: int, size: int) -> None:
        """Gives back what ``take`` returned."""
        ...


class FirstFit:
    """Takes the lowest free run that is long enough; neighbours that are free are one run."""

    def __init__(self, num_cells: int) -> None:
        self._free = [(0, num_cells)]

    def take(self, size: int) -> tuple[int, int] | None:
        """Returns a run of exactly ``size`` cells."""
        for index, (start, length) in enumerate(self._free):
            if length >= size:
                self._free[index : index + 1] = [(start + size, length - size)] if length > size else []
                return start, size
        return None

    def free(self, start: int, size: int) -> None:
        """Gives a run back."""
        index = bisect.bisect(self._free, (start, 0))
        end = start + size
        if index < len(self._free) and self._free[index][0] == end:
            end += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == start:
            index -= 1
            start = self._free.pop(index)[0]
        self._free.insert(index, (start, end - start))


class Buddy:
    """Takes powers of two, split from and joined with their other halves (Knowlton 1965; Knuth, volume 1, section 2.5).

    A memory that is no power of two is a row of arenas, one for each bit of its size, largest first.
    """

    def __init__(self, num_cells: int) -> None:
        self._arenas: list[tuple[int, int]] = []
        start = 0
        for order in reversed(range(num_cells.bit_length())):
            if num_cells >> order & 1:
                self._arenas.append((start, 1 << order))
                start += 1 << order
        self._free: dict[int, set[int]] = {1 << order: set() for order in range(num_cells.bit_length())}
        for start, size in self._arenas:
            self._free[size].add(start)

    def take(self, size: int) -> tuple[int, int] | None:
        """Returns the lowest of the smallest free blocks that are large enough, cut to the next power of two above ``size``."""
        wanted = 1 << (size - 1).bit_length()
        block = next((each for each in sorted(self._free) if each >= wanted and self._free[each]), None)
        if block is None:
            return None
        start = min(self._free[block])
        self._free[block].remove(start)
        while block > wanted:
            block //= 2
            self._free[block].add(start + block)
        return start, wanted

    def free(self, start: int, size: int) -> None:
        """Gives a block back and joins it with its buddy as long as that is free too."""
        base, arena = next((base, arena) for base, arena in self._arenas if base <= start < base + arena)
        while size < arena:
            buddy = base + ((start - base) ^ size)
            if buddy not in self._free[size]:
                break
            self._free[size].remove(buddy)
            start = min(start, buddy)
            size *= 2
        self._free[size].add(start)


FINDERS: dict[str, Callable[[int], Runs]] = {"first-fit": FirstFit, "buddy": Buddy}
"""How a run is found, by name."""


def reserve_most(call: Call, max_model_len: int) -> int:
    """Returns the longest context: the system knows nothing of the answer."""
    return max_model_len


def reserve_power(call: Call, max_model_len: int) -> int:
    """Returns the prompt and the next power of two above the answer: the system guesses the answer within a factor of two."""
    return min(max_model_len, len(call.prompt) + (1 << (len(call.output) - 1).bit_length()))


def reserve_true(call: Call, max_model_len: int) -> int:
    """Returns what the sequence will hold in the end: the system knows the future."""
    return call.num_tokens


RESERVATIONS: dict[str, Callable[[Call, int], int]] = {"max": reserve_most, "pow2": reserve_power, "oracle": reserve_true}
"""How long a run is reserved, by name."""


@dataclasses.dataclass
class _Running:
    place: int
    call: Call
    runs: list[tuple[int, int]]
    computed: int = 0


class ContiguousSystem:
    """Continuous batching over contiguous runs, first come, first served, with the scheduler's bounds on a step."""

    def __init__(
        self,
        workload: Workload,
        *,
        runs: Runs,
        reservation: Callable[[Call, int], int],
        num_sequences: int,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        self._calls = workload.calls
        self._arrivals = Arrivals(workload)
        self._runs = runs
        self._reservation = reservation
        self._num_sequences = num_sequences
        self._max_model_len = max_model_len
        self._max_num_seqs = max_num_seqs
        self._budget = max_num_batched_tokens
        self._waiting: deque[int] = deque()
        self._running: list[_Running] = []

    def replay(self) -> list[Sample]:
        """Answers all calls; returns what was measured in each step.

        Raises:
            NeverFitsError: The memory is too small for a reservation.
        """
        samples = []
        self._waiting.extend(self._arrivals.due())
        while self._waiting or self._running:
            samples.append(self._step())
            self._leave()
            self._waiting.extend(self._arrivals.due())
        return samples

    def _step(self) -> Sample:
        budget = self._budget
        for index, each in enumerate(self._running):
            budget -= self._compute(each, budget - (len(self._running) - index - 1) * self._num_sequences)
        waits = False
        while self._waiting and budget > 0 and (len(self._running) + 1) * self._num_sequences <= self._max_num_seqs:
            newcomer = self._let_in(self._waiting[0])
            if newcomer is None:
                waits = True
                if not self._running:
                    size = self._reservation(self._calls[self._waiting[0]], self._max_model_len)
                    raise NeverFitsError(f"{self._num_sequences} x {size:,} tokens do not fit")
                break
            self._waiting.popleft()
            self._running.append(newcomer)
            budget -= self._compute(newcomer, budget)
        return self._measure(waits)

    def _compute(self, each: _Running, budget: int) -> int:
        """Computes the next tokens of a request; returns how many the step has to hold for them."""
        left = len(each.call.prompt) - each.computed
        if left > 0:
            count = min(left, max(0, budget))
            each.computed += count
            return count
        each.computed += 1
        return self._num_sequences

    def _let_in(self, place: int) -> _Running | None:
        size = self._reservation(self._calls[place], self._max_model_len)
        runs: list[tuple[int, int]] = []
        while len(runs) < self._num_sequences:
            run = self._runs.take(size)
            if run is None:
                for taken in runs:
                    self._runs.free(*taken)
                return None
            runs.append(run)
        return _Running(place, self._calls[place], runs)

    def _leave(self) -> None:
        for each in self._running:
            if each.computed >= each.call.num_tokens:
                self._arrivals.answered(each.place)
                for run in each.runs:
                    self._runs.free(*run)
        self._running = [each for each in self._running if each.computed < each.call.num_tokens]

    def _measure(self, waits: bool) -> Sample:
        copies = self._num_sequences
        allocated = sum(size for each in self._running for _, size in each.runs)
        tokens = copies * sum(each.computed for each in self._running)
        to_come = copies * sum(each.call.num_tokens - each.computed for each in self._running)
        return Sample(tokens, to_come, allocated, allocated, len(self._running), waits)
