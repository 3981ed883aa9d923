"""What must hold of a scheduler between any two calls; a broken rule is a bug that would soon be a wrong answer.

Verified after every call in tests and when the engine is idle in production.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING

from jaxpaged.scheduling.pages import NULL_PAGE, InvariantError
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
    _check_groups(scheduler)
    _check_flight(scheduler)
    for sequence in scheduler.running:
        _check_running(scheduler, sequence)
    for sequence in scheduler.waiting:
        _check_waiting(scheduler, sequence)


def _demand(holds: bool, rule: str) -> None:
    if not holds:
        raise InvariantError(rule)


def _check_books(scheduler: Scheduler) -> None:
    """Every page and every slot is free, owned or deferred, by identity; nothing is deferred that nothing can bring back."""
    scheduler.pages.check(_owned(sequence.page_ids) for sequence in scheduler.running)
    if scheduler.memory.host is not None:
        scheduler.memory.host.pages.check(_owned(sequence.host_ids) for sequence in scheduler.waiting)
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


def _check_groups(scheduler: Scheduler) -> None:
    """The sequences of a request are all running or all waiting, and share at most the pages that hold the same tokens."""
    for group in {sequence.group: None for sequence in scheduler.live_sequences()}:
        _demand(len({sequence.status for sequence in group.sequences}) == 1, "a request is torn apart")
        _demand(group.beams is not None or not any(sequence.idle for sequence in group.sequences), "a sample is idle")
        _demand(not group.num_faults or group.suspect, "an accused request is not suspect, so nothing can clear it")
    seen: dict[int, tuple[object, ...]] = {}
    size = scheduler.page_size
    for sequence in scheduler.running:
        for at, page_id in enumerate(sequence.page_ids):
            if page_id == NULL_PAGE or scheduler.pages.reference_count(page_id) < 2:
                continue
            # Readers of one page agree on what is in it, up to where the one that has the least of it ends.
            computed = min(sequence.num_computed, len(sequence.tokens))
            content = tuple(sequence.tokens[at * size : min((at + 1) * size, computed)])
            others = seen.setdefault(page_id, content)
            common = min(len(content), len(others))
            _demand(content[:common] == others[:common], "a page is shared by sequences with other tokens")


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
        _demand(len({work.sequence.group for work in plan.work if work.sequence.suspect}) <= 1, "two suspects are in a plan")
        sources = {copy.source for copy in plan.copies}
        targets = [copy.destination for copy in plan.copies]
        _demand(len(targets) == len(set(targets)) <= len(sizes) and sources.isdisjoint(targets), "copies get into each other's way")
        pending.update(work.sequence for work in plan.work if work.samples)
    for sequence in scheduler.live_sequences():
        _demand(sequence.num_pending == pending[sequence], "tokens in flight are miscounted")


def _check_running(scheduler: Scheduler, sequence: Sequence) -> None:
    """A running sequence has a slot, and exactly the pages that its computed tokens, and its prompt if it is a fork, need.

    Nothing that a step in flight writes has another reader or a key; what a sequence writes next is made its own before.
    """
    memory, size = scheduler.memory, scheduler.page_size
    _demand(sequence.status is Status.RUNNING and sequence.slot is not None, "a sequence runs without a slot")
    _demand(not sequence.host_ids, "a running sequence is swapped out")
    if not sequence.page_ids:
        _demand(sequence.num_computed == 0, "tokens are computed, but there are no pages")
        return
    _demand(0 <= sequence.num_computed < sequence.num_total, "a running sequence has nothing to compute")
    held, least = len(sequence.page_ids), -(-sequence.num_computed // size)
    _demand(least <= held <= max(least, -(-sequence.num_prompt // size)), "a block table does not cover the computed tokens")
    for plan in scheduler.in_flight:
        for work in plan.work:
            if work.sequence is sequence and plan.step >= sequence.first_step:
                written = sequence.page_ids[work.start // size : -(-work.end // size)]
                _demand(NULL_PAGE not in written, "a page that is written was given back")
    if memory.sliding_window is not None:
        visible = max(0, sequence.num_computed - memory.sliding_window + 1) // size
        _demand(NULL_PAGE not in sequence.page_ids[visible:], "a page within the window was given back")
    else:
        _demand(NULL_PAGE not in sequence.page_ids, "a page was given back")


def _check_waiting(scheduler: Scheduler, sequence: Sequence) -> None:
    """A waiting sequence holds nothing on the device; in host memory, if it was swapped out, all that it had computed."""
    _demand(sequence.status is Status.WAITING, "a sequence that does not wait is in the queue")
    _demand(sequence.slot is None and not sequence.page_ids, "a waiting sequence holds a slot or pages")
    _demand(bool(sequence.host_ids) or sequence.num_computed == 0, "tokens are computed, but there are no pages")
    _demand(len(sequence.host_ids) >= -(-sequence.num_computed // scheduler.page_size), "host memory does not cover the computed tokens")


def _owned(page_ids: list[int]) -> list[int]:
    return [page_id for page_id in page_ids if page_id != NULL_PAGE]
