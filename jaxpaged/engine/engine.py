"""The engine: a scheduler that decides, a runner that computes, and the loop between them. Knows token ids only."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import NoReturn, Protocol

from jaxpaged.engine.recovery import Recovery, one_line
from jaxpaged.engine.telemetry import EngineStats, Telemetry
from jaxpaged.errors import EngineStopped, QueueFull
from jaxpaged.scheduling.plan import INVALID_TOKEN, StepPlan, StepResult, TokenEvent
from jaxpaged.scheduling.request import FinishReason, Request
from jaxpaged.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)

MAX_UNPLANNED = 6
"""Steps in a row that could not be planned and are recovered from; a good step starts the count anew. Steps that fail on the device are not
counted: each is a request's fault, which ``scheduling.faults`` finds, or the device's, which then does not stand the proof of its reset."""


class Handle(Protocol):
    """A dispatched step."""

    def read(self) -> StepResult:
        """Waits for the step's result; raises what went wrong with it."""
        ...


class StepRunner(Protocol):
    """What the engine needs of a runner; ``Runner`` is the real one, tests have others.

    Attributes:
        vocab_size: Every valid token id is below it.
    """

    vocab_size: int

    def dispatch(self, plan: StepPlan) -> Handle:
        """Starts a step."""
        ...

    def reset(self) -> None:
        """Makes the runner fit to start again, and proves that the device computes; see ``recovery.Resettable``."""
        ...


@dataclasses.dataclass(frozen=True)
class _Flight:
    """A step that was dispatched and not read."""

    plan: StepPlan
    handle: Handle
    dispatched_at: float


