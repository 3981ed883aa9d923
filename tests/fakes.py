"""Stand-ins for the expensive parts, shared by all tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxpaged.scheduling.plan import FEEDBACK, INVALID_TOKEN, StepPlan, StepResult, TokenLogprobs, Work
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


def golden_tokens(request: Request, index: int, vocab_size: int) -> list[int]:
    """What FakeRunner must generate for a sample, computed without pages, steps or slots."""
    cells: list[int] = []
    outputs = 0
    tokens = list(request.prompt)
    for position, token in enumerate(tokens):
        cells.append(cell_value(cells[-1] if cells else 0, token, position))
    generated: list[int] = []
    while len(generated) < request.max_tokens:
        token = next_token(cells, request.seed + index, outputs, vocab_size)
        generated.append(token)
        outputs = hash((outputs, token))
        if token in request.stop_token_ids and len(generated) > request.params.min_tokens:
            break
        cells.append(cell_value(cells[-1], token, len(tokens)))
        tokens.append(token)
    return generated


@dataclasses.dataclass
class _Slot:
    """Per-slot device state: whose it is, its seed, and the running hash of what it sampled."""

    owner: Sequence
    seed: int
    outputs: int = 0
    last_token: int = POISON


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
        fails: Callable[[StepPlan], bool] = lambda plan: False,
        invalid: Callable[[Sequence, int], bool] = lambda sequence, num_output: False,
    ) -> None:
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.cells = [[POISON] * page_size for _ in range(num_pages)]
        self.slots: dict[int, _Slot] = {}
        self.in_flight: list[FakeHandle] = []
        self.fails = fails
        self.invalid = invalid

    def reset(self) -> None:
        """Makes a new pool after a failed step."""
        for page in self.cells:
            page[:] = [POISON] * self.page_size
        self.slots.clear()
        self.in_flight.clear()

    def dispatch(self, plan: StepPlan) -> FakeHandle:
        """Starts a step."""
        fault = DeviceFault(f"step {plan.step} failed") if self.fails(plan) else None
        writes: list[tuple[int, int, int]] = []
        tokens: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        prompt_logprobs: list[tuple[TokenLogprobs, ...]] = []
        for work in plan.work:
            sequence = work.sequence
            params = sequence.request.params
            tokens.append(self._run_row(work, writes))
            logprobs.append(None if params.logprobs is None or not work.samples else _fake_logprobs(tokens[-1], work.end))
            wanted = range(work.start, min(work.end, sequence.num_prompt - 1)) if params.prompt_logprobs is not None else ()
            prompt_logprobs.append(tuple(_fake_logprobs(sequence.tokens[position + 1], position + 1) for position in wanted))
        slots = [(_slot_of(work), work.sequence) for work in plan.work]
        handle = FakeHandle(self, plan, StepResult(tokens, logprobs, prompt_logprobs), writes, slots, fault)
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

    def _run_row(self, work: Work, writes: list[tuple[int, int, int]]) -> int:
        """Writes the row's cells, reads all of its sequence, and samples."""
        sequence, table, size = work.sequence, work.sequence.page_ids, self.page_size
        if work.new_slot:
            outputs = 0
            for token in sequence.tokens[sequence.num_prompt :]:
                outputs = hash((outputs, token))
            self.slots[_slot_of(work)] = _Slot(sequence, sequence.request.seed + sequence.index, outputs)
        slot = self.slots[_slot_of(work)]
        if len(table) * size < work.end or not all(0 < page_id < len(self.cells) for page_id in table):
            raise Violation(f"the block table {table} does not cover {work.end} tokens")
        last = self.cells[table[(work.start - 1) // size]][(work.start - 1) % size] if work.start else 0
        for position, known in enumerate(work.token_ids(), start=work.start):
            token = slot.last_token if known == FEEDBACK else known
            last = cell_value(last, token, position)
            writes.append((table[position // size], position % size, last))
            self.cells[table[position // size]][position % size] = last
        if not work.samples:
            return INVALID_TOKEN
        cells = [cell for page_id in table for cell in self.cells[page_id]][: work.end]
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
