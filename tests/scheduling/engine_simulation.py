"""The simulation around the engine: everything may fail, at any moment, and what the engine makes of it is known exactly.

``EngineWorld`` is a ``World`` whose calls go through an ``Engine``. Its device, ``Faulty``, fails at dispatch, when a step is read and when
it is reset, loses its pool, stays away for a while or for good, answers with ids that no vocabulary has, and breaks on steps of certain
requests. Beyond what ``World`` verifies, it verifies after each call

* **readiness**: the engine is recovering exactly while something has failed and neither a step nor a reset has succeeded since; so an idle
  engine whose device has proven itself is ready, and a device is never used before it has;
* **giving up**: the engine gives up exactly when the device does not come back within all its resets, or no step can be planned; no request
  makes it, whatever it breaks and whenever its client leaves;
* **blame**: a request that breaks ``MAX_FAULTS`` steps alone, without a token between, is ended, though samples of it left in the meantime;
  nobody is ended that was in fewer failures than that; and where only requests break steps, nobody else is ended;
* **patience**: no reset comes before its pause is over;
* **books**: failures and ends are counted as they happened, and nothing is kept for those that are gone.

To run more than the test does::

    python tests/scheduling/engine_simulation.py --runs 100000 --start 1000000
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from fakes import DeviceFault, FakeHandle, FakeRunner, Violation
from scheduling.simulation import VOCAB, World, _random_request, random_scheduler, require

from jaxpaged.engine.engine import MAX_UNPLANNED, Engine
from jaxpaged.engine.recovery import RESET_PAUSES_S
from jaxpaged.errors import EngineStopped
from jaxpaged.scheduling.faults import MAX_FAULTS
from jaxpaged.scheduling.pages import OutOfPages, PageAllocator
from jaxpaged.scheduling.plan import StepPlan, StepResult, TokenEvent
from jaxpaged.scheduling.request import FinishReason, Request, Sequence, Status
from jaxpaged.scheduling.scheduler import Scheduler

MAX_TURNS = 6000


@dataclasses.dataclass(frozen=True)
class Rates:
    """How often what fails, as shares of the calls.

    Attributes:
        dispatch, read: Steps that fail when they are started, and when they are read.
        away: Failures after which resets fail too, some of them for good.
        allocate: Calls of an allocator that find nothing.
    """

    dispatch: float = 0.0
    read: float = 0.0
    away: float = 0.0
    allocate: float = 0.0


class Faulty(FakeRunner):
    """A fake device on which everything can fail. What it finds that can never be right is kept, since the engine survives any exception.

    Attributes:
        violation: The first thing that can never be right.
        proven: Nothing has failed since a step or a reset succeeded.
        failed_resets: Resets that failed in a row.
        not_before: Before this moment no reset is due.
        lost: The pool is gone, since a dispatch failed; nothing that is computed until the next reset means anything.
    """

    def __init__(self, *sizes: int, rng: random.Random, rates: Rates, clock: Callable[[], float], **options) -> None:
        super().__init__(*sizes, **options)
        self.violation: Violation | None = None
        self.proven = True
        self.failed_resets = 0
        self.not_before = 0.0
        self.lost = False
        self.wild: set[tuple[str, int]] = set()
        self.on_dispatch: Callable[[StepPlan], None] = lambda plan: None
        self.on_read: Callable[[StepPlan], None] = lambda plan: None
        self._rng = rng
        self._rates = rates
        self._clock = clock
        self._resets_to_fail = 0

    def dispatch(self, plan: StepPlan) -> FakeHandle:
        """Starts a step, or fails to."""
        try:
            require(self.proven, "a step was dispatched to a device that has not proven itself")
            if not self.lost and self._rng.random() < self._rates.dispatch:
                self.lost = True
            if self.lost:
                raise DeviceFault("the pool was lost")
            self.on_dispatch(plan)
            return super().dispatch(plan)
        except Violation as violation:
            self.violation = self.violation or violation
            raise

    def complete(self, handle: FakeHandle) -> StepResult:
        """Reads a step, or fails to."""
        try:
            result = super().complete(handle)
        except Violation as violation:
            self.violation = self.violation or violation
            raise
        if handle.fault is None and self._rng.random() < self._rates.read:
            raise DeviceFault(f"step {handle.plan.step} could not be read")
        self.on_read(handle.plan)
        tokens = [
            self._rng.choice((VOCAB, VOCAB + 5, -2)) if work.samples and self.is_wild(work.sequence, work.num_output) else token
            for work, token in zip(handle.plan.work, result.tokens, strict=True)
        ]
        return dataclasses.replace(result, tokens=tokens)

    def is_wild(self, sequence: Sequence, num_output: int) -> bool:
        """Whether the id sampled there is none that the vocabulary has."""
        return (sequence.request.id, num_output) in self.wild

    def failed(self) -> None:
        """The engine was told of a failure."""
        self.proven = False
        self.failed_resets = 0
        self.not_before = self._clock()
        if not self._resets_to_fail and self._rng.random() < self._rates.away:
            self._resets_to_fail = self._rng.choice((1, 1, 2, len(RESET_PAUSES_S), len(RESET_PAUSES_S) + 1))

    def restarted(self) -> None:
        """The engine was told to start anew, so that the pause is over."""
        self.failed()
        self._resets_to_fail = min(self._resets_to_fail, len(RESET_PAUSES_S))

    def reset(self) -> None:
        """Makes a new pool and proves itself, or stays away."""
        try:
            require(not self.proven, "a device was reset that had not failed")
            require(self._clock() >= self.not_before, "a reset came before its pause was over")
        except Violation as violation:
            self.violation = self.violation or violation
        if self._resets_to_fail:
            self._resets_to_fail -= 1
            self.failed_resets += 1
            if self.failed_resets <= len(RESET_PAUSES_S):
                self.not_before = self._clock() + RESET_PAUSES_S[self.failed_resets - 1]
            raise DeviceFault("the device is away")
        super().reset()
        self.proven, self.lost = True, False


class EngineWorld(World):
    """An engine, a device on which everything can fail, and everything that must be true of the two.

    Args:
        scheduler: The engine's.
        rng: Decides what fails.
        rates: How often.
        depth: Steps dispatched ahead.
        make: Makes the engine; tests pass one with a bug.
        fails: Which steps requests break, as in ``FakeRunner``.
        invalid: Which rows are no numbers, as there.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        rng: random.Random,
        rates: Rates,
        depth: int = 1,
        make: Callable[..., Engine] = Engine,
        max_calls: int = MAX_TURNS,
        **asked,
    ) -> None:
        super().__init__(scheduler, depth=depth, max_calls=max_calls, **asked)
        self.now = 0.0
        self.device = Faulty(
            scheduler.pages.num_pages,
            scheduler.page_size,
            rng=rng,
            rates=rates,
            clock=lambda: self.now,
            vocab_size=VOCAB,
            window=self.device.window,
            by_prompt_length=self.by_prompt_length,
            **asked,
        )
        self.device.on_dispatch = self._verify_writes
        self.device.on_read = self._on_read
        self.engine = self.target = make(scheduler, self.device, async_depth=depth, clock=lambda: self.now, sleep=self._sleep)
        self.rng = rng
        self.num_unplanned = 0
        self.num_all_unplanned = 0
        self.num_failures = 0
        self.num_refused = 0
        self.alone: Counter[str] = Counter()
        self.involved: Counter[str] = Counter()
        self._recover, self._schedule = scheduler.recover, scheduler.schedule
        scheduler.recover, scheduler.schedule = self._on_recover, self._on_schedule
        host = scheduler.memory.host
        for allocator in (scheduler.pages, scheduler.slots, *([host.pages] if host else [])):
            self._break_in(allocator, rates.allocate)

    # ------------------------------------------------------------------------------------------------------------ actions

    def add(self, request: Request) -> bool:
        """Adds a request; returns whether it was taken."""
        scheduler = self.scheduler
        full = scheduler.num_running + scheduler.num_waiting >= scheduler.max_num_seqs + scheduler.max_waiting
        taken = super().add(request)
        never = request.params.num_sequences > scheduler.max_num_seqs or self._never_fits(request)
        self.num_refused += full and not never
        return taken

    def step(self) -> None:
        """One turn of the engine's loop, perhaps before its time."""
        self.now += self.engine.wait_s * self.rng.choice((0.0, 0.5, 1.0, 1.5))
        self.call(self.engine.step)

    def _sleep(self, seconds: float) -> None:
        require(seconds > 0.0, "the engine sleeps for nothing")
        self.now += seconds

    def call(self, function: Callable[[], list[TokenEvent]]) -> None:
        """Calls the engine and verifies everything.

        Raises:
            EngineStopped: It gave up, and had to.
        """
        try:
            self.receive(function())
        except EngineStopped:
            self.verify_stopped()
            raise
        self.verify()

    def restart(self) -> None:
        """Aborts everything and starts anew, as after an interrupt."""
        for sample in self.samples.values():
            sample.aborted |= sample.end is None
        self.num_faults += 1
        self.device.restarted()
        self.alone.clear()
        self.call(self.engine.reset)
        require(not self.scheduler.has_work, "work is left after a reset")

    def reset_prefix_cache(self) -> None:
        """Forgets earlier prompts."""
        self.engine.reset_prefix_cache()
        self.verify()

    def accused(self) -> list[str]:
        """Requests that broke a step alone and are not past it."""
        return [request_id for request_id in self.alone if self._lives(request_id)]

    def _lives(self, request_id: str) -> bool:
        return any(sequence.request.id == request_id for sequence in self.scheduler.live_sequences())

    # ------------------------------------------------------------------------------------------------------------- checks

    def verify(self) -> None:
        """Verifies what ``World`` does, while the device holds anything, and what the engine says of itself."""
        if self.device.violation is not None:
            raise self.device.violation
        if self.device.lost:
            self.scheduler.check()
        else:
            super().verify()
        engine, device = self.engine, self.device
        require(engine.failed is None, "an engine that gave up goes on")
        require(engine.recovering == (not device.proven), "the engine is not recovering exactly while its device has not proven itself")
        require(engine.has_work == (self.scheduler.has_work or not device.proven), "the engine does not know whether it has work")
        wait_s = 0.0 if device.proven else max(0.0, device.not_before - self.now)
        require(engine.wait_s == wait_s, "the engine waits for another moment than its reset's")
        require(device.failed_resets <= len(RESET_PAUSES_S), "a device that does not come back was not given up")
        require(self.num_unplanned <= MAX_UNPLANNED, "an engine that cannot plan goes on")
        guilty = [request_id for request_id, count in self.alone.items() if count >= MAX_FAULTS]
        require(not any(map(self._lives, guilty)), "a request that breaks steps alone goes on")

    def verify_stopped(self) -> None:
        """Verifies that the engine had to give up, that it stays so, and that its books can be closed."""
        if self.device.violation is not None:
            raise self.device.violation
        due = self.device.failed_resets > len(RESET_PAUSES_S) or self.num_unplanned > MAX_UNPLANNED
        require(due, "the engine gave up, though nothing but requests failed")
        require(self.engine.failed is not None, "an engine that gave up does not say so")
        try:
            self.engine.step()
        except EngineStopped:
            pass
        else:
            raise Violation("an engine that gave up took a step")
        self.receive_last(self.engine.reset())
        require(not self.scheduler.has_work, "work is left after a reset")
        self.scheduler.check()

    def receive_last(self, events: list[TokenEvent]) -> None:
        """Takes the aborts of an engine that has given up."""
        for sample in self.samples.values():
            sample.aborted |= sample.end is None
        self.receive(events)

    def receive(self, events: list[TokenEvent]) -> None:
        """Compares events with the oracle, and the ends of the guilty with what they were in."""
        for event in events:
            if event.error_code == "internal_error":
                require(self.involved[event.request_id] >= MAX_FAULTS, "a request was ended that was in fewer failures than that takes")
        super().receive(events)

    def finish(self) -> None:
        """Runs until nothing is left, and verifies that nothing is."""
        self.drain()
        require(not self.engine.recovering, "an idle engine is not ready")
        self.engine.check()
        self._verify_counts()

    def _verify_counts(self) -> None:
        seen = self.engine.telemetry
        ends = Counter(str(sample.end.finish_reason) for sample in self.samples.values() if sample.end)
        require(dict(seen.finished) == dict(ends), "ends are miscounted")
        tokens = sum(len(sample.received) for sample in self.samples.values())
        require(seen.generation_tokens == tokens, "tokens are miscounted")
        require(seen.recoveries == self.num_failures, "failures are miscounted")
        require(seen.refused == self.num_refused, "refusals are miscounted")

    # -------------------------------------------------------------------------------------------- what happens within the calls

    def _on_schedule(self) -> StepPlan | None:
        try:
            return self._schedule()
        except OutOfPages:
            self.num_unplanned += 1
            self.num_all_unplanned += 1
            raise

    def _on_recover(self, plan: StepPlan | None) -> list[TokenEvent]:
        scheduler = self.scheduler
        self.num_faults += 1
        self.num_failures += 1
        self.device.failed()
        if plan is None:
            planned = scheduler.running or (scheduler.waiting[0].group.sequences if scheduler.waiting else [])
            sequences = [*planned, *(work.sequence for each in scheduler.in_flight for work in each.work)]
        else:
            sequences = [work.sequence for work in plan.work]
        groups = dict.fromkeys(sequence.group for sequence in sequences if sequence.status is not Status.FINISHED)
        for group in groups:
            self.involved[group.request.id] += 1
            for sequence in group.sequences:
                self.sample(sequence).failed_alone += 1
        if len(groups) == 1:
            self.alone[next(iter(groups)).request.id] += 1
        return self._recover(plan)

    def _on_read(self, plan: StepPlan) -> None:
        self.num_unplanned = 0
        for work in plan.work:
            if work.samples:
                self.alone.pop(work.sequence.request.id, None)
            spoilt = self.device.invalid(work.sequence, work.num_output) or self.device.is_wild(work.sequence, work.num_output)
            if work.samples and spoilt:
                for sequence in work.sequence.group.sequences if work.beam_score is not None else (work.sequence,):
                    self.sample(sequence).invalid = True

    def _break_in(self, allocator: PageAllocator, rate: float) -> None:
        take = allocator.take

        def failing(count: int) -> list[int]:
            if count and self.rng.random() < rate:
                raise OutOfPages("planted")
            return take(count)

        if rate:
            allocator.take = failing


