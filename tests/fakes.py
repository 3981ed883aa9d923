"""Stand-ins for the expensive parts, shared by all tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Sequence_

from jaxpaged.scheduling.beams import BeamSearch, Hypothesis
from jaxpaged.scheduling.plan import FEEDBACK, INVALID_TOKEN, BeamCandidate, StepPlan, StepResult, TokenLogprobs, Work
from jaxpaged.scheduling.request import Request, Sequence

POISON = -7
"""What a fake page holds in cells that nobody owns."""


class Violation(AssertionError):
    """The fake device was asked to do, or found, something that can never be right."""


class DeviceFault(RuntimeError):
    """What a failing step raises."""


def cell_value(previous: int, token: int, position: int) -> int:
    """The "key and value" of a token: depends on all tokens before it."""
    return hash((previous, token, position))


def next_token(cells: list[int], seed: int, outputs: int, vocab_size: int) -> int:
    """The "model and sampler": depends on every cell that attention reads, on the seed, and on the slot's state."""
    return hash((tuple(cells), seed, outputs)) % vocab_size


def first_cell(request: Request, by_prompt_length: bool = False) -> int:
    """What stands before the first token: cells of requests that must not share pages have nothing in common."""
    return hash((sum(map(ord, request.tenant)), len(request.prompt) if by_prompt_length else 0))


def cells_of(first: int, tokens: Iterable[int]) -> list[int]:
    """Returns the cells of a text."""
    cells: list[int] = []
    for position, token in enumerate(tokens):
        cells.append(cell_value(cells[-1] if cells else first, token, position))
    return cells


def visible(cells: list[int], window: int | None) -> list[int]:
    """Returns the cells that the last token sees."""
    return cells if window is None else cells[-window:]


def golden_tokens(request: Request, index: int, vocab_size: int, *, first: int | None = None, window: int | None = None) -> list[int]:
    """What FakeRunner must generate for a sample, computed without pages, steps or slots."""
    outputs = 0
    cells = cells_of(first_cell(request) if first is None else first, request.prompt)
    generated: list[int] = []
    while len(generated) < request.max_tokens:
        token = next_token(visible(cells, window), request.seed + index, outputs, vocab_size)
        generated.append(token)
        outputs = hash((outputs, token))
        if token in request.stop_token_ids and len(generated) > request.params.min_tokens:
            break
        cells.append(cell_value(cells[-1], token, len(cells)))
    return generated


def beam_candidates(beams: Sequence_[tuple[list[int], float]], vocab_size: int) -> tuple[BeamCandidate, ...]:
    """The "log-probabilities" of all next tokens of some beams, the best of them: from the cells that each sees and its score."""
    found = []
    for parent, (cells, score) in enumerate(beams):
        state = hash(tuple(cells))
        for token in range(vocab_size):
            found.append(BeamCandidate(parent, token, score - (hash((state, token)) % 2**40) / 2**38))
    return tuple(sorted(found, key=lambda each: -each.score)[:20])


def golden_beams(request: Request, vocab_size: int, *, first: int = 0, window: int | None = None) -> tuple[Hypothesis, ...]:
    """What FakeRunner's beam search must find, computed without pages, steps or slots."""
    params = request.params
    search = BeamSearch(
        width=params.num_sequences,
        max_tokens=request.max_tokens,
        stop_token_ids=request.stop_token_ids,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        min_tokens=params.min_tokens,
    )
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    while not search.done:
        rows = [(visible(cells_of(first, [*request.prompt, *output]), window), score) for output, score in beams]
        following = search.advance([output for output, _ in beams], beam_candidates(rows, vocab_size))
        beams = [([*beams[each.parent][0], each.token_id], each.score) for each in following]
    return search.results(params.n)


@dataclasses.dataclass
class _Slot:
    """Per-slot device state: whose it is, its seed, and the running hash of what it sampled."""

    owner: Sequence
    seed: int
    outputs: int = 0
    last_token: int = POISON
    table: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class FakeHandle:
    """A dispatched step; ``read`` waits for it."""

    runner: FakeRunner
    plan: StepPlan
    result: StepResult
    writes: list[tuple[int, int, int]]
    slots: list[tuple[int, Sequence]]
    fault: Exception | None

    def read(self) -> StepResult:
        """Returns the step's result; completes the step."""
        return self.runner.complete(self)


