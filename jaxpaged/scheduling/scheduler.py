"""Continuous batching: who runs in the next step, with how many tokens, on which pages.

Each call of ``schedule`` looks at all sequences anew and fills one step with at most ``max_num_batched_tokens`` tokens. There are no
phases: a sequence has tokens whose keys and values are not computed yet, many of them (its prompt) or one (the token sampled last),
and a step computes some of them. When it reaches the last one, it samples the next. So prefill chunks and decodes share a step::

    waiting ---- admit ----> running ---- stop token, max_tokens, abort, NaN ----> finished
       ^                        |
       +------- preempt --------+        pages are gone, tokens are kept: they are computed again later

The order is first come, first served, and it holds at any moment: every running sequence arrived before every waiting one, and a
waiting sequence that does not fit yet blocks those behind it.

1. Running sequences first, oldest first. Each is owed one token of the budget, so a decode never waits behind another's prompt (not even
   that of an elder who had waited for pages); what is left over goes to the oldest that can use it.
2. Pages are taken when a step is about to write them. If too few are free, the youngest is preempted, but only by an elder, and only
   if pages that come back by themselves (deferred behind steps in flight) do not cover the need. Until it is met, nobody younger
   takes a page.
3. What is left of the budget goes to waiting sequences. One is admitted when all its known tokens fit, beside what the prompts being
   computed still need and a little room for each running sequence to grow: see ``_fits``.

The step that ``schedule`` returns counts as computed at once, so that the next one can be planned before its tokens are known ("async
depth 1"): ``num_pending`` says how many sampled tokens are still on the device. ``commit`` delivers them in dispatch order.

**Fairness bound.** Let ``cost(s) = ceil(total(s) / chunk) + max_tokens(s)`` be the steps that sequence s takes when it is the oldest
and has to start over, where ``total`` is its prompt plus ``max_tokens``, and ``chunk = max_num_batched_tokens - max_num_seqs + 1`` (or
``long_prefill_token_threshold``, if smaller). With ``depth`` steps dispatched ahead and without faults, a sequence is finished at the
latest ``(1 + depth) * sum(cost(s))`` steps after it was added, summed over itself and those that were there before it. Later arrivals
add nothing. Why: the oldest sequence is never preempted; it gets ``chunk`` tokens in each step, but when it waits for deferred pages,
which takes ``depth`` steps; and by the rules above it finds pages as soon as they are back, since each request fits the pool alone.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq

from jaxpaged.errors import ConfigError, QueueFull, RequestError
from jaxpaged.scheduling import invariants
from jaxpaged.scheduling.buckets import slot_bucket
from jaxpaged.scheduling.faults import blame, clear
from jaxpaged.scheduling.pages import PageAllocator
from jaxpaged.scheduling.plan import INVALID_TOKEN, StepPlan, StepResult, TokenEvent, Work
from jaxpaged.scheduling.request import FinishReason, Request, Sequence, Status

HEADROOM = 1
"""Pages kept free, at admission, for each running sequence (a watermark). ``tests/scheduling/headroom.py`` measures it on four
workloads that overfill the pool: against none, one page takes 63 % of the preemptions and 9 % of the modelled time away, and adds 1 % to
the steps; a second one takes little more."""


@dataclasses.dataclass
class _Draft:
    """A plan in the making."""

    budget: int
    decodes: list[Work] = dataclasses.field(default_factory=list)
    chunks: list[Work] = dataclasses.field(default_factory=list)
    has_suspect: bool = False
    pages_short: bool = False


class Scheduler:
    """Decides each step; owns all sequences, pages and slots. Not thread-safe: one thread calls it.

    The public attributes are for reading (metrics, tests, ``invariants``); only the scheduler changes them.

    Attributes:
        waiting, running: Sequences in order of arrival.
        in_flight: Plans that were returned by ``schedule`` and not committed, oldest first.
        pages: The allocator of pages.
        slots: The allocator of slots, which live behind the same fence; id ``i`` stands for slot ``i - 1``.
        step: Number of the last plan.
        headroom: Pages kept free, at admission, for each running sequence.
        num_preemptions: Sequences that lost their pages to an elder, since the start.
        num_ignored: Results that came late, twice or out of order, since the start.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        token_buckets: Seq[int],
        long_prefill_token_threshold: int = 0,
        max_waiting: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_num_batched_tokens < max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) must be at least max_num_seqs ({max_num_seqs}): "
                "each running sequence is owed one token in each step"
            )
        if token_buckets[-1] != max_num_batched_tokens:
            raise ConfigError(f"the largest token bucket ({token_buckets[-1]}) must be max_num_batched_tokens ({max_num_batched_tokens})")
        self.page_size = page_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.token_buckets = tuple(token_buckets)
        self.max_chunk = long_prefill_token_threshold or max_num_batched_tokens
        self.max_waiting = max_waiting
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.in_flight: deque[StepPlan] = deque()
        self.pages = PageAllocator(num_pages)
        self.slots = PageAllocator(max_num_seqs + 1)
        self.step = 0
        self.headroom = HEADROOM
        self.num_preemptions = 0
        self.num_ignored = 0
        self._requests: dict[str, list[Sequence]] = {}
        self._num_added = 0
        self._clock = clock
        self._finish_times: deque[float] = deque(maxlen=64)

    # ------------------------------------------------------------------------------------------------------------- numbers

    @property
    def max_request_tokens(self) -> int:
        """Most tokens, prompt plus ``max_tokens``, of a request: the context length, or what the pool holds if that is less."""
        return min(self.max_model_len, (self.pages.num_pages - 1) * self.page_size)

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold none, new or preempted."""
        return len(self.waiting)

    @property
    def num_in_flight(self) -> int:
        """Steps that were planned and not committed."""
        return len(self.in_flight)

    @property
    def has_work(self) -> bool:
        """Whether a call of ``schedule`` or ``commit`` is still due."""
        return bool(self.running or self.waiting or self.in_flight)

    @property
    def num_pages_in_use(self) -> int:
        """Pages that are not free: read by running sequences, or deferred."""
        return self.pages.num_used + self.pages.num_deferred

    @property
    def kv_usage(self) -> float:
        """Share of the pages that is not free, in [0, 1]."""
        return self.num_pages_in_use / (self.pages.num_pages - 1)

    def live_sequences(self) -> Iterator[Sequence]:
        """Yields every sequence that is not finished, request by request."""
        for sequences in self._requests.values():
            yield from sequences

    def check(self) -> None:
        """Verifies every invariant of ``scheduling.invariants``; O(pages + sequences).

        Raises:
            InvariantError: Says which.
        """
        invariants.check(self)

    # ---------------------------------------------------------------------------------------------------- requests come and go

    def add(self, request: Request) -> None:
        """Puts a request in line, as ``n`` sequences.

        Raises:
            RequestError: It can never fit (``context_length_exceeded``).
            QueueFull: ``max_waiting`` sequences are in line behind those that could run.
            ValueError: The id is in use, the prompt is empty or ``max_tokens`` is not resolved: a caller's bug.
        """
        if request.id in self._requests or not request.prompt:
            raise ValueError(f"request {request.id}: the id is in use or the prompt is empty")
        num_tokens = len(request.prompt) + request.max_tokens
        if num_tokens > self.max_request_tokens:
            raise RequestError(
                f"This server takes at most {self.max_request_tokens} tokens in a request; you asked for {num_tokens} "
                f"({len(request.prompt)} in the prompt, {request.max_tokens} in the completion).",
                code="context_length_exceeded",
            )
        if len(self.running) + len(self.waiting) >= self.max_num_seqs + self.max_waiting:
            raise QueueFull(f"{len(self.waiting)} sequences are waiting; try again later", retry_after_s=self._retry_after_s())
        sequences = [Sequence(request, index, order=self._num_added + index) for index in range(request.params.num_sequences)]
        self._num_added += len(sequences)
        self._requests[request.id] = sequences
        self.waiting.extend(sequences)

    def abort(self, request_id: str, index: int | None = None) -> list[TokenEvent]:
        """Ends what is left of a request, or one of its samples, at any moment; does nothing for what is not known (any more)."""
        wanted = [sequence for sequence in self._requests.get(request_id, ()) if index is None or sequence.index == index]
        return [self._end(sequence, FinishReason.ABORT) for sequence in wanted]

    # ------------------------------------------------------------------------------------------------------------ one step

    def schedule(self) -> StepPlan | None:
        """Plans the next step and takes the pages that it writes; may preempt.

        Returns:
            The plan, which counts as dispatched; or None if nothing can be done before a step in flight is committed (with
            nothing in flight: if there is nothing to do).
        """
        draft = _Draft(self.max_num_batched_tokens)
        if not self._try_alone(draft):
            self._continue_running(draft)
            self._admit_waiting(draft)
        work = (*draft.decodes, *draft.chunks)
        if not work:
            return None
        num_tokens = self.max_num_batched_tokens - draft.budget
        bucket = self.token_buckets[bisect.bisect_left(self.token_buckets, num_tokens)]
        self.step += 1
        plan = StepPlan(self.step, work, num_tokens, bucket, slot_bucket(bucket, self.max_num_seqs))
        self.in_flight.append(plan)
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        """Applies the result of the oldest plan in flight; any other's is ignored and counted.

        Returns:
            News of sequences, in the order of the plan's rows.
        """
        if not self.in_flight or self.in_flight[0] is not plan:
            self.num_ignored += 1
            return []
        if len(result.tokens) != len(plan.work):
            raise ValueError(f"step {plan.step} has {len(plan.work)} rows; its result has {len(result.tokens)}")
        self.in_flight.popleft()
        self.pages.complete(plan.step)
        self.slots.complete(plan.step)
        events = []
        for row, work in enumerate(plan.work):
            if work.sequence.status is not Status.FINISHED:
                event = self._apply(work, row, result)
                if event is not None:
                    events.append(event)
        return events

    def recover(self, plan: StepPlan | None) -> list[TokenEvent]:
        """Goes on after a step failed and took the pool with it: everything that ran is computed again from its tokens.

        Which sequence ends because its steps keep failing is decided by ``faults.blame``.

        Args:
            plan: The step that failed; None if it is not known which of those in flight it was.

        Returns:
            The end of the guilty sequence, if one was found.
        """
        failed = [each for each in self.in_flight if plan is None or each is plan]
        self.in_flight.clear()
        for sequence in reversed(self.running):
            self._put_back(sequence)
        self.running.clear()
        self.pages.flush()
        self.slots.flush()
        for sequence in self.waiting:
            sequence.num_pending = 0
        guilty = blame(failed)
        if guilty is None:
            return []
        return [self._end(guilty, FinishReason.ERROR, "the model step failed on this request", "internal_error")]

    # -------------------------------------------------------------------------------------------------------- inside schedule

    def _continue_running(self, draft: _Draft) -> None:
        index = 0
        while index < len(self.running):  # shrinks at its end when the youngest is preempted
            sequence = self.running[index]
            index += 1
            owed = len(self.running) - index
            count = self._num_next(sequence, draft.budget - owed)
            if count and not (sequence.suspect and draft.has_suspect) and self._reserve(draft, sequence, sequence.num_computed + count):
                self._plan(draft, sequence, count)

    def _admit_waiting(self, draft: _Draft) -> None:
        while self.waiting and draft.budget and not draft.pages_short:
            sequence = self.waiting[0]
            if sequence.num_faults or (sequence.suspect and draft.has_suspect) or not self._fits(sequence):
                return
            self._admit(draft, sequence)

    def _try_alone(self, draft: _Draft) -> bool:
        """Plans a step for nobody but an accused sequence (see ``faults``), if there is one and it fits."""
        accused = next((sequence for sequence in self.running if sequence.num_faults), None)
        if accused is not None:
            count = self._num_next(accused, draft.budget)
            if count and self._reserve(draft, accused, accused.num_computed + count):
                self._plan(draft, accused, count)
            return True
        if self.waiting and self.waiting[0].num_faults and self._fits(self.waiting[0]):
            self._admit(draft, self.waiting[0])
            return True
        return False

    def _num_next(self, sequence: Sequence, budget: int) -> int:
        """Returns how many tokens of a sequence the next step may compute; 0 if its last token is sampled already."""
        num_total = len(sequence.tokens) + sequence.num_pending
        request = sequence.request
        if num_total - len(request.prompt) >= request.max_tokens:
            return 0
        return min(num_total - sequence.num_computed, budget, self.max_chunk)

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _reserve(self, draft: _Draft, sequence: Sequence, end: int) -> bool:
        """Gives a running sequence the pages for its first ``end`` tokens, at the cost of younger ones; False if it has to wait."""
        shortfall = self._num_pages(end) - len(sequence.page_ids)
        if shortfall <= 0:
            return True
        if draft.pages_short:
            return False
        while shortfall > self.pages.num_free:
            youngest = self.running[-1]
            if shortfall <= self.pages.num_free + self.pages.num_deferred or youngest is sequence:
                draft.pages_short = True
                return False
            self._preempt(youngest)
        sequence.page_ids += self.pages.take(shortfall)
        return True

    def _fits(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence can be admitted: a slot, and pages for all tokens that it has, beyond those that are spoken for.

        Spoken for is what running sequences need for the tokens they have (or a prompt half computed would be preempted by the other
        half of an elder's), and ``HEADROOM`` pages for each of them: the newcomer is the first to be preempted, and its work is lost then.
        """
        if sequence.num_pending or not self.slots.num_free:
            return False
        spoken_for = sum(max(0, self._num_pages(len(elder.tokens)) - len(elder.page_ids)) + self.headroom for elder in self.running)
        return self._num_pages(len(sequence.tokens)) <= self.pages.num_free - spoken_for

    def _admit(self, draft: _Draft, sequence: Sequence) -> None:
        self.waiting.popleft()
        self.running.append(sequence)
        sequence.status = Status.RUNNING
        sequence.slot = self.slots.take(1)[0] - 1
        count = self._num_next(sequence, draft.budget)
        sequence.page_ids = self.pages.take(self._num_pages(count))
        self._plan(draft, sequence, count, new_slot=True)

    def _plan(self, draft: _Draft, sequence: Sequence, count: int, *, new_slot: bool = False) -> None:
        """Adds a row to the draft and counts it as computed."""
        start = sequence.num_computed
        num_total = len(sequence.tokens) + sequence.num_pending
        samples = start + count == num_total
        num_output = num_total - len(sequence.request.prompt)
        work = Work(sequence, start, count, samples, new_slot, num_output)
        (draft.decodes if count == 1 else draft.chunks).append(work)
        draft.budget -= count
        draft.has_suspect |= sequence.suspect
        sequence.num_computed = start + count
        sequence.num_pending += samples
        sequence.last_step = self.step + 1

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._put_back(sequence)
        self.num_preemptions += 1

    def _put_back(self, sequence: Sequence) -> None:
        """Makes a running sequence wait, before all that wait; its tokens in flight still count."""
        self._give_back(sequence)
        sequence.status = Status.WAITING
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        """Takes pages and slot from a sequence; both may still be touched by its last step."""
        self.pages.release_after(sequence.page_ids, sequence.last_step)
        sequence.page_ids = []
        if sequence.slot is not None:
            self.slots.release_after([sequence.slot + 1], sequence.last_step)
            sequence.slot = None

    # ---------------------------------------------------------------------------------------------------------- inside commit

    def _apply(self, work: Work, row: int, result: StepResult) -> TokenEvent | None:
        """Gives one row's token to its sequence, which may have been preempted in the meantime."""
        sequence = work.sequence
        prompt_logprobs = result.prompt_logprobs[row] if result.prompt_logprobs else ()
        if prompt_logprobs:
            prompt_logprobs = prompt_logprobs[max(0, sequence.num_prompt_logprobs - work.start) :]
            sequence.num_prompt_logprobs += len(prompt_logprobs)
        if not work.samples:
            return TokenEvent(sequence.request.id, sequence.index, prompt_logprobs=prompt_logprobs) if prompt_logprobs else None
        token = result.tokens[row]
        sequence.num_pending -= 1
        if token == INVALID_TOKEN:
            return self._end(sequence, FinishReason.ERROR, "the model's output was not a number", "numerical_error")
        sequence.tokens.append(token)
        if sequence.suspect:
            clear(sequence)
        logprobs = result.logprobs[row] if result.logprobs else None
        reason = self._finish_reason(work, token)
        if reason is not None:
            self._finish(sequence, reason)
        return TokenEvent(
            sequence.request.id,
            sequence.index,
            (token,),
            () if logprobs is None else (logprobs,),
            prompt_logprobs,
            reason,
            token if reason is FinishReason.STOP and token in (sequence.request.params.stop_token_ids or ()) else None,
        )

    def _finish_reason(self, work: Work, token: int) -> FinishReason | None:
        request = work.sequence.request
        if token in request.stop_token_ids and work.num_output >= request.params.min_tokens:
            return FinishReason.STOP
        if work.num_output + 1 >= request.max_tokens:
            return FinishReason.LENGTH
        return None

    def _end(self, sequence: Sequence, reason: FinishReason, error: str | None = None, error_code: str | None = None) -> TokenEvent:
        """Finishes a sequence without a token."""
        self._finish(sequence, reason)
        return TokenEvent(sequence.request.id, sequence.index, finish_reason=reason, error=error, error_code=error_code)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._give_back(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        siblings = self._requests[sequence.request.id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request.id]
        self._finish_times.append(self._clock())

    def _retry_after_s(self) -> int:
        """Estimates when a place is free from the rate at which sequences finished of late; in [1, 60]."""
        times = self._finish_times
        if len(times) < 2:
            return 1
        seconds_each = (self._clock() - times[0]) / len(times)
        return max(1, min(60, math.ceil(seconds_each)))