class Engine:
    """Requests in, token events out, one step at a time. Not thread-safe: one thread calls it.

    Args:
        scheduler: Decides.
        runner: Computes.
        async_depth: Steps dispatched before the tokens of the first are read: 1 keeps the device busy, 0 gives the same tokens.
        clock: Monotonic seconds.
        sleep: Waits for so many seconds; see ``wait_s``.

    Attributes:
        failed: Why the engine gave up; None while it works.
        progress_at: When a step was committed last or, if later, when work arrived at an idle engine.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        *,
        async_depth: int = 1,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.async_depth = async_depth
        self.failed: str | None = None
        self.telemetry = Telemetry(scheduler.page_size, clock)
        self.progress_at = clock()
        self._clock = clock
        self._sleep = sleep
        self._in_flight: deque[_Flight] = deque()
        self._recovery = Recovery(runner, clock)
        self._num_unplanned = 0

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has something to do, now or after ``wait_s``."""
        return self.scheduler.has_work or self.recovering

    @property
    def recovering(self) -> bool:
        """Whether something failed on the device and nothing has succeeded since, not even the proof that it computes."""
        return self._recovery.pending

    @property
    def wait_s(self) -> float:
        """Seconds until ``step`` can do anything: the pause between two resets of a device that does not come back; else 0.

        A caller with something else to do does that; ``step`` waits for what is left.
        """
        return self._recovery.wait_s

    def add(self, request: Request) -> None:
        """Takes a request in.

        Raises:
            RequestError: It can never fit.
            QueueFull: Too many are waiting.
        """
        was_idle = not self.scheduler.has_work
        try:
            self.scheduler.add(request)
        except QueueFull:
            self.telemetry.refused += 1
            raise
        self.telemetry.added(request)
        if was_idle:
            self.progress_at = self._clock()

    def abort(self, request_id: str, index: int | None = None, *, reason: FinishReason = FinishReason.ABORT) -> list[TokenEvent]:
        """Ends a request, or one of its samples, at any moment; returns the ends. Unknown ids give none.

        Args:
            request_id: Whose.
            index: Which sample; None for all.
            reason: STOP where a stop string was found in the text.
        """
        return self._send([dataclasses.replace(event, finish_reason=reason) for event in self.scheduler.abort(request_id, index)])

    def step(self) -> list[TokenEvent]:
        """Dispatches the next step, then reads and commits the one before it.

        At depth 1 the device computes the new step meanwhile; its inputs are the tokens that it sampled itself. When nothing new can be
        dispatched, everything in flight is read. After a failure nothing is planned until the device is back; see ``wait_s``.

        Returns:
            New tokens and ends of sequences.

        Raises:
            EngineStopped: The device does not come back, or no step can be planned; ``failed`` says why.
        """
        if self.failed is not None:
            raise EngineStopped(self.failed)
        if self.recovering:
            if wait_s := self.wait_s:
                self._sleep(wait_s)
            if not self._revive():
                return []
        try:
            plan = self.scheduler.schedule()
        except Exception as error:  # a bug of ours, in the middle of the books; no token is lost if they start anew
            return self._send(self._recover(None, error))
        if plan is not None:
            self._dispatch(plan)
        events: list[TokenEvent] = []
        while len(self._in_flight) > (self.async_depth if plan is not None else 0):
            events += self._commit_oldest()
        return self._send(events)

    def reset(self) -> list[TokenEvent]:
        """Aborts everything and starts from an empty pool; for a caller that was interrupted in the middle of a step.

        A device that does not come back at once is brought back by the next steps, as after a failure. An engine that gave up stays so.
        """
        self._in_flight.clear()
        self.scheduler.start_over()
        events: list[TokenEvent] = []
        for request_id in {sequence.request.id for sequence in self.scheduler.live_sequences()}:
            events += self.scheduler.abort(request_id)
        events = self._send(events)
        if self.failed is None:
            self._recovery.begin()
            self._revive()
        return events

    def reset_prefix_cache(self, tenant: str | None = None) -> None:
        """Forgets the keys and values of earlier prompts, one tenant's or all; those that running sequences read stay theirs."""
        self.scheduler.reset_prefix_cache(tenant)

    def check(self) -> None:
        """Verifies the scheduler's invariants and that nothing is kept for sequences that are gone; call when idle.

        Raises:
            InvariantError: Says which.
            RuntimeError: Records of finished sequences are left over.
        """
        self.scheduler.check()
        num_live = sum(1 for _ in self.scheduler.live_sequences())
        if self.telemetry.num_live != num_live:
            raise RuntimeError(f"{self.telemetry.num_live} records are kept for {num_live} live sequences")

    def stats(self) -> EngineStats:
        """Returns a snapshot of all counters; callable from any thread."""
        scheduler, seen = self.scheduler, self.telemetry
        memory = scheduler.memory
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            num_pages=scheduler.pages.num_pages,
            page_size=scheduler.page_size,
            pages_used=scheduler.num_pages_in_use,
            pages_free=scheduler.pages.num_free,
            pages_cached=scheduler.pages.num_cached,
            kv_cache_usage=scheduler.kv_usage,
            kv_waste=seen.kv_waste,
            prompt_tokens=seen.prompt_tokens,
            generation_tokens=seen.generation_tokens,
            preemptions=scheduler.num_preemptions,
            prefix_cache_queries=memory.prefix_queries,
            prefix_cache_hits=memory.prefix_hits,
            swaps=scheduler.num_swaps,
            page_copies=memory.num_copies,
            steps=seen.steps,
            step_tokens=seen.step_tokens,
            padding_tokens=seen.padding_tokens,
            compilations_after_ready=getattr(self.runner, "compilations_after_ready", 0),
            compile_s=getattr(self.runner, "compile_s", 0.0),
            recoveries=seen.recoveries,
            refused=seen.refused,
            finished=dict(seen.finished),
            histograms=seen.histograms(),
        )

    def _dispatch(self, plan: StepPlan) -> None:
        """Starts a step. One that cannot be started is read like the others, in its turn, and raises then."""
        self.telemetry.dispatched(plan)
        try:
            handle: Handle = self.runner.dispatch(plan)
        except Exception as error:
            handle = _FailedDispatch(error)
        self._in_flight.append(_Flight(plan, handle, self._clock()))

    def _commit_oldest(self) -> list[TokenEvent]:
        flight = self._in_flight.popleft()
        try:
            result = flight.handle.read()
        except Exception as error:
            return self._recover(flight.plan, error)
        now = self._clock()
        self.telemetry.committed(flight.plan, now - max(flight.dispatched_at, self.progress_at))
        self.progress_at = now
        self._num_unplanned = 0
        return self.scheduler.commit(flight.plan, self._with_valid_tokens(result))

    def _recover(self, plan: StepPlan | None, error: Exception) -> list[TokenEvent]:
        """Goes on after a failed step: the donated pool is gone, so it is made anew and everything running is computed again.

        Args:
            plan: The step; None if it could not even be planned.
            error: What it failed with.
        """
        step = self.scheduler.step + 1 if plan is None else plan.step
        logger.error("step %d failed (%s: %s); recomputing what ran", step, type(error).__name__, one_line(error))
        self.telemetry.recoveries += 1
        self._in_flight.clear()
        self._recovery.begin()
        self._num_unplanned += plan is None
        if self._num_unplanned > MAX_UNPLANNED:
            self._give_up(f"{self._num_unplanned} steps in a row could not be planned: {type(error).__name__}: {one_line(error)}")
        events = self.scheduler.recover(plan)
        self._revive()
        return events

    def _revive(self) -> bool:
        """Tries to bring the device back; returns whether it is back."""
        try:
            is_back = self._recovery.attempt()
        except EngineStopped as error:
            self._give_up(str(error))
        if is_back:
            self.progress_at = self._clock()
        return is_back

    def _give_up(self, reason: str) -> NoReturn:
        self.failed = reason
        raise EngineStopped(reason)

    def _with_valid_tokens(self, result: StepResult) -> StepResult:
        """Returns the result with ids that no vocabulary has marked as invalid, so that they end their sequence alone."""
        tokens, vocab = result.tokens, self.runner.vocab_size
        if tokens and (max(tokens) >= vocab or min(tokens) < INVALID_TOKEN):
            return dataclasses.replace(result, tokens=[token if 0 <= token < vocab else INVALID_TOKEN for token in tokens])
        return result

    def _send(self, events: list[TokenEvent]) -> list[TokenEvent]:
        if events:
            self.telemetry.sent(events)
        return events


class _FailedDispatch:
    """Stands for a step that could not even be started."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def read(self) -> StepResult:
        raise self._error
