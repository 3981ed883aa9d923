"""What must hold of a scheduler between any two calls; a broken rule is a bug that would soon be a wrong answer.

Verified after every call in tests and when the engine is idle in production.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING

from jaxpaged.scheduling.pages import InvariantError
from jaxpaged.scheduling.request import Sequence, Status

if TYPE_CHECKING:
    from jaxpaged.scheduling.scheduler import Scheduler


def check(scheduler: Scheduler) -> None:
    """Verifies everything below; O(pages + sequences).

    Raises:
        InvariantError: Says which rule is broken, and by what.
    """
    _check_books(scheduler)
    _check_line(scheduler)
    _check_flight(scheduler)
    for sequence in scheduler.running:
        _check_running(scheduler, sequence)
    for sequence in scheduler.waiting:
        _check_waiting(sequence)


def _demand(holds: bool, rule: str) -> None:
    if not holds:
        raise InvariantError(rule)


def _check_books(scheduler: Scheduler) -> None:
    """Every page and every slot is free, owned or deferred, by identity; nothing is deferred that nothing can bring back."""
    scheduler.pages.check(sequence.page_ids for sequence in scheduler.running)
    scheduler.slots.check([-1 if sequence.slot is None else sequence.slot + 1] for sequence in scheduler.running)
    for pool in (scheduler.pages, scheduler.slots):
        _demand(pool.last_fence <= scheduler.step, "something is deferred behind a step that was never dispatched")
        _demand(bool(scheduler.in_flight) or pool.num_deferred == 0, "nothing is in flight, but something is deferred")


def _check_line(scheduler: Scheduler) -> None:
    """The line is in order of arrival, running before waiting, and nobody else is in it."""
    line = [*scheduler.running, *scheduler.waiting]
    _demand(all(a.order < b.order for a, b in itertools.pairwise(line)), "somebody overtook an elder")
    _demand(len(scheduler.running) <= scheduler.max_num_seqs, "more sequences run than may")
    known = sorted(sequence.order for sequence in scheduler.live_sequences())
    _demand(known == [sequence.order for sequence in line], "a sequence that is not finished is not in line, or one that is finished is")


def _check_flight(scheduler: Scheduler) -> None:
    """Plans in flight respect budget and bucket, and are counted in their sequences."""
    _demand(all(a.step < b.step for a, b in itertools.pairwise(scheduler.in_flight)), "plans in flight are out of order")
    pending: Counter[Sequence] = Counter()
    for plan in scheduler.in_flight:
        sizes = [work.num_new_tokens for work in plan.work]
        decodes, chunks = sizes[: plan.num_decode], sizes[plan.num_decode :]
        _demand(0 < plan.num_tokens <= plan.token_bucket <= scheduler.max_num_batched_tokens, "a plan exceeds its bucket")
        _demand(plan.num_tokens == sum(sizes), "a plan's tokens are miscounted")
        _demand(len(sizes) <= plan.slot_bucket <= scheduler.max_num_seqs, "a plan has too many rows")
        _demand(set(decodes) <= {1} and min(chunks, default=2) > 1, "single-token rows do not come first")
        _demand(len({work.sequence for work in plan.work}) == len(sizes), "a sequence is twice in a plan")
        _demand(sum(work.sequence.suspect for work in plan.work) <= 1, "two suspects are in a plan")
        pending.update(work.sequence for work in plan.work if work.samples)
    for sequence in scheduler.live_sequences():
        _demand(sequence.num_pending == pending[sequence], "tokens in flight are miscounted")


def _check_running(scheduler: Scheduler, sequence: Sequence) -> None:
    """A running sequence has a slot, and exactly the pages that its computed tokens need, all its own."""
    _demand(sequence.status is Status.RUNNING and sequence.slot is not None, "a sequence runs without a slot")
    _demand(0 < sequence.num_computed < sequence.num_total, "a running sequence has nothing to compute")
    _demand(len(sequence.page_ids) == -(-sequence.num_computed // scheduler.page_size), "a block table does not cover the computed tokens")
    _demand(all(scheduler.pages.reference_count(page_id) == 1 for page_id in sequence.page_ids), "a page that is written has two readers")


def _check_waiting(sequence: Sequence) -> None:
    """A waiting sequence holds nothing."""
    _demand(sequence.status is Status.WAITING, "a sequence that does not wait is in the queue")
    _demand(sequence.slot is None and not sequence.page_ids and sequence.num_computed == 0, "a waiting sequence holds a slot or pages")
