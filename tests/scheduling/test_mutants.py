"""The tests of the tests: bugs that engines had, or that are easy to make, planted on purpose; the simulation must find each.

A bug of a feature is planted in random worlds in which the feature is on; ``MUTANTS`` says which.
``python tests/scheduling/test_mutants.py`` prints how many random worlds it takes, from five other seeds, and what found it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
from fakes import Violation
from scheduling.simulation import World, make_request, make_scheduler, simulate
from scheduling.test_kv_memory import random_memory_calls
from scheduling.test_pages import random_calls

from jaxpaged.errors import ConfigError
from jaxpaged.scheduling.kv_memory import KVMemory
from jaxpaged.scheduling.pages import NULL_PAGE, PageAllocator
from jaxpaged.scheduling.plan import INVALID_TOKEN, BeamCandidate, PageCopy, StepPlan, StepResult, TokenEvent, Work
from jaxpaged.scheduling.prefix_cache import PrefixCache, next_key, partition_key
from jaxpaged.scheduling.request import FinishReason, Group, Sequence, Status
from jaxpaged.scheduling.scheduler import Scheduler, _Draft


def without_null(page_ids) -> list[int]:
    return [page_id for page_id in page_ids if page_id != NULL_PAGE]


def replace_row(draft: _Draft, sequence: Sequence, **changes) -> None:
    """Changes the row that a sequence has just got."""
    for rows in (draft.decodes, draft.chunks):
        if rows and rows[-1].sequence is sequence:
            rows[-1] = dataclasses.replace(rows[-1], **changes)


def groups_of(sequences) -> Iterator[Group]:
    yield from {sequence.group: None for sequence in sequences}


# ------------------------------------------------------------------------------------------------------ pages and the fence


class NoFence(KVMemory):
    """Pages of a sequence that ends in flight are free at once (vLLM #45357, tpu-inference #3449)."""

    def release(self, sequence: Sequence) -> None:
        last_step, sequence.last_step = sequence.last_step, 0
        super().release(sequence)
        sequence.last_step = last_step


class NoSlotFence(Scheduler):
    """The slot of a sequence that ends in flight is free at once."""

    def _give_back(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self.slots.release([sequence.slot + 1])
            sequence.slot = None
        super()._give_back(sequence)


class FenceWithoutFlush(KVMemory):
    """Pages come back only when a later step completes, so at the end of a burst never (vllm-ascend #16315)."""

    def release(self, sequence: Sequence) -> None:
        sequence.last_step += 1
        super().release(sequence)
        sequence.last_step -= 1


class StaleFence(Scheduler):
    """The fence is the step of admission, not the last one that contains the sequence."""

    def _plan(self, draft: _Draft, sequence: Sequence, count: int) -> None:
        first_step, last_step = sequence.first_step, sequence.last_step
        super()._plan(draft, sequence, count)
        if first_step:
            sequence.last_step = last_step


class BoundaryTooFew(KVMemory):
    """A token that starts a new page is written without one (TensorRT-LLM #12404)."""

    def num_pages(self, num_tokens: int) -> int:
        return max(1, num_tokens // self.page_size)


class BoundaryTooMany(KVMemory):
    """A sequence that ends on a page boundary takes one page more."""

    def num_pages(self, num_tokens: int) -> int:
        return num_tokens // self.page_size + 1


class LeakOnFinish(KVMemory):
    """The last page of a table of three is forgotten."""

    def release(self, sequence: Sequence) -> None:
        if len(sequence.page_ids) % 3 == 0:
            sequence.page_ids = sequence.page_ids[:-1]
        super().release(sequence)


class LeakOnAbort(Scheduler):
    """Abort forgets the pages (vLLM #14326, SGLang #22273)."""

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if reason is FinishReason.ABORT:
            sequence.page_ids = []
        super()._finish(sequence, reason)


class DoubleRelease(Scheduler):
    """A preempted sequence gives its pages back twice."""

    def _preempt(self, group: Group) -> None:
        page_ids = list(group.sequences[0].page_ids)
        super()._preempt(group)
        self.pages.release(without_null(page_ids))


# --------------------------------------------------------------------------------------------------------------- preemption


class PreemptKeepsComputed(Scheduler):
    """A preempted sequence believes that its keys and values are still there."""

    def _put_back(self, group: Group) -> None:
        computed = [sequence.num_computed for sequence in group.sequences]
        super()._put_back(group)
        for sequence, count in zip(group.sequences, computed, strict=True):
            sequence.num_computed = count


class PreemptOldest(Scheduler):
    """The oldest is preempted for the sake of the young."""

    def _preempt(self, group: Group) -> None:
        super()._preempt(self.running[0].group)


class PreemptToBack(Scheduler):
    """A preempted request goes to the end of the line."""

    def _put_back(self, group: Group) -> None:
        super()._put_back(group)
        self.waiting.rotate(-len(group.sequences))


class PreemptCascade(Scheduler):
    """Pages that come back by themselves are not counted, so everybody is preempted for one page (vllm-ascend #16315)."""

    def _make_room(self, draft: _Draft, group: Group, needed: Callable[[], int]) -> bool:
        while needed() > self.pages.num_free and self.running[-1].group is not group:
            self._preempt(self.running[-1].group)
        return super()._make_room(draft, group, needed)


class ReadmitTooEarly(Scheduler):
    """A preempted sequence comes back while its sampled token is still in flight, in another slot."""

    def _fits(self, group: Group) -> bool:
        pending = [sequence.num_pending for sequence in group.sequences]
        for sequence in group.sequences:
            sequence.num_pending = 0
        fits = super()._fits(group)
        for sequence, count in zip(group.sequences, pending, strict=True):
            sequence.num_pending = count
        return fits


class SettleAfterReadmission(Scheduler):
    """The result of a step before a preemption settles pages that the sequence got since."""

    def _settle(self, plan: StepPlan, work: Work) -> None:
        if work.sequence.status is Status.RUNNING:
            self.memory.settle(work.sequence, work.end)


class SlotStateNotWritten(Scheduler):
    """A preempted sequence comes back to a slot that still holds somebody else's state."""

    def _plan(self, draft: _Draft, sequence: Sequence, count: int) -> None:
        super()._plan(draft, sequence, count)
        if sequence.num_preemptions:
            replace_row(draft, sequence, new_slot=False)


class PreemptedTokenDropped(Scheduler):
    """The token of a step before a preemption is dropped when it comes, but still counted as sampled."""

    def _apply(self, plan: StepPlan, work: Work, row: int, result: StepResult) -> TokenEvent | None:
        if work.sequence.status is Status.WAITING:
            return None
        return super()._apply(plan, work, row, result)


class SiblingsPreemptedApart(Scheduler):
    """Only the youngest sample of a request is preempted."""

    def _put_back(self, group: Group) -> None:
        sequences, group.sequences = group.sequences, group.sequences[-1:]
        super()._put_back(group)
        group.sequences = sequences


# ---------------------------------------------------------------------------------------------------- admission and fairness


class UnservableAdmitted(Scheduler):
    """The null page is counted as one that can hold a request (vLLM #52520)."""

    def check_size(self, request) -> None:
        self.pages.num_pages += 1
        try:
            super().check_size(request)
        finally:
            self.pages.num_pages -= 1


class HeadOvertaken(Scheduler):
    """A waiting request that does not fit is passed over for a smaller one behind it."""

    def _admit_waiting(self, draft: _Draft) -> None:
        super()._admit_waiting(draft)
        waiting = list(groups_of(self.waiting))
        if len(waiting) > 1 and draft.budget and not self._fits(waiting[0]) and self._fits(waiting[1]):
            for sequence in reversed(waiting[1].sequences):
                self.waiting.remove(sequence)
                self.waiting.appendleft(sequence)
            self._admit(draft, waiting[1])


class DecodesStarve(Scheduler):
    """An elder's prompt takes the whole budget."""

    def _continue_running(self, draft: _Draft) -> None:
        for group in groups_of(tuple(self.running)):
            if group.sequences[0].status is Status.RUNNING:
                self._advance(draft, group, owed=0)


class BudgetExceeded(Scheduler):
    """The budget is one token too generous."""

    def schedule(self) -> StepPlan | None:
        self.max_num_batched_tokens += 1
        try:
            return super().schedule()
        finally:
            self.max_num_batched_tokens -= 1


# ------------------------------------------------------------------------------------------------------------------- commit


class WrongRow(Scheduler):
    """A row gets the token of the row before it."""

    def _apply(self, plan: StepPlan, work: Work, row: int, result: StepResult) -> TokenEvent | None:
        return super()._apply(plan, work, row, dataclasses.replace(result, tokens=[result.tokens[-1], *result.tokens[:-1]]))


class ZombieApplied(Scheduler):
    """A sequence that has ended gets the token of the step that was in flight."""

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        ended = [row for row, work in enumerate(plan.work) if work.samples and work.sequence.status is Status.FINISHED]
        events = super().commit(plan, result)
        works = [(plan.work[row].sequence, result.tokens[row]) for row in ended]
        return events + [TokenEvent(sequence.request.id, sequence.index, (token,)) for sequence, token in works]


class LateResultApplied(Scheduler):
    """A result that comes a second time is applied a second time."""

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        if plan not in self.in_flight:
            self.in_flight.appendleft(plan)
        return super().commit(plan, result)


class SamplesTooEarly(Scheduler):
    """A chunk that ends one token before the prompt does counts as sampling."""

    def _plan(self, draft: _Draft, sequence: Sequence, count: int) -> None:
        super()._plan(draft, sequence, count)
        if sequence.num_computed == sequence.num_prompt - 1:
            replace_row(draft, sequence, samples=True)
            sequence.num_pending += 1


class MinTokensOffByOne(Scheduler):
    """A stop token ends a sequence one token too early."""

    def _finish_reason(self, work: Work, token: int) -> FinishReason | None:
        return super()._finish_reason(dataclasses.replace(work, num_output=work.num_output + 1), token)


class PromptLogprobsTwice(Scheduler):
    """A preempted prompt's log-probabilities are delivered again."""

    def _put_back(self, group: Group) -> None:
        super()._put_back(group)
        group.num_prompt_logprobs = 0


class NanIsAToken(Scheduler):
    """The mark for NaN logits is appended as if it were a token."""

    def _apply(self, plan: StepPlan, work: Work, row: int, result: StepResult) -> TokenEvent | None:
        tokens = [token if token != INVALID_TOKEN else 0 for token in result.tokens]
        return super()._apply(plan, work, row, dataclasses.replace(result, tokens=tokens))


# ----------------------------------------------------------------------------------------------------------------- recovery


class SuspectsTogether(Scheduler):
    """After a failure all of its requests are tried together again."""

    def _advance(self, draft: _Draft, group: Group, owed: int) -> None:
        super()._advance(draft, group, owed)
        draft.suspect = None


class NeighbourBlamed(Scheduler):
    """The only suspect of a failing step is not tried alone before it is blamed."""

    def _try_alone(self, draft: _Draft) -> bool:
        for group in groups_of(self.waiting):
            group.num_faults *= 2
        return False

    def _admit_waiting(self, draft: _Draft) -> None:
        faults = {group: group.num_faults for group in groups_of(self.waiting)}
        for group in faults:
            group.num_faults = 0
        super()._admit_waiting(draft)
        for group, num_faults in faults.items():
            group.num_faults = num_faults


class NobodyBlamed(Scheduler):
    """A request whose steps always fail is tried for ever."""

    def recover(self, plan: StepPlan | None) -> list[TokenEvent]:
        for group in groups_of(self.live_sequences()):
            group.num_faults = 0
        return super().recover(plan)


class RecoverKeepsComputed(Scheduler):
    """After a failure keys and values are believed to be still there."""

    def recover(self, plan: StepPlan | None) -> list[TokenEvent]:
        running = [(sequence, sequence.num_computed) for sequence in self.running]
        events = super().recover(plan)
        for sequence, num_computed in running:
            sequence.num_computed = num_computed
        return events


class RecoverForgetsPending(Scheduler):
    """After a failure tokens that were in flight are still waited for."""

    def recover(self, plan: StepPlan | None) -> list[TokenEvent]:
        pending = {sequence: sequence.num_pending for sequence in self.live_sequences()}
        events = super().recover(plan)
        for sequence, num_pending in pending.items():
            sequence.num_pending = num_pending
        return events


class RecoverKeepsTheCache(PrefixCache):
    """After a failure the prefix cache still knows pages of the pool that is gone."""

    def reset(self) -> None:
        self.pages.reset()


# --------------------------------------------------------------------------------------------------------- forks and copies


class SharedPageWritten(PageAllocator):
    """A page is written although others read it: no copy-on-write."""

    def is_exclusive(self, page_id: int, fewer: int = 0) -> bool:
        return not self.is_kept(page_id)


class CachedPageWritten(PageAllocator):
    """A page is written by its only reader although it is in the prefix cache."""

    def is_exclusive(self, page_id: int, fewer: int = 0) -> bool:
        return self.reference_count(page_id) - fewer == 1


class CopyNotListed(KVMemory):
    """The block table on the device is not told of the copy."""

    def grow(self, sequence: Sequence, end: int) -> None:
        listed = sequence.num_listed
        super().grow(sequence, end)
        sequence.num_listed = listed


class CopyOfAnotherPage(KVMemory):
    """The copy is made of the neighbour of the page."""

    def grow(self, sequence: Sequence, end: int) -> None:
        count = len(self._copies)
        super().grow(sequence, end)
        for i in range(count, len(self._copies)):
            source, destination = self._copies[i]
            self._copies[i] = PageCopy(1 + source % (self.pages.num_pages - 1), destination)


class CopyNotMade(KVMemory):
    """The page for the copy is taken, and nothing copied into it."""

    def take_moves(self):
        transfers, _ = super().take_moves()
        return transfers, ()


class CopyUncounted(KVMemory):
    """Room is made for pages that a sequence adds, but not for those that it copies."""

    def shortfall(self, ends) -> int:
        return sum(max(0, self.num_pages(end) - len(sequence.page_ids)) for sequence, end in ends)


class SourceFreeTooEarly(KVMemory):
    """A page of the prefix cache may be evicted, and overwritten, before the copy of it is made."""

    def grow(self, sequence: Sequence, end: int) -> None:
        super().grow(sequence, end)
        for page_id, _ in self._sources:
            self.pages.release([page_id])
        self._sources = []


class ForkOnePageTooFew(KVMemory):
    """A fork does not get the last page of the prompt."""

    def fork(self, sequence: Sequence, source: Sequence) -> None:
        super().fork(sequence, source)
        if len(sequence.page_ids) > 1:
            self.pages.release(without_null([sequence.page_ids.pop()]))


class ForkOnePageTooMany(KVMemory):
    """A fork also gets the page behind the prompt, if there is one."""

    def fork(self, sequence: Sequence, source: Sequence) -> None:
        super().fork(sequence, source)
        at = len(sequence.page_ids)
        self.pages.share(source.page_ids[at : at + 1])
        sequence.page_ids += source.page_ids[at : at + 1]


class ForkUncounted(KVMemory):
    """A fork is no reader of the pages that it gets."""

    def fork(self, sequence: Sequence, source: Sequence) -> None:
        super().fork(sequence, source)
        self.pages.release(without_null(sequence.page_ids))


class ForkComputesNothing(KVMemory):
    """A fork does not compute the prompt's last token again."""

    def fork(self, sequence: Sequence, source: Sequence) -> None:
        super().fork(sequence, source)
        sequence.num_computed = source.num_prompt


class ForkTooEarly(Scheduler):
    """Samples fork in the very step that computes the prompt's end, before there is anything to copy."""

    def _advance(self, draft: _Draft, group: Group, owed: int) -> None:
        super()._advance(draft, group, owed)
        self._fork(group)
        for sequence in group.active:
            if group.beams is None and sequence.status is Status.RUNNING and not sequence.first_step and draft.budget > owed:
                self._continue(draft, sequence, 1)


# ------------------------------------------------------------------------------------------------------------- prefix cache


class KeyWithoutTenant(KVMemory):
    """The keys of a text are the same for all tenants."""

    def _keys(self, sequence: Sequence) -> list[bytes]:
        request = sequence.group.request
        sequence.group.request = dataclasses.replace(request, tenant="")
        keys = super()._keys(sequence)
        sequence.group.request = request
        return keys


class KeyWithoutPromptLength(KVMemory):
    """The keys of a text are the same whatever the prompt's length, though the numbers are not."""

    def _keys(self, sequence: Sequence) -> list[bytes]:
        self._by_prompt_length = False
        keys = super()._keys(sequence)
        self._by_prompt_length = True
        return keys


class KeyWithoutParent(KVMemory):
    """A page is found by its own tokens, whatever came before."""

    def _keys(self, sequence: Sequence) -> list[bytes]:
        size, tokens = self.page_size, sequence.tokens
        start = partition_key(sequence.request.tenant)
        for at in range(len(sequence.page_keys), len(tokens) // size):
            sequence.page_keys.append(next_key(start, tokens[at * size : (at + 1) * size]))
        return sequence.page_keys


class UnsettledCached(Scheduler):
    """Pages are in the prefix cache as soon as the step that computes them is planned."""

    def _plan(self, draft: _Draft, sequence: Sequence, count: int) -> None:
        super()._plan(draft, sequence, count)
        self.memory.settle(sequence, sequence.num_computed)


class PartlyFilledCached(KVMemory):
    """The page that the next chunk goes on in is in the prefix cache already."""

    def settle(self, sequence: Sequence, end: int) -> None:
        super().settle(sequence, min(len(sequence.page_ids), self.num_pages(end)) * self.page_size)


class FullHitComputesNothing(KVMemory):
    """A prompt that is cached whole is not computed at all, so that there is nothing to sample from."""

    def begin(self, sequence: Sequence) -> None:
        super().begin(sequence)
        if sequence.num_registered * self.page_size >= len(sequence.tokens):
            sequence.num_computed = len(sequence.tokens)


class HitsWithPromptLogprobs(KVMemory):
    """A prompt is found in the cache although its log-probabilities are asked for."""

    def _may_hit(self, sequence: Sequence) -> bool:
        return self.enable_prefix_caching


class NanStaysCached(KVMemory):
    """Pages of a sequence whose logits were no numbers can be found by others."""

    def forget(self, sequence: Sequence) -> None:
        pass


class KnownPageIsFree(PrefixCache):
    """A page in the prefix cache is free when its last reader leaves, and found all the same."""

    def put(self, key: bytes, page_id: int) -> None:
        super().put(key, page_id)
        self.pages.drop(page_id)


class EvictedPageIsFound(PrefixCache):
    """A page that was evicted is still found, with what its new owner wrote."""

    def _evicted(self, page_id: int) -> None:
        key = self._key_of[page_id]
        super()._evicted(page_id)
        self._page_of[key] = page_id


class ResetFreesWhatIsRead(KVMemory):
    """Forgetting the prefix cache frees its pages, those that are read, too."""

    def reset_prefix_cache(self, tenant: str | None = None) -> None:
        read = [page_id for page_id in self.device._key_of if self.pages.reference_count(page_id)]
        super().reset_prefix_cache(tenant)
        self.pages.release(read)


# -------------------------------------------------------------------------------------------------------------- host memory


class SwapInAnotherOrder(KVMemory):
    """Pages come back in another order than they went."""

    def swap_in(self, group: Group) -> None:
        super().swap_in(group)
        group.sequences[0].page_ids[:2] = group.sequences[0].page_ids[1::-1]


class SwapForgetsAReader(KVMemory):
    """A place that several sequences share has one reader too many, and is never free again."""

    def swap_out(self, group: Group) -> bool:
        done = super().swap_out(group)
        places = [place for sequence in group.sequences for place in sequence.host_ids if place != NULL_PAGE]
        self.host.pages.share({place for place in places if places.count(place) > 1})
        return done


class SwapOutLate(KVMemory):
    """Pages are moved to host memory one step too late, when somebody else has written to them."""

    def take_moves(self):
        transfers, copies = super().take_moves()
        late, self.late = getattr(self, "late", ()), tuple(each for each in transfers if each.to_host)
        return (*late, *(each for each in transfers if not each.to_host)), copies


class RestoreBeforeSpill(KVMemory):
    """Pages come back before others go, whatever was decided first: a place is read before it is written, a page written too early."""

    def take_moves(self):
        transfers, copies = super().take_moves()
        return tuple(sorted(transfers, key=lambda each: each.to_host)), copies


class SpillBeforeRestore(KVMemory):
    """Pages go before others come back, whatever was decided first: a place is overwritten before it is read."""

    def take_moves(self):
        transfers, copies = super().take_moves()
        return tuple(sorted(transfers, key=lambda each: not each.to_host)), copies


class TransfersJoined(KVMemory):
    """Moves of one direction are made at once, though a later one needs what an earlier one leaves."""

    def take_moves(self):
        transfers, copies = super().take_moves()
        return tuple(sorted(transfers, key=lambda each: each.to_host != transfers[0].to_host)), copies


class RestoreOfAnotherPlace(KVMemory):
    """What comes back from host memory is what lies beside it."""

    def take_moves(self):
        transfers, copies = super().take_moves()
        beside = {place: 1 + place % (self.host.pages.num_pages - 1) for _, _, place in transfers}
        return tuple(each if each.to_host else each._replace(host_id=beside[each.host_id]) for each in transfers), copies


class RestoreLate(KVMemory):
    """Pages come back one step too late, when their places are free already."""

    def take_moves(self):
        transfers, copies = super().take_moves()
        late, self.late = getattr(self, "late", ()), tuple(each for each in transfers if not each.to_host)
        return (*(each for each in transfers if each.to_host), *late), copies


class SwappedInPartly(KVMemory):
    """The last sample of a request that was swapped out is left behind."""

    def swap_in(self, group: Group) -> None:
        sequences = group.sequences
        group.sequences = sequences[:-1] or sequences
        super().swap_in(group)
        group.sequences = sequences


class SpillsGarbage(KVMemory):
    """A page that is evicted is said to be in host memory, and never moved there."""

    def _spill(self, key: bytes, page_id: int) -> None:
        super()._spill(key, page_id)
        if self._transfers and self._transfers[-1].to_host and self._transfers[-1].page_id == page_id:
            self._transfers.pop()


# ----------------------------------------------------------------------------------------------------------- beams, windows


class BeamsApart(Scheduler):
    """Beams go on one by one, as samples do."""

    def _num_next(self, sequence: Sequence, budget: int) -> int:
        beams, sequence.group.beams = sequence.group.beams, None
        count = super()._num_next(sequence, budget)
        sequence.group.beams = beams
        return count


class DeadBeamLeaks(Scheduler):
    """Pages of a beam that does not go on are never given back."""

    def _branch(self, group: Group, parents, following) -> None:
        dead = [parent for i, parent in enumerate(parents) if all(each.parent != i for each in following)]
        for parent in dead[:1]:
            self.pages.share(without_null(parent.page_ids))
        super()._branch(group, parents, following)


class ChildOfALongerParent(Scheduler):
    """The second child of a beam begins with the tokens of the first."""

    def _branch(self, group: Group, parents, following) -> None:
        taken = set()
        for candidate in following:
            if candidate.parent in taken:
                continue
            taken.add(candidate.parent)
            parents[candidate.parent].tokens.append(candidate.token_id)
        super()._branch(group, parents, following)
        for parent in (parents[i] for i in taken):
            parent.tokens.pop()


class ChildWithoutScore(Scheduler):
    """The second child of a beam has the score of its parent."""

    def _branch(self, group: Group, parents, following) -> None:
        scores = [parent.score for parent in parents]
        super()._branch(group, parents, [BeamCandidate(i, token, scores[i]) for i, token, _ in following])


class ChildSharesNoPages(KVMemory):
    """The second child of a beam is no reader of its parent's pages."""

    def follow(self, sequence: Sequence, parent: Sequence) -> None:
        super().follow(sequence, parent)
        self.pages.release(without_null(sequence.page_ids))


class WindowOnePageTooShort(KVMemory):
    """A page that the next token still sees is given back."""

    def _num_unread(self, position: int) -> int:
        return super()._num_unread(position + self.page_size)


class WindowFreesWhatForksNeed(KVMemory):
    """The end of the prompt is given back before the forks have got it."""

    def leave_window(self, sequence: Sequence) -> None:
        sequences, sequence.group.sequences = sequence.group.sequences, [sequence]
        super().leave_window(sequence)
        sequence.group.sequences = sequences


CACHE = {"enable_prefix_caching": True}
NO_CACHE = {"enable_prefix_caching": False}
SWAP = {"num_host_pages": 20, "preemption_mode": "swap", "num_pages": 7, "headroom": 0}
TIER = {"enable_prefix_caching": True, "num_host_pages": 6, "num_pages": 10}
SAMPLES = {"samples": (2, 3), "max_num_seqs": 5}
BEAMS = {"beams": 0.8, "max_num_seqs": 5}
WINDOW = {"sliding_window": 3}
TIGHT = {"num_pages": 7, "headroom": 0}
FAULTS = {"fault_rate": 0.05}
ALONE = {"samples": (1,), "beams": 0.0, "sliding_window": None, "enable_prefix_caching": False}

MUTANTS: dict[type, dict[str, object]] = {
    NoFence: NO_CACHE,
    NoSlotFence: {},
    FenceWithoutFlush: {},
    StaleFence: {},
    BoundaryTooFew: {},
    BoundaryTooMany: {},
    LeakOnFinish: {},
    LeakOnAbort: {},
    DoubleRelease: TIGHT,
    PreemptKeepsComputed: TIGHT,
    PreemptOldest: TIGHT,
    PreemptToBack: TIGHT,
    PreemptCascade: TIGHT | ALONE,
    SlotStateNotWritten: TIGHT,
    PreemptedTokenDropped: TIGHT,
    SiblingsPreemptedApart: TIGHT | SAMPLES,
    UnservableAdmitted: {},
    HeadOvertaken: {},
    BudgetExceeded: {},
    WrongRow: {},
    ZombieApplied: {},
    LateResultApplied: {},
    SamplesTooEarly: {},
    MinTokensOffByOne: {},
    PromptLogprobsTwice: TIGHT,
    NanIsAToken: {},
    SuspectsTogether: {},
    NeighbourBlamed: FAULTS,
    NobodyBlamed: {},
    RecoverKeepsComputed: {},
    RecoverForgetsPending: {},
    RecoverKeepsTheCache: CACHE,
    SharedPageWritten: SAMPLES,
    CachedPageWritten: CACHE,
    CopyNotListed: SAMPLES,
    CopyOfAnotherPage: SAMPLES,
    CopyNotMade: SAMPLES,
    CopyUncounted: SAMPLES | TIGHT,
    ForkOnePageTooFew: SAMPLES,
    ForkOnePageTooMany: SAMPLES,
    ForkUncounted: SAMPLES,
    ForkComputesNothing: SAMPLES,
    ForkTooEarly: SAMPLES,
    KeyWithoutTenant: CACHE,
    KeyWithoutPromptLength: CACHE | {"cache_by_prompt_length": True},
    KeyWithoutParent: CACHE,
    UnsettledCached: CACHE,
    PartlyFilledCached: CACHE,
    FullHitComputesNothing: CACHE,
    HitsWithPromptLogprobs: CACHE,
    NanStaysCached: CACHE,
    KnownPageIsFree: CACHE,
    EvictedPageIsFound: CACHE,
    ResetFreesWhatIsRead: CACHE,
    SwapInAnotherOrder: SWAP,
    SwapForgetsAReader: SWAP | SAMPLES,
    SwapOutLate: SWAP,
    RestoreBeforeSpill: SWAP,
    SpillBeforeRestore: TIER,
    TransfersJoined: TIER,
    RestoreOfAnotherPlace: TIER,
    RestoreLate: TIER,
    SwappedInPartly: SWAP | SAMPLES,
    SpillsGarbage: TIER,
    BeamsApart: BEAMS,
    DeadBeamLeaks: BEAMS,
    ChildOfALongerParent: BEAMS,
    ChildWithoutScore: BEAMS,
    ChildSharesNoPages: BEAMS,
    WindowOnePageTooShort: WINDOW,
    WindowFreesWhatForksNeed: WINDOW | SAMPLES,
}
"""Each bug, and what worlds are made for it."""

LIMIT = 300
"""Worlds within which each of them must be found."""

RARE_MUTANTS: dict[type, dict[str, object]] = {
    ReadmitTooEarly: SWAP | {"num_pages": 10, "page_size": 2, "depth": 2},
    SettleAfterReadmission: CACHE | TIGHT | {"num_pages": 10, "page_size": 2, "depth": 3, "long_prefill_token_threshold": 2},
    SourceFreeTooEarly: CACHE | {"num_pages": 6, "page_size": 1, "num_host_pages": 20, "max_num_seqs": 5},
}
"""Bugs that show only when several things happen in one step or at depth 2 and more: found in one world of some hundred."""

RARE_LIMIT = 3000


# ---------------------------------------------------------------------------------------------------------------- allocator


class SharesForFree(PageAllocator):
    """A second reader is not counted."""

    def share(self, page_ids) -> None:
        super().share(page_ids)
        for page_id in page_ids:
            self._readers[page_id] -= 1


class CompletesTooMuch(PageAllocator):
    """A completed step also frees what waits for the next one."""

    def complete(self, step: int) -> None:
        super().complete(step + 1)
        self._completed = step


class FreesWhatIsRead(PageAllocator):
    """A page whose fence has passed is free although somebody shares it."""

    def _let_go(self, page_ids) -> None:
        super()._let_go(page_ids)
        self._free += [page_id for page_id in page_ids if self._readers[page_id]]


class HandsOutTheNullPage(PageAllocator):
    """Page 0 is in the free list."""

    def __init__(self, num_pages: int, on_evict=lambda page_id: None) -> None:
        super().__init__(num_pages, on_evict)
        self._free.insert(0, 0)


class KeptPageIsFree(PageAllocator):
    """A page that is kept is free when its last reader leaves."""

    def _put_down(self, page_id: int) -> None:
        self._free.append(page_id)


class EvictsBeforeFree(PageAllocator):
    """A cached page is evicted although another one is free."""

    def take(self, count: int) -> list[int]:
        hidden, self._free = self._free, self._free[:0] if self._cached else self._free
        try:
            return super().take(count)
        finally:
            self._free = hidden if hidden is not self._free else self._free


class EvictsTheNewest(PageAllocator):
    """The page that was used last is evicted first."""

    def take(self, count: int) -> list[int]:
        self._cached = dict(reversed(self._cached.items()))
        try:
            return super().take(count)
        finally:
            self._cached = dict(reversed(self._cached.items()))


class EvictsInSilence(PageAllocator):
    """Nobody is told that a page is evicted."""

    def __init__(self, num_pages: int, on_evict=lambda page_id: None) -> None:
        super().__init__(num_pages)


ALLOCATOR_MUTANTS = [
    SharesForFree,
    CompletesTooMuch,
    FreesWhatIsRead,
    HandsOutTheNullPage,
    KeptPageIsFree,
    EvictsBeforeFree,
    EvictsTheNewest,
    EvictsInSilence,
]


# ------------------------------------------------------- bugs that cost time only, so that the tokens do not tell: KVMemory's model


class EvictsTheHeadFirst(KVMemory):
    """The first page of a text is evicted before its last, so that none of it is found any more."""

    def release(self, sequence: Sequence) -> None:
        sequence.page_ids.reverse()
        sequence.host_ids.reverse()
        super().release(sequence)


class EvictedNotSpilled(KVMemory):
    """A page that is evicted does not go to host memory, though there is room."""

    def _spill(self, key: bytes, page_id: int) -> None:
        pass


class NothingFoundInHostMemory(KVMemory):
    """What is in host memory is not looked up."""

    def _hits(self, sequence: Sequence, short_of: int = 0):
        host, self.host = self.host, None
        hits = super()._hits(sequence, short_of)
        self.host = host
        return hits


class DecodedTokensNotCached(KVMemory):
    """Only pages of the prompt are put into the prefix cache."""

    def settle(self, sequence: Sequence, end: int) -> None:
        super().settle(sequence, min(end, sequence.num_prompt))


MEMORY_MUTANTS = [
    EvictsTheHeadFirst,
    EvictedNotSpilled,
    NothingFoundInHostMemory,
    DecodedTokensNotCached,
    SharedPageWritten,
    CachedPageWritten,
    CopyOfAnotherPage,
    ForkUncounted,
    KeyWithoutTenant,
    SwapInAnotherOrder,
    SwapForgetsAReader,
    SpillBeforeRestore,
]


def runs_to_detection(check: Callable[[int], object], start: int, limit: int) -> tuple[int | None, str]:
    """Returns how many seeds it takes until ``check`` raises, and what it raises."""
    for seed in range(start, start + limit):
        try:
            check(seed)
        except ConfigError:
            raise  # no bug was found: the world is impossible
        except Exception as error:
            return seed - start + 1, f"{type(error).__name__}: {error}"
    return None, "not found"


def turn_into(memory: KVMemory, mutant: type) -> None:
    """Plants a bug in a memory, in the prefix caches of both tiers, or in the allocator of the pool."""
    if issubclass(mutant, KVMemory):
        memory.__class__ = mutant
        memory.device._on_evict = memory._spill  # bound when it was made
    elif issubclass(mutant, PrefixCache):
        for tier in (memory.device, memory.host):
            if tier is not None:
                tier.__class__ = mutant
                tier.pages._on_evict = tier._evicted
    else:
        memory.device.pages.__class__ = mutant


def plant(mutant: type, options: dict[str, object]) -> Callable[[int], object]:
    """Returns a simulation with the bug in it."""
    options = dict(options)
    headroom = options.pop("headroom", None)

    def mutate(scheduler: Scheduler) -> None:
        scheduler.headroom = scheduler.headroom if headroom is None else headroom
        if issubclass(mutant, Scheduler):
            scheduler.__class__ = mutant
        else:
            turn_into(scheduler.memory, mutant)

    return lambda seed: simulate(seed, mutate=mutate, max_calls=4000, **options)


def plant_in_memory(mutant: type) -> Callable[[int], object]:
    """Returns random calls of a memory with the bug in it."""

    def make(**options) -> KVMemory:
        memory = KVMemory(**options)
        turn_into(memory, mutant)
        return memory

    return lambda seed: random_memory_calls(seed, 200, make=make)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_simulation_finds(mutant):
    found, _ = runs_to_detection(plant(mutant, MUTANTS[mutant]), 100_000, LIMIT)
    assert found is not None, f"{LIMIT} worlds did not find: {mutant.__doc__}"


@pytest.mark.slow
@pytest.mark.parametrize("mutant", RARE_MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_simulation_finds_even(mutant):
    found, _ = runs_to_detection(plant(mutant, RARE_MUTANTS[mutant]), 100_000, RARE_LIMIT)
    assert found is not None, f"{RARE_LIMIT} worlds did not find: {mutant.__doc__}"


def test_a_starving_decode_is_found():
    """Random worlds reach this state too seldom (one in some hundred to thousand), so it is made by hand."""
    scheduler = make_scheduler(max_num_batched_tokens=8, long_prefill_token_threshold=4, enable_prefix_caching=False)
    scheduler.__class__ = DecodesStarve
    world = World(scheduler, depth=0)
    world.add(make_request("elder", 30, 2))
    world.add(make_request("decode", 2, 9))
    world.step()
    scheduler.max_chunk = 8
    with pytest.raises(Violation, match="a decode that needs no page was passed over"):
        world.dispatch()


@pytest.mark.parametrize("mutant", ALLOCATOR_MUTANTS, ids=lambda mutant: mutant.__name__)
def test_random_calls_find(mutant):
    found, _ = runs_to_detection(lambda seed: random_calls(seed, 1000, make=mutant), 100_000, 20)
    assert found is not None, f"20 x 1000 calls did not find: {mutant.__doc__}"


@pytest.mark.parametrize("mutant", MEMORY_MUTANTS, ids=lambda mutant: mutant.__name__)
def test_random_calls_of_the_memory_find(mutant):
    found, _ = runs_to_detection(plant_in_memory(mutant), 100_000, 300)
    assert found is not None, f"300 x 200 calls did not find: {mutant.__doc__}"


@pytest.mark.parametrize("mutant", [*MUTANTS, *RARE_MUTANTS, *MEMORY_MUTANTS, *ALLOCATOR_MUTANTS], ids=lambda mutant: mutant.__name__)
def test_what_a_mutant_replaces_is_still_there(mutant):
    """Or the bug is not planted, and whatever is found is something else."""
    own = [name for name, value in vars(mutant).items() if callable(value)]
    assert own
    assert all(hasattr(mutant.__base__, name) for name in own)


def main() -> None:
    """Prints a table: mutant, worlds to detection from each of five seeds, what found it."""
    checks = {mutant: plant(mutant, options) for mutant, options in (MUTANTS | RARE_MUTANTS).items()}
    checks |= {mutant: lambda seed, make=mutant: random_calls(seed, 1000, make=make) for mutant in ALLOCATOR_MUTANTS}
    checks |= {mutant: plant_in_memory(mutant) for mutant in MEMORY_MUTANTS[:4]}
    for mutant, check in checks.items():
        results = [runs_to_detection(check, start, 1000) for start in range(200_000, 700_000, 100_000)]
        print(f"| {mutant.__name__} | {', '.join(str(found or '>1000') for found, _ in results)} | {results[0][1][:80]} |", flush=True)


if __name__ == "__main__":
    main()
