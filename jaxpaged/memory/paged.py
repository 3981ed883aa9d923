"""Our system: the scheduler that serves requests, with pages that hold nothing."""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Protocol

from jaxpaged.memory.arrivals import Arrivals
from jaxpaged.memory.ledger import Sample
from jaxpaged.memory.stand_in import StandIn
from jaxpaged.memory.workloads import STOP_TOKEN, Workload
from jaxpaged.scheduling.buckets import token_buckets
from jaxpaged.scheduling.pages import NULL_PAGE
from jaxpaged.scheduling.plan import StepPlan, StepResult, TokenEvent
from jaxpaged.scheduling.request import Request, SamplingParams
from jaxpaged.scheduling.scheduler import Scheduler


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedSetting:
    """What is the same for all replays of a comparison, and what varies.

    Attributes:
        num_pages: Pages of the pool, the null page included.
        num_sequences: Samples of each request, or the width of its beam search.
        beams: Whether each request is a beam search.
        entropy, likeness: See ``stand_in``.
        async_depth: Steps dispatched before the tokens of the first are read, 0 or 1.
        num_host_pages: Places in host memory for evicted pages.
        sliding_window: Tokens that a token sees if every layer has a window, else None.
    """

    num_pages: int
    page_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_sequences: int = 1
    beams: bool = False
    entropy: float = 1.0
    likeness: float = 0.9
    seed: int = 0
    async_depth: int = 1
    prefix_caching: bool = True
    num_host_pages: int = 0
    sliding_window: int | None = None


class Device(Protocol):
    """Answers plans, in the order in which they were made."""

    def answer(self, plan: StepPlan) -> StepResult:
        """Returns the result of a step."""
        ...


class PagedSystem:
    """Replays a workload; the steps are planned by ``Scheduler`` and answered by ``StandIn``, or by a device that is given.

    A sample ends with a stop token that the scheduler cannot foresee: ``max_tokens`` is as large as the door lets pass. Beams have no
    stop token, and end at ``max_tokens``.

    Attributes:
        scheduler: For its counters.
        hit_tokens: Prompt tokens found in the prefix cache, summed over requests.
    """

    def __init__(self, workload: Workload, setting: PagedSetting, device: Device | None = None) -> None:
        self.scheduler = Scheduler(
            num_pages=setting.num_pages,
            page_size=setting.page_size,
            max_num_seqs=setting.max_num_seqs,
            max_num_batched_tokens=setting.max_num_batched_tokens,
            max_model_len=setting.max_model_len,
            token_buckets=token_buckets(setting.max_num_batched_tokens, setting.max_num_seqs),
            max_waiting=setting.num_sequences * len(workload.calls),
            enable_prefix_caching=setting.prefix_caching,
            num_host_pages=setting.num_host_pages,
            sliding_window=setting.sliding_window,
            clock=lambda: 0.0,
        )
        self._calls = {str(place): call for place, call in enumerate(workload.calls)}
        self._setting = setting
        self._arrivals = Arrivals(workload)
        self._device = device or StandIn(self._calls, entropy=setting.entropy, likeness=setting.likeness, seed=setting.seed)
        self._unfinished: dict[str, int] = {}
        self.hit_tokens = 0

    def replay(self) -> list[Sample]:
        """Answers all calls; returns what was measured in each step."""
        samples = []
        in_flight: deque[StepPlan] = deque()
        self._submit()
        while self.scheduler.has_work:
            plan = self.scheduler.schedule()
            if plan is not None:
                in_flight.append(plan)
                samples.append(self._measure(plan))
            if in_flight and (plan is None or len(in_flight) > self._setting.async_depth):
                oldest = in_flight.popleft()
                for event in self.scheduler.commit(oldest, self._device.answer(oldest)):
                    self._receive(event)
                self._submit()
        return samples

    def _submit(self) -> None:
        for place in self._arrivals.due():
            request = self._request(str(place))
            self._unfinished[request.id] = request.params.num_sequences
            self.scheduler.add(request)

    def _request(self, name: str) -> Request:
        call, setting = self._calls[name], self._setting
        longest = min(setting.max_model_len, (setting.num_pages - 1) // setting.num_sequences * setting.page_size)
        if setting.beams:
            params = SamplingParams(
                n=setting.num_sequences,
                use_beam_search=True,
                beam_width=setting.num_sequences,
                temperature=0.0,
                max_tokens=len(call.output),
                ignore_eos=True,
            )
        else:
            params = SamplingParams(n=setting.num_sequences, max_tokens=max(len(call.output), longest - len(call.prompt)))
        return Request(id=name, prompt=call.prompt, params=params, eos_token_ids=(STOP_TOKEN,))

    def _receive(self, event: TokenEvent) -> None:
        if event.finish_reason is None:
            return
        self._unfinished[event.request_id] -= 1
        if not self._unfinished[event.request_id]:
            del self._unfinished[event.request_id]
            self.hit_tokens += event.num_cached_tokens
            self._arrivals.answered(int(event.request_id))

    def _measure(self, plan: StepPlan) -> Sample:
        """Counts the cells while ``plan`` runs. Only the pages at a sequence's end can hold fewer tokens than they have room for."""
        scheduler, size = self.scheduler, self.scheduler.page_size
        filled: dict[int, tuple[int, int]] = {}
        unshared = 0
        for sequence in scheduler.running:
            page_ids = sequence.page_ids
            unshared += len(page_ids) - page_ids.count(NULL_PAGE)
            whole = sequence.num_computed // size
            if whole < len(page_ids):
                total = self._calls[sequence.request.id].num_tokens
                for index in range(whole, len(page_ids)):
                    now, later = (max(0, min(size, tokens - index * size)) for tokens in (sequence.num_computed, total))
                    before = filled.get(page_ids[index], (0, 0))
                    filled[page_ids[index]] = max(before[0], now), max(before[1], later)
        used = scheduler.pages.num_used * size
        deferred = scheduler.pages.num_deferred * size
        tokens = used - sum(size - now for now, _ in filled.values())
        to_come = sum(max(0, later - now) for now, later in filled.values())
        return Sample(
            tokens=tokens,
            to_come=to_come,
            allocated=used + deferred,
            unshared=unshared * size + deferred,
            requests=len({sequence.request.id for sequence in scheduler.running}),
            waits=self._waits(plan),
        )

    def _waits(self, plan: StepPlan) -> bool:
        """Whether the first in line was not admitted though the step had room for its tokens, and a slot was free."""
        scheduler = self.scheduler
        if not scheduler.waiting or plan.num_tokens >= scheduler.max_num_batched_tokens:
            return False
        return scheduler.waiting[0].request.params.num_sequences <= scheduler.slots.num_free