class FakeRunner:
    """A device whose model is a hash: any wrong page, cell, slot, position or order changes the tokens.

    Steps execute in dispatch order. Until a step is read it may still touch what it was given: its writes are repeated when it
    completes, and a slot that changed hands in the meantime is spoilt. So a page or a slot that is reused too early is seen.

    Attributes:
        cells: ``[num_pages][page_size]`` values.
        host: Values of the places in host memory that hold a page.
        in_flight: Handles that were not read, oldest first.
        fails: Asked before each step; True makes ``read`` of this step raise.
        invalid: Asked for each sampling row; True makes its token INVALID_TOKEN.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        vocab_size: int = 50,
        window: int | None = None,
        by_prompt_length: bool = False,
        fails: Callable[[StepPlan], bool] = lambda plan: False,
        invalid: Callable[[Sequence, int], bool] = lambda sequence, num_output: False,
    ) -> None:
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.window = window
        self.by_prompt_length = by_prompt_length
        self.host: dict[int, list[int]] = {}
        self.cells = [[POISON] * page_size for _ in range(num_pages)]
        self.slots: dict[int, _Slot] = {}
        self.in_flight: list[FakeHandle] = []
        self.fails = fails
        self.invalid = invalid

    def reset(self) -> None:
        """Makes a new pool after a failed step."""
        for page in self.cells:
            page[:] = [POISON] * self.page_size
        self.host.clear()
        self.slots.clear()
        self.in_flight.clear()

    def dispatch(self, plan: StepPlan) -> FakeHandle:
        """Starts a step."""
        fault = DeviceFault(f"step {plan.step} failed") if self.fails(plan) else None
        writes: list[tuple[int, int, int]] = []
        tokens: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        prompt_logprobs: list[tuple[TokenLogprobs, ...]] = []
        beams: dict[str, list[tuple[list[int], float]]] = {}
        self._move(plan)
        for work in plan.work:
            self._list_pages(work)
        for work in plan.work:
            sequence = work.sequence
            params = sequence.request.params
            tokens.append(self._run_row(work, writes, beams))
            logprobs.append(None if params.logprobs is None or not work.samples else _fake_logprobs(tokens[-1], work.end))
            wanted = range(work.start, min(work.end, sequence.num_prompt - 1)) if params.prompt_logprobs is not None else ()
            prompt_logprobs.append(tuple(_fake_logprobs(sequence.tokens[position + 1], position + 1) for position in wanted))
        slots = [(_slot_of(work), work.sequence) for work in plan.work]
        candidates = {request_id: beam_candidates(rows, self.vocab_size) for request_id, rows in beams.items()}
        handle = FakeHandle(self, plan, StepResult(tokens, logprobs, prompt_logprobs, candidates), writes, slots, fault)
        self.in_flight.append(handle)
        return handle

    def complete(self, handle: FakeHandle) -> StepResult:
        """Ends the oldest step in flight."""
        if not self.in_flight or self.in_flight[0] is not handle:
            raise Violation(f"step {handle.plan.step} was read out of order, twice, or after a reset")
        self.in_flight.pop(0)
        for page_id, offset, value in handle.writes:
            self.cells[page_id][offset] = value
        for index, sequence in handle.slots:
            slot = self.slots.get(index)
            if slot is not None and slot.owner is not sequence:
                slot.last_token = slot.outputs = POISON
        if handle.fault is not None:
            raise handle.fault
        return handle.result

    def _move(self, plan: StepPlan) -> None:
        """Transfers in their order, then copies: all are read before any is written."""
        for to_host, page_id, place in plan.transfers:
            if to_host:
                self.host[place] = list(self.cells[page_id])
            elif place in self.host:
                self.cells[page_id] = list(self.host[place])
            else:
                raise Violation(f"place {place} in host memory holds nothing")
        copied = [list(self.cells[source]) for source, _ in plan.copies]
        for (_, destination), content in zip(plan.copies, copied, strict=True):
            self.cells[destination] = content

    def _list_pages(self, work: Work) -> None:
        """Keeps the slot's block table as the real runner does: only what a plan says is new is read."""
        sequence = work.sequence
        if work.new_slot:
            outputs = 0
            for token in sequence.tokens[sequence.num_prompt :]:
                outputs = hash((outputs, token))
            self.slots[_slot_of(work)] = _Slot(sequence, sequence.request.seed + sequence.index, outputs)
        slot = self.slots.get(_slot_of(work))
        if slot is None or slot.owner is not sequence:
            raise Violation("a slot's state was not written")
        slot.table[work.table_start :] = sequence.page_ids[work.table_start :]

    def _run_row(self, work: Work, writes: list[tuple[int, int, int]], beams: dict[str, list[tuple[list[int], float]]]) -> int:
        """Writes the row's cells, reads all that its sequence sees, and samples."""
        sequence, size = work.sequence, self.page_size
        slot = self.slots[_slot_of(work)]
        table = slot.table
        if len(table) * size < work.end or not all(0 <= page_id < len(self.cells) for page_id in table):
            raise Violation(f"the block table {table} does not cover {work.end} tokens")
        first = first_cell(sequence.request, self.by_prompt_length)
        last = self.cells[table[(work.start - 1) // size]][(work.start - 1) % size] if work.start else first
        for position, known in enumerate(work.token_ids(), start=work.start):
            token = slot.last_token if known == FEEDBACK else known
            last = cell_value(last, token, position)
            if table[position // size] == 0:
                raise Violation("a token is written to the null page")
            writes.append((table[position // size], position % size, last))
            self.cells[table[position // size]][position % size] = last
        if not work.samples:
            return INVALID_TOKEN
        cells = visible([cell for page_id in table for cell in self.cells[page_id]][: work.end], self.window)
        if work.beam_score is not None:
            beams.setdefault(sequence.request.id, []).append((cells, work.beam_score))
        token = next_token(cells, slot.seed, slot.outputs, self.vocab_size)
        slot.last_token = token
        slot.outputs = hash((slot.outputs, token))
        return INVALID_TOKEN if self.invalid(sequence, work.num_output) else token


def _slot_of(work: Work) -> int:
    if work.sequence.slot is None:
        raise Violation("a sequence without a slot is in a plan")
    return work.sequence.slot


def _fake_logprobs(token_id: int, position: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -float(position), 1)
