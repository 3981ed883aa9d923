"""The records that the scheduler and the engine trade in: a plan goes down to the device, results come back up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple

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
        table_start: First entry of the block table (``sequence.page_ids``) that is new or another one since the slot's last row.
        beam_score: Sum of the log-probabilities of the beam that the sequence is, in a row that asks for the next candidates of its
            beam search; None in all others. Such rows of one request lie side by side and in the order of its beams.
    """

    sequence: Sequence
    start: int
    num_new_tokens: int
    samples: bool
    new_slot: bool
    num_output: int
    table_start: int = 0
    beam_score: float | None = None

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


class PageCopy(NamedTuple):
    """A page that a step copies before it writes anything: copy-on-write."""

    source: int
    destination: int


class Transfer(NamedTuple):
    """A page that moves between the pool and host memory before a step copies and writes.

    Attributes:
        to_host: Direction: from the pool to the host, or back.
        page_id: Page of the pool.
        host_id: Place in host memory; from 1, as page ids are.
    """

    to_host: bool
    page_id: int
    host_id: int


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What one step computes.

    Attributes:
        step: Running number of the step, from 1; dispatched and committed in this order.
        work: Rows, single-token rows first.
        num_tokens: Sum of the rows' new tokens.
        token_bucket: Padded T, one of the configured buckets, >= num_tokens.
        slot_bucket: Padded S, >= len(work).
        transfers: Done first, in this order, each seeing what those before it left.
        copies: Done next, all at once: no page is copied from and to; at most one per row.
    """

    step: int
    work: tuple[Work, ...]
    num_tokens: int
    token_bucket: int
    slot_bucket: int
    transfers: tuple[Transfer, ...] = ()
    copies: tuple[PageCopy, ...] = ()

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


class BeamCandidate(NamedTuple):
    """One way to go on with a beam search.

    Attributes:
        parent: Which of the request's beams (by its place among the request's rows of the plan) goes on.
        token_id: With which token.
        score: Sum of the log-probabilities of the longer beam, float32.
    """

    parent: int
    token_id: int
    score: float


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What the device said of one plan, read to the host.

    Attributes:
        tokens: One id per row of the plan (rows that do not sample: any value); INVALID_TOKEN for NaN logits.
        logprobs: Per row, None where not asked for.
        prompt_logprobs: Per row, what the row's positions say of the prompt token that follows each of them; empty
            where not asked for.
        beams: By request id, for each request with rows that have a ``beam_score``: the best candidates of all its beams, best first,
            at least 2 * beam_width (fewer where the vocabulary is smaller).
    """

    tokens: Seq[int]
    logprobs: Seq[TokenLogprobs | None] = ()
    prompt_logprobs: Seq[tuple[TokenLogprobs, ...]] = ()
    beams: Mapping[str, tuple[BeamCandidate, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TokenEvent:
    """News of one sequence, for the client's queue. The event with a ``finish_reason`` is the last of its sequence.

    Attributes:
        request_id: Whose request.
        index: Which of its samples.
        token_ids: New tokens, in order; empty when the sequence ends without one (abort, error) and in events that tell of the
            prompt's log-probabilities.
        logprobs: One entry per new token, or empty when not asked for.
        prompt_logprobs: Entries for the prompt's tokens from the second on, in order, as they become known.
        finish_reason: None while the sequence runs.
        stop_reason: The token id that ended it, when that was one of the client's ``stop_token_ids``.
        error: For people, when ``finish_reason`` is ERROR; ``error_code`` is ``numerical_error`` or ``internal_error``.
        num_cached_tokens: Prompt tokens of the request that were found in the prefix cache when it was first admitted.
        cumulative_logprob: Of a finished beam, the sum of its tokens' log-probabilities; None for other sequences.
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
    num_cached_tokens: int = 0
    cumulative_logprob: float | None = None