# ------------------------------------------------------------------------------------------------------------- random worlds


@dataclasses.dataclass
class EngineOutcome:
    """Figures of one run."""

    steps: int
    finished: int
    aborted: int
    errors: int
    invalid: int
    failures: int
    unplanned: int
    left_accused: int
    restarts: int
    away: int
    gave_up: int
    swaps: int
    preemptions: int


def simulate_engine(
    seed: int,
    *,
    make: Callable[..., Engine] = Engine,
    mutate: Callable[[Scheduler], None] = lambda scheduler: None,
    num_requests: int = 12,
    max_calls: int = MAX_TURNS,
    rates: Rates | None = None,
    depth: int | None = None,
    poisoned: float | None = None,
    impatience: float | None = None,
    beams: float = 0.2,
    samples: tuple[int, ...] = (1, 1, 1, 2, 3),
    **options,
) -> EngineOutcome:
    """Runs a random world around an engine to its end.

    Args:
        seed: Decides everything that is not given. Of three worlds, one has only requests that break steps.
        make: Makes the engine.
        mutate: Plants a bug in the scheduler.
        num_requests: Requests that arrive.
        max_calls: Calls after which a world that does not end is given up.
        rates: Of failures; drawn by default.
        depth: Steps dispatched ahead; drawn by default.
        poisoned: Share of the requests that break steps, from some token on; drawn by default.
        impatience: Chance, each turn, that a client leaves whose request broke steps; drawn by default.
        beams: Share of the requests that are beam searches.
        samples: What each other request's ``n`` is drawn from.
        **options: Options of the scheduler that are not drawn.

    Raises:
        AssertionError: A check failed (``Violation``, ``InvariantError``), or anything else that the bug raised.
    """
    rng = random.Random(seed)
    scheduler = random_scheduler(rng, **options)
    mutate(scheduler)
    drawn = Rates(rng.choice((0, 0.02, 0.1)), rng.choice((0, 0.02, 0.1)), rng.choice((0, 0, 0.05, 0.3)), rng.choice((0, 0, 0.01, 0.05)))
    rates = rates or (Rates() if rng.random() < 1 / 3 else drawn)
    drawn_share = rng.choice((0.0, 0.1, 0.2, 0.5, 1.0))
    share = drawn_share if poisoned is None else poisoned
    poison = {f"r{i}" for i in range(num_requests) if rng.random() < share}
    poison_from = rng.choice((0, 0, 1, 2, 4))
    broken = {f"r{rng.randrange(num_requests)}"} if rng.random() < 0.2 else set()

    def fails(plan: StepPlan) -> bool:
        return any(work.sequence.request.id in poison and work.samples and work.num_output >= poison_from for work in plan.work)

    def invalid(sequence: Sequence, num_output: int) -> bool:
        return sequence.request.id in broken and num_output == 2

    drawn_depth = rng.choice((0, 1, 1))
    depth = drawn_depth if depth is None else depth
    world = EngineWorld(scheduler, rng=rng, rates=rates, depth=depth, make=make, max_calls=max_calls, fails=fails, invalid=invalid)
    if rng.random() < 0.2:
        world.device.wild = {(f"r{rng.randrange(num_requests)}", rng.randrange(4))}
    growth = rng.choice((0.0, 0.5, 1.0))
    left = [_random_request(rng, i, scheduler, growth, beams, samples) for i in reversed(range(num_requests))]
    abort_rate, arrival_rate = rng.choice((0.0, 0.03, 0.15)), rng.choice((0.02, 0.1, 0.4, 0.9))
    drawn_impatience = rng.choice((0.0, 0.2, 0.5))
    impatience = drawn_impatience if impatience is None else impatience
    reset_rate, restart_rate = rng.choice((0.0, 0.0, 0.05)), rng.choice((0.0, 0.0, 0.0, 0.01))
    figures: Counter[str] = Counter()
    try:
        for _ in range(max_calls):
            if left and rng.random() < arrival_rate:
                world.add(left.pop())
            if rng.random() < reset_rate:
                world.reset_prefix_cache()
            if world.samples and rng.random() < abort_rate:
                _leave(world, rng, *rng.choice(list(world.samples)))
            if (accused := world.accused()) and rng.random() < impatience:
                figures["left_accused"] += 1
                request_id = rng.choice(accused)
                _leave(world, rng, *rng.choice([key for key in world.samples if key[0] == request_id]))
            if rng.random() < restart_rate:
                figures["restarts"] += 1
                world.restart()
            if world.engine.has_work:
                figures["away"] += world.engine.recovering
                world.step()
            elif not left:
                break
        world.finish()
    except EngineStopped:
        figures["gave_up"] += 1
    ends = Counter(sample.end.error_code or sample.end.finish_reason for sample in world.samples.values() if sample.end)
    for sample in world.samples.values():
        require(sample.end is not None, "a sequence got no last event")
        world._verify_end(sample)
        is_poison = sample.request.id in poison
        if rates == Rates():
            require(is_poison or sample.end.error_code != "internal_error", "an innocent sequence was ended for another's fault")
        reached = is_poison and len(sample.golden) > poison_from
        own_end = sample.end.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) and not sample.aborted
        require(not (reached and own_end), "a request that breaks steps went on")
    return EngineOutcome(
        steps=scheduler.step,
        finished=ends[FinishReason.STOP] + ends[FinishReason.LENGTH],
        aborted=ends[FinishReason.ABORT],
        errors=ends["internal_error"],
        invalid=ends["numerical_error"],
        failures=world.num_failures,
        unplanned=world.num_all_unplanned,
        left_accused=figures["left_accused"],
        restarts=figures["restarts"],
        away=figures["away"],
        gave_up=figures["gave_up"],
        swaps=scheduler.num_swaps,
        preemptions=scheduler.num_preemptions,
    )


