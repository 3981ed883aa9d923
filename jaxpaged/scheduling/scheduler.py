"""Continuous batching: who runs in the next step, with how many tokens, on which pages.

Each call of ``schedule`` looks at all sequences anew and fills one step with at most ``max_num_batched_tokens`` tokens. There are no
phases: a sequence has tokens whose keys and values are not computed yet, many of them (its prompt) or one (the token sampled last),
and a step computes some of them. When it reaches the last one, it samples the next. So prefill chunks and decodes share a step::

    waiting ---- admit ----> running ---- stop token, max_tokens, abort, NaN ----> finished
       ^                        |
       +------- preempt --------+        tokens are kept; pages move to host memory, or are gone and computed again later

The sequences of a request (its samples, or its beams) are one *group*: admitted, preempted and blamed together. The first computes the
prompt; then the others fork from it and share its pages. How sequences come by pages is ``kv_memory``'s business.

The order is first come, first served, and it holds at any moment: every running sequence arrived before every waiting one, and a
waiting request that does not fit yet blocks those behind it.

1. Running requests first, oldest first. Each sequence is owed one token of the budget, so a decode never waits behind another's prompt
   (not even that of an elder who had waited for pages); what is left over goes to the oldest that can use it.
2. Pages are taken when a step is about to write them. If too few are free, the youngest request is preempted, but only by an elder, and
   only if pages that come back by themselves (deferred behind steps in flight) do not cover the need. Until it is met, nobody
   younger takes a page. The victim's pages move to host memory, or they are computed again: see ``preemption_mode``.
3. What is left of the budget goes to waiting requests. One is admitted when all its known tokens fit, beside what the prompts being
   computed still need and a little room for each running sequence to grow: see ``_fits``.

The beams of a search go on in the same step or not at all: the step's result is the best candidates of all of them together, and which
beams there are next is decided on the host (``beams``) when it is read.

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
from typing import Literal

from jaxpaged.errors import ConfigError, QueueFull, RequestError
from jaxpaged.scheduling import invariants
from jaxpaged.scheduling.beams import BeamSearch
from jaxpaged.scheduling.buckets import slot_bucket
from jaxpaged.scheduling.faults import blame, clear, leave
from jaxpaged.scheduling.kv_memory import KVMemory
from jaxpaged.scheduling.pages import PageAllocator
from jaxpaged.scheduling.plan import INVALID_TOKEN, BeamCandidate, StepPlan, StepResult, TokenEvent, TokenLogprobs, Work
from jaxpaged.scheduling.request import FinishReason, Group, Request, Sequence, Status

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
    suspect: Group | None = None
    pages_short: bool = False


class Scheduler:
    """Decides each step; owns all sequences, pages and slots. Not thread-safe: one thread calls it.

    The public attributes are for reading (metrics, tests, ``invariants``); only the scheduler changes them.

    Attributes:
        waiting, running: Sequences in order of arrival.
        in_flight: Plans that were returned by ``schedule`` and not committed, oldest first.
        memory: Who has which pages, and why.
        slots: The allocator of slots, which live behind the same fence; id ``i`` stands for slot ``i - 1``.
        step: Number of the last plan.
        headroom: Pages kept free, at admission, for each running sequence.
        num_preemptions: Sequences that lost their pages to an elder, since the start.
        num_swaps: Requests whose pages went to host memory then, since the start.
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
        enable_prefix_caching: bool = True,
        num_host_pages: int = 0,
        preemption_mode: Literal["auto", "recompute", "swap"] = "recompute",
        prefers_swap: Callable[[int, int], bool] = lambda num_tokens, num_pages: True,
        sliding_window: int | None = None,
        cache_by_prompt_length: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_num_batched_tokens < max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) must be at least max_num_seqs ({max_num_seqs}): "
                "each running sequence is owed one token in each step"
            )
        if token_buckets[-1] != max_num_batched_tokens:
            raise ConfigError(f"the largest token bucket ({token_buckets[-1]}) must be max_num_batched_tokens ({max_num_batched_tokens})")
        if preemption_mode == "swap" and not num_host_pages:
            raise ConfigError("preemption_mode swap needs host memory to swap to, and there is none")
        self.page_size = page_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.token_buckets = tuple(token_buckets)
        self.max_chunk = long_prefill_token_threshold or max_num_batched_tokens
        self.max_waiting = max_waiting
        self.preemption_mode = preemption_mode
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.in_flight: deque[StepPlan] = deque()
        self.memory = KVMemory(
            num_pages=num_pages,
            page_size=page_size,
            enable_prefix_caching=enable_prefix_caching,
            num_host_pages=num_host_pages,
            sliding_window=sliding_window,
            longest_chunk=min(self.max_chunk, max_num_batched_tokens),
            cache_by_prompt_length=cache_by_prompt_length,
        )
        self.slots = PageAllocator(max_num_seqs + 1)
        self.step = 0
        self.headroom = HEADROOM
        self.num_preemptions = 0
        self.num_swaps = 0
        self.num_ignored = 0
        self._prefers_swap = prefers_swap
        self._groups: dict[str, Group] = {}
        self._num_added = 0
        self._clock = clock
        self._finish_times: deque[float] = deque(maxlen=64)
        self._busy_since = clock()

    # ------------------------------------------------------------------------------------------------------------- numbers

    @property
    def pages(self) -> PageAllocator:
        """The allocator of the pool's pages."""
        return self.memory.pages

    @property
    def max_request_tokens(self) -> int:
        """Most tokens, prompt plus ``max_tokens``, of a request: the context length, or what the pool holds if that is less."""
        usable = self.pages.num_pages - 1
        if self.memory.most_pages(self.max_model_len) <= usable:
            return self.max_model_len
        return usable * self.page_size

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
        for group in self._groups.values():
            yield from group.sequences

    def check(self) -> None:
        """Verifies every invariant of ``scheduling.invariants``; O(pages + sequences).

        Raises:
            InvariantError: Says which.
        """
        invariants.check(self)

    # ---------------------------------------------------------------------------------------------------- requests come and go

    def add(self, request: Request) -> None:
        """Puts a request in line, with all its sequences.

        Raises:
            RequestError: It can never fit (``context_length_exceeded``), or has more sequences than run at once.
            QueueFull: ``max_waiting`` sequences are in line behind those that could run.
            ValueError: The id is in use, or the prompt is empty: a caller's bug.
        """
        if request.id in self._groups or not request.prompt:
            raise ValueError(f"request {request.id}: the id is in use or the prompt is empty")
        self.check_size(request)
        if len(self.running) + len(self.waiting) >= self.max_num_seqs + self.max_waiting:
            raise QueueFull(f"{len(self.waiting)} sequences are waiting; try again later", retry_after_s=self.retry_after_s())
        if not self.has_work:
            self._busy_since = self._clock()
        group = self._groups[request.id] = Group(request)
        params = request.params
        if params.use_beam_search:
            group.beams = BeamSearch(
                width=params.num_sequences,
                max_tokens=request.max_tokens,
                stop_token_ids=request.stop_token_ids,
                length_penalty=params.length_penalty,
                early_stopping=params.early_stopping,
                min_tokens=params.min_tokens,
            )
        for index in range(params.num_sequences):
            idle = group.beams is not None and index > 0
            group.sequences.append(Sequence(group, index, order=self._num_added + index, idle=idle))
        self._num_added += params.num_sequences
        self.waiting.extend(group.sequences)

    def abort(self, request_id: str, index: int | None = None) -> list[TokenEvent]:
        """Ends what is left of a request, or one of its samples, at any moment; does nothing for what is not known (any more).

        Beams have no lives of their own: aborting one ends the search.
        """
        group = self._groups.get(request_id)
        if group is None:
            return []
        if index is not None and group.beams is not None and any(sequence.index == index for sequence in group.sequences):
            index = None
        return [self._end(sequence, FinishReason.ABORT) for sequence in tuple(group.sequences) if index in (None, sequence.index)]

    def reset_prefix_cache(self, tenant: str | None = None) -> None:
        """Forgets what is in the prefix cache of one tenant, or of all, on the device and in host memory; harms nobody who runs."""
        self.memory.reset_prefix_cache(tenant)

    def check_size(self, request: Request) -> None:
        """Raises RequestError if a request can never fit, as ``add`` does."""
        params, num_tokens = request.params, len(request.prompt) + request.max_tokens
        if params.num_sequences > self.max_num_seqs:
            name = params.counting_field
            raise RequestError(
                f"{name} must be at most {self.max_num_seqs}, the sequences that this server runs at once; got {params.num_sequences}",
                param=name,
            )
        if num_tokens > self.max_request_tokens or self.memory.worst_case(request) > self.pages.num_pages - 1:
            raise RequestError(
                f"This server takes at most {self.max_request_tokens} tokens in a request; you asked for {num_tokens} "
                f"({len(request.prompt)} in the prompt, {request.max_tokens} in the completion)"
                f"{f', for each of {params.num_sequences} sequences' if params.num_sequences > 1 else ''}.",
                code="context_length_exceeded",
            )

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
        plan = StepPlan(self.step, work, num_tokens, bucket, slot_bucket(bucket, self.max_num_seqs), *self.memory.take_moves())
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
        events: list[TokenEvent] = []
        for row, work in enumerate(plan.work):
            if result.prompt_logprobs and result.prompt_logprobs[row]:
                events += self._tell_prompt_logprobs(work, result.prompt_logprobs[row])
            if work.sequence.status is Status.FINISHED:
                continue
            if work.beam_score is not None:
                if work.sequence.num_pending:  # else the search went on with another of its rows
                    events += self._apply_beams(plan, work.sequence.group, result)
            else:
                event = self._apply(plan, work, row, result)
                if event is not None:
                    events.append(event)
        return events

    def recover(self, plan: StepPlan | None) -> list[TokenEvent]:
        """Goes on after a step failed and took the pool with it: everything that ran is computed again from its tokens.

        Which request ends because its steps keep failing is decided by ``faults.blame``.

        Args:
            plan: The step that failed; None if ``schedule`` itself failed, or if it is not known which of those in flight it was. Then
                everybody who ran is involved, or the first in line if nobody did.

        Returns:
            The ends of the guilty request's sequences, if one was found.
        """
        involved = [work.sequence for each in self.in_flight if plan is None or each is plan for work in each.work]
        if plan is None:
            involved += self.running or (self.waiting[0].group.sequences if self.waiting else ())
        self.start_over()
        guilty = blame(involved)
        if guilty is None:
            return []
        return self._end_all(guilty, "the model step failed on this request", "internal_error")

    def start_over(self) -> None:
        """Goes on with an empty pool and nothing in flight, and blames nobody: everything that ran is computed again from its tokens."""
        self.in_flight.clear()
        for group in dict.fromkeys(sequence.group for sequence in reversed(self.running)):
            self._put_back(group)
        self.memory.lose(self.waiting)
        self.slots.reset()
        for sequence in self.waiting:
            sequence.num_pending = 0
            sequence.num_computed = 0
            sequence.last_step = 0  # it may have been in a step that was never planned to its end

    # -------------------------------------------------------------------------------------------------------- inside schedule

    def _continue_running(self, draft: _Draft) -> None:
        index = 0
        while index < len(self.running):  # shrinks at its end when the youngest is preempted
            group = self.running[index].group
            index += len(group.sequences)
            self._advance(draft, group, owed=len(self.running) - index)

    def _admit_waiting(self, draft: _Draft) -> None:
        while self.waiting and draft.budget and not draft.pages_short:
            group = self.waiting[0].group
            if group.num_faults or (group.suspect and draft.suspect) or not self._fits(group):
                return
            self._admit(draft, group)

    def _try_alone(self, draft: _Draft) -> bool:
        """Plans a step for nobody but an accused request (see ``faults``), if there is one and it fits."""
        accused = next((sequence.group for sequence in self.running if sequence.group.num_faults), None)
        if accused is not None:
            self._advance(draft, accused, owed=0)
            return True
        if self.waiting and self.waiting[0].group.num_faults and self._fits(self.waiting[0].group):
            self._admit(draft, self.waiting[0].group)
            return True
        return False

    def _advance(self, draft: _Draft, group: Group, owed: int) -> None:
        """Plans what the sequences of a running request can compute, but for ``owed`` tokens of the budget."""
        suspect, before = group.suspect, draft.budget
        if suspect and draft.suspect not in (None, group):
            return
        if self.memory.sliding_window is not None:
            for sequence in group.sequences:
                self.memory.leave_window(sequence)
        if len(group.sequences) == 1 and group.beams is None:
            self._continue(draft, group.sequences[0], draft.budget - owed)
        else:
            self._advance_together(draft, group, owed)
        if suspect and draft.budget < before:
            draft.suspect = group

    def _advance_together(self, draft: _Draft, group: Group, owed: int) -> None:
        """Plans for sequences that share pages: forks of one that has computed the prompt, beams in step."""
        source = next((sequence for sequence in group.sequences if sequence.page_ids), None)
        may_fork = source is not None and source.num_computed >= source.num_prompt  # by steps before this one
        if group.beams is not None and may_fork:
            for sequence in group.active:
                self._fork(sequence, source)
        if not self._in_step(group):
            for after, sequence in zip(range(len(group.sequences) - 1, -1, -1), group.sequences, strict=True):
                if may_fork and not sequence.idle:
                    self._fork(sequence, source)
                if sequence.page_ids or (source is None and not sequence.idle):
                    source = source or sequence  # the others fork once this one has computed the prompt
                    self._continue(draft, sequence, min(draft.budget, max(1, draft.budget - owed - after)))
                    # Now, if all that this one computes was cached: a beam then waits for the others and has no row in this step.
                    may_fork = may_fork or (source.num_computed >= source.num_prompt and source.last_step <= self.step)
        if self._in_step(group):
            beams = group.active
            ends = [(sequence, len(sequence.tokens)) for sequence in beams]
            enough = len(beams) <= draft.budget - owed
            if enough and self._make_room(draft, group, lambda: self.memory.shortfall(ends)):
                for sequence in beams:
                    self.memory.grow(sequence, len(sequence.tokens))
                    self._plan(draft, sequence, 1)

    def _fork(self, sequence: Sequence, source: Sequence | None) -> None:
        """Gives a sequence that has no pages those of one of its request that has computed the prompt."""
        if source is not None and not sequence.page_ids:
            self.memory.fork(sequence, source)

    def _continue(self, draft: _Draft, sequence: Sequence, budget: int) -> None:
        """Plans the next tokens of a running sequence, from the longest cached beginning on if it has no pages yet."""
        group, memory = sequence.group, self.memory
        if not sequence.page_ids:
            if not self._make_room(draft, group, lambda: memory.to_begin(sequence)):
                return
            memory.begin(sequence)
        count = self._num_next(sequence, budget)
        if count == 0:
            return
        end = sequence.num_computed + count
        if not memory.has_room(sequence, end):
            if not self._make_room(draft, group, lambda: memory.shortfall([(sequence, end)])):
                return
            memory.grow(sequence, end)
        self._plan(draft, sequence, count)

    def _in_step(self, group: Group) -> bool:
        """Whether the beams of a search are all at their last token, and not in this step yet, so that they can go on together."""
        return group.beams is not None and all(
            sequence.page_ids
            and sequence.num_computed == len(sequence.tokens) - 1
            and not sequence.num_pending
            and sequence.last_step <= self.step
            for sequence in group.active
        )

    def _num_next(self, sequence: Sequence, budget: int) -> int:
        """Returns how many tokens of a sequence the next step may compute; 0 if its last token is sampled already."""
        num_total = len(sequence.tokens) + sequence.num_pending
        group = sequence.group
        if num_total - len(group.request.prompt) >= group.request.max_tokens:
            return 0
        if group.beams is not None and num_total > sequence.num_prompt:
            num_total = len(sequence.tokens) - 1  # the last one only together with the other beams'
        return max(0, min(num_total - sequence.num_computed, budget, self.max_chunk))

    def _make_room(self, draft: _Draft, group: Group, needed: Callable[[], int]) -> bool:
        """Sees that a running request finds the free pages it needs, at the cost of younger ones; False if it has to wait."""
        shortfall = needed()
        if shortfall <= 0:
            return True
        if draft.pages_short:
            return False
        while shortfall > self.pages.num_free:
            youngest = self.running[-1].group
            if shortfall <= self.pages.num_free + self.pages.num_deferred or youngest is group:
                draft.pages_short = True
                return False
            self._preempt(youngest)
            shortfall = needed()  # a page that the youngest shared is free now, and was not needed before
        return True

    def _fits(self, group: Group) -> bool:
        """Whether a waiting request can be admitted: slots, and pages for all tokens that it has, beyond those that are spoken for.

        Spoken for is what running sequences need for the tokens they have (or a prompt half computed would be preempted by the other
        half of an elder's), and ``HEADROOM`` pages for each of them: the newcomer is the first to be preempted, and its work is lost then.
        """
        if len(group.sequences) > self.slots.num_free or any(sequence.num_pending for sequence in group.sequences):
            return False
        spoken_for = sum(self.memory.spoken_for(elder) + self.headroom for elder in self.running)
        return self.memory.to_admit(group) <= self.pages.num_free - spoken_for

    def _admit(self, draft: _Draft, group: Group) -> None:
        for sequence, slot in zip(group.sequences, self.slots.take(len(group.sequences)), strict=True):
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.status = Status.RUNNING
            sequence.slot = slot - 1
            sequence.first_step = 0
        self.memory.swap_in(group)
        self._advance(draft, group, owed=0)

    def _plan(self, draft: _Draft, sequence: Sequence, count: int) -> None:
        """Adds a row, for which there are pages, to the draft and counts it as computed."""
        start, group = sequence.num_computed, sequence.group
        num_total = len(sequence.tokens) + sequence.num_pending
        samples = start + count == num_total
        work = Work(
            sequence,
            start,
            count,
            samples,
            new_slot=not sequence.first_step,
            num_output=num_total - len(group.request.prompt),
            table_start=sequence.num_listed,
            beam_score=sequence.score if samples and group.beams is not None else None,
        )
        (draft.decodes if count == 1 else draft.chunks).append(work)
        draft.budget -= count
        sequence.num_computed = start + count
        sequence.num_pending += samples
        sequence.num_listed = len(sequence.page_ids)
        sequence.first_step = sequence.first_step or self.step + 1
        sequence.last_step = self.step + 1

    def _preempt(self, group: Group) -> None:
        self.num_preemptions += len(group.sequences)
        if self._wants_swap(group) and self.memory.swap_out(group):
            self.num_swaps += 1
        self._put_back(group)

    def _wants_swap(self, group: Group) -> bool:
        if self.preemption_mode == "auto" and self.memory.host is not None:
            num_pages = len({page_id for sequence in group.sequences for page_id in sequence.page_ids})
            return self._prefers_swap(num_pages * self.page_size, num_pages)
        return self.preemption_mode == "swap"

    def _put_back(self, group: Group) -> None:
        """Makes the youngest running request wait, before all that wait; its tokens in flight still count."""
        for sequence in reversed(group.sequences):
            self.running.remove(sequence)
            self.waiting.appendleft(sequence)
            self._give_back(sequence)
            sequence.status = Status.WAITING
            sequence.num_preemptions += 1

    def _give_back(self, sequence: Sequence) -> None:
        """Takes pages, unless they were swapped out, and slot from a sequence; both may still be touched by its last step."""
        if not sequence.host_ids:
            self.memory.release(sequence)
            sequence.num_computed = 0
        if sequence.slot is not None:
            self.slots.release_after([sequence.slot + 1], sequence.last_step)
            sequence.slot = None

    # ---------------------------------------------------------------------------------------------------------- inside commit

    def _apply(self, plan: StepPlan, work: Work, row: int, result: StepResult) -> TokenEvent | None:
        """Gives one row's token to its sequence, which may have been preempted in the meantime."""
        sequence, group = work.sequence, work.sequence.group
        token = result.tokens[row]
        sequence.num_pending -= work.samples
        if work.samples and sequence.suspect:
            clear(sequence)
        if work.samples and token == INVALID_TOKEN:
            return self._end_invalid(sequence)
        self._settle(plan, work)
        if not work.samples:
            return None
        sequence.tokens.append(token)
        logprobs = result.logprobs[row] if result.logprobs else None
        reason = self._finish_reason(work, token)
        if reason is not None:
            self._finish(sequence, reason)
        return TokenEvent(
            sequence.request.id,
            sequence.index,
            (token,),
            () if logprobs is None else (logprobs,),
            finish_reason=reason,
            stop_reason=token if reason is FinishReason.STOP and token in (sequence.request.params.stop_token_ids or ()) else None,
            num_cached_tokens=group.num_cached_tokens or 0,
        )

    def _tell_prompt_logprobs(self, work: Work, found: tuple[TokenLogprobs, ...]) -> list[TokenEvent]:
        """Tells all samples of a request what one of them has learnt of the prompt, once each, whatever became of that one."""
        group = work.sequence.group
        news = found[max(0, group.num_prompt_logprobs - work.start) :]
        group.num_prompt_logprobs += len(news)
        if not news:
            return []
        return [TokenEvent(group.request.id, sequence.index, prompt_logprobs=news) for sequence in group.sequences]

    def _apply_beams(self, plan: StepPlan, group: Group, result: StepResult) -> list[TokenEvent]:
        """Goes on with a beam search, whose beams' rows are in this plan."""
        rows = [(row, work) for row, work in enumerate(plan.work) if work.sequence.group is group and work.beam_score is not None]
        for _, work in rows:
            work.sequence.num_pending -= 1
        if any(result.tokens[row] == INVALID_TOKEN for row, _ in rows):
            for _, work in rows:
                self.memory.forget(work.sequence)
            return self._end_all(group, "the model's output was not a number", "numerical_error")
        for _, work in rows:
            self._settle(plan, work)
            clear(work.sequence)
        parents = [work.sequence for _, work in rows]
        outputs = [parent.tokens[parent.num_prompt :] for parent in parents]
        search = group.beams
        if search is not None and (following := search.advance(outputs, result.beams[group.request.id])):
            self._branch(group, parents, following)
            return []
        return self._finish_beams(group)

    def _branch(self, group: Group, parents: Seq[Sequence], following: Seq[BeamCandidate]) -> None:
        """Makes the sequences of a search those that go on: the first child of a beam takes its place, the others fork from it."""
        heirs: dict[int, BeamCandidate] = {}
        others: list[BeamCandidate] = []
        for candidate in following:
            if candidate.parent in heirs:
                others.append(candidate)
            else:
                heirs[candidate.parent] = candidate
        staying = {parents[parent].index for parent in heirs}
        free = [sequence for sequence in group.sequences if sequence.index not in staying]
        for sequence, candidate in zip(free, others, strict=False):
            parent = parents[candidate.parent]
            self.memory.follow(sequence, parent)
            sequence.tokens = [*parent.tokens, candidate.token_id]
            sequence.score = candidate.score
            sequence.idle = False
        for sequence in free[len(others) :]:
            self.memory.release(sequence)
            sequence.num_computed = 0
            sequence.idle = True
        for index, candidate in heirs.items():
            parents[index].tokens.append(candidate.token_id)
            parents[index].score = candidate.score

    def _finish_beams(self, group: Group) -> list[TokenEvent]:
        """Ends a search: its best beams are the request's samples, all their tokens at once; the sequences beyond end with none."""
        results = group.beams.results(group.request.params.n) if group.beams is not None else ()
        events = []
        for sequence in tuple(group.sequences):
            found = results[sequence.index] if sequence.index < len(results) else None
            reason = found.finish_reason if found else FinishReason.LENGTH
            stop = found.tokens[-1] if found and reason is FinishReason.STOP else None
            self._finish(sequence, reason)
            events.append(
                TokenEvent(
                    group.request.id,
                    sequence.index,
                    tuple(found.tokens) if found else (),
                    finish_reason=reason,
                    stop_reason=stop if stop in (group.request.params.stop_token_ids or ()) else None,
                    num_cached_tokens=group.num_cached_tokens or 0,
                    cumulative_logprob=found.cumulative_logprob if found else None,
                )
            )
        return events

    def _settle(self, plan: StepPlan, work: Work) -> None:
        """Says that a row's tokens are in its sequence's pages, unless the sequence has got others since."""
        sequence = work.sequence
        if sequence.status is Status.RUNNING and 0 < sequence.first_step <= plan.step:
            self.memory.settle(sequence, work.end)

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

    def _end_all(self, group: Group, error: str, error_code: str) -> list[TokenEvent]:
        return [self._end(sequence, FinishReason.ERROR, error, error_code) for sequence in tuple(group.sequences)]

    def _end_invalid(self, sequence: Sequence) -> TokenEvent:
        self.memory.forget(sequence)
        return self._end(sequence, FinishReason.ERROR, "the model's output was not a number", "numerical_error")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.memory.release(sequence)
        self._give_back(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        group = sequence.group
        group.sequences.remove(sequence)
        leave(sequence)
        if not group.sequences:
            del self._groups[group.request.id]
        self._finish_times.append(self._clock())

    def retry_after_s(self) -> int:
        """Estimates when a place is free, in [1, 60] seconds, from how often sequences finished since there was nothing to do last.

        Callable from any thread.
        """
        since = self._busy_since
        times = [moment for moment in tuple(self._finish_times) if moment >= since] or [since]
        return max(1, min(60, math.ceil((self._clock() - times[0]) / len(times))))
