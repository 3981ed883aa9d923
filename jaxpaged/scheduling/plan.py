"""The records that the scheduler and the engine trade in: a plan goes down to the device, results come back up."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq

from jaxpaged.scheduling.request import FinishReason, Sequence

FEEDBACK = -1
"""Token id in a plan that stands for "the token this slot sampled in the step before": it never left the device."""

INVALID_TOKEN = -1
"""Token id in a result that says the row's logits held NaN or infinity everywhere; no such token exists."""


@dataclasses.dataclass(frozen=True)
class Work:
    """One row of a step: the next ``num_new_tokens`` tokens of one sequence.

    Attributes:
        sequence: Whose tokens; its ``page_ids`` and ``slot`` are valid until the step is committed.
        start: Position of the first new token.
        num_new_tokens: At least 1.
        samples: Whether the row ends at the sequence's last token, so that the step samples the next one.
        new_slot: Whether the sequence got its slot in this very plan, so that the slot's state must be written first.
        num_output: Sampled tokens before this one, known or pending (for ``min_tokens``).
    """

    sequence: Sequence
    start: int
    num_new_tokens: int
    samples: bool
    new_slot: bool
    num_output: int

    @property
    def end(self) -> int:
        """Length of the sequence's K/V after the step."""
        return self.start + self.num_new_tokens

    @property
    def is_decode(self) -> bool:
        """Whether this is a single token (the kernel's decode region), whatever phase the sequence is in."""
        return self.num_new_tokens == 1

    def token_ids(self) -> list[int]:
        """Ids of the new tokens; FEEDBACK where only the device knows the value."""
        known = self.sequence.tokens[self.start : self.end]
        return known + [FEEDBACK] * (self.num_new_tokens - len(known))


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What one step computes.

    Attributes:
        step: Running number of the step, from 1; dispatched and committed in this order.
        work: Rows, single-token rows first.
        num_tokens: Sum of the rows' new tokens.
        token_bucket: Padded T, one of the configured buckets, >= num_tokens.
        slot_bucket: Padded S, >= len(work).
    """

    step: int
    work: tuple[Work, ...]
    num_tokens: int
    token_bucket: int
    slot_bucket: int

    @property
    def num_decode(self) -> int:
        """Rows of one token, which come first."""
        return sum(work.is_decode for work in self.work)


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position, from the model's own distribution (before penalties, bias and temperature).

    Attributes:
        token_id: The token that stands at the position.
        logprob: Its log-probability.
        rank: Its rank, 1 for the most likely.
        top: The most likely ids with their log-probabilities, best first, as many as asked for.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What the device said of one plan, read to the host.

    Attributes:
        tokens: One id per row of the plan (rows that do not sample: any value); INVALID_TOKEN for NaN logits.
        logprobs: Per row, None where not asked for.
        prompt_logprobs: Per row, what the row's positions say of the prompt token that follows each of them; empty
            where not asked for.
    """

    tokens: Seq[int]
    logprobs: Seq[TokenLogprobs | None] = ()
    prompt_logprobs: Seq[tuple[TokenLogprobs, ...]] = ()


@dataclasses.dataclass(frozen=True)
class TokenEvent:
    """News of one sequence, for the client's queue. The event with a ``finish_reason`` is the last of its sequence.

    Attributes:
        request_id: Whose request.
        index: Which of its samples.
        token_ids: New tokens, in order; empty when the sequence ends without one (abort, error) and for the first event
            of a prompt whose log-probabilities are asked for.
        logprobs: One entry per new token, or empty when not asked for.
        prompt_logprobs: Entries for the prompt's tokens from the second on, in order, as they become known.
        finish_reason: None while the sequence runs.
        stop_reason: The token id that ended it, when that was one of the client's ``stop_token_ids``.
        error: For people, when ``finish_reason`` is ERROR; ``error_code`` is ``numerical_error`` or ``internal_error``.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None
    error_code: str | None = None