def _leave(world: EngineWorld, rng: random.Random, request_id: str, index: int) -> None:
    """A client leaves, or a stop string ends a sample of its; a beam search has none."""
    beams = world.samples[request_id, index].request.params.use_beam_search
    reason = FinishReason.ABORT if beams else rng.choice((FinishReason.ABORT, FinishReason.STOP))
    world.abort(request_id, rng.choice((None, index)), reason=reason)


def main() -> int:
    """Runs many seeds and prints the figures; 1 if a check failed."""
    parser = argparse.ArgumentParser(description="Simulate the engine in random worlds in which everything fails, and verify every call.")
    parser.add_argument("--runs", type=int, default=2000, help="worlds to run")
    parser.add_argument("--start", type=int, default=0, help="seed of the first; the others follow")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    totals: Counter[str] = Counter()
    failing: list[int] = []
    started = time.perf_counter()
    for seed in range(options.start, options.start + options.runs):
        try:
            totals.update(dataclasses.asdict(simulate_engine(seed)))
        except Exception as error:
            failing.append(seed)
            print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
    seconds = time.perf_counter() - started
    print(f"{options.runs} runs ({options.runs / seconds:.0f}/s), seeds {options.start} to {options.start + options.runs - 1}")
    print(", ".join(f"{count} {name}" for name, count in totals.items()) + f"; {len(failing)} violations")
    return 1 if failing else 0


if __name__ == "__main__":
    raise SystemExit(main())
