"""The tests of the engine's worlds: bugs of counting, blaming, proving and giving up, planted on purpose; each must be found.

Some of them this engine had. ``python tests/scheduling/test_engine_mutants.py`` prints how many random worlds it takes, and what found it.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
from scheduling.engine_simulation import Rates, simulate_engine
from scheduling.test_mutants import groups_of, runs_to_detection

from jaxpaged.engine.engine import Engine, _FailedDispatch
from jaxpaged.engine.recovery import Recovery
from jaxpaged.scheduling.plan import StepPlan, StepResult, TokenEvent, Work
from jaxpaged.scheduling.request import FinishReason, Sequence
from jaxpaged.scheduling.scheduler import Scheduler

# ------------------------------------------------------------------------------------------------- counting and giving up


class FailedStepsCounted(Engine):
    """Steps that fail in a row are counted, whoever is to blame, so that seven requests whose clients leave end the engine."""

    num_failed = 0

    def _recover(self, plan: StepPlan | None, error: Exception) -> list[TokenEvent]:
        self.num_failed += 1
        if self.num_failed > 6:
            self._give_up("steps failed in a row")
        events = super()._recover(plan, error)
        if any(event.finish_reason is FinishReason.ERROR for event in events):
            self.num_failed = 0
        return events

    def _commit_oldest(self) -> list[TokenEvent]:
        before = self.telemetry.steps
        events = super()._commit_oldest()
        if self.telemetry.steps > before:
            self.num_failed = 0
        return events


class UnplannedNotCounted(Engine):
    """An engine that can never plan a step goes on for ever."""

    def _recover(self, plan: StepPlan | None, error: Exception) -> list[TokenEvent]:
        self._num_unplanned = 0
        return super()._recover(plan, error)


class GoodStepsCountForNothing(Engine):
    """Steps that cannot be planned are counted although others between them succeed."""

    def _commit_oldest(self) -> list[TokenEvent]:
        before = self._num_unplanned
        events = super()._commit_oldest()
        self._num_unplanned = before
        return events


class FailuresNotTold(Engine):
    """A failure of which the metrics know nothing."""

    def _recover(self, plan: StepPlan | None, error: Exception) -> list[TokenEvent]:
        events = super()._recover(plan, error)
        self.telemetry.recoveries -= plan is None
        return events


# ---------------------------------------------------------------------------------------------------------- blame


class AccusationForgotten(Scheduler):
    """A request is acquitted when the sample that was suspect leaves it."""

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.suspect = False
        super()._finish(sequence, reason)
        if not sequence.group.suspect:
            sequence.group.num_faults = 0


class AcquittedByAChunk(Scheduler):
    """A part of the prompt that was computed clears of a failure that is yet to come."""

    def _apply(self, plan: StepPlan, work: Work, row: int, result: StepResult) -> TokenEvent | None:
        work.sequence.suspect = False
        work.sequence.group.num_faults = 0
        return super()._apply(plan, work, row, result)


class AllAccused(Scheduler):
    """Whoever was in a step that failed is accused."""

    def recover(self, plan: StepPlan | None) -> list[TokenEvent]:
        events = super().recover(plan)
        for group in groups_of(self.waiting):
            group.num_faults += group.suspect
        return events


class NobodyAccusedOfPlans(Scheduler):
    """A request that cannot be planned is never blamed, so that it comes back for ever."""

    def recover(self, plan: StepPlan | None) -> list[TokenEvent]:
        if plan is None:
            self.start_over()
            return []
        return super().recover(plan)


class MercyForTheAccused(Scheduler):
    """Each new accusation starts the count of a request anew."""

    def recover(self, plan: StepPlan | None) -> list[TokenEvent]:
        events = super().recover(plan)
        for group in groups_of(self.waiting):
            group.num_faults = min(group.num_faults, 1)
        return events


class StartOverKeepsFlights(Scheduler):
    """After a failure a step is still believed to be in flight."""

    def start_over(self) -> None:
        in_flight = list(self.in_flight)
        super().start_over()
        self.in_flight.extend(in_flight[1:])


# ------------------------------------------------------------------------------------------------------- proof and readiness


class ReadyOnlyAfterAStep(Engine):
    """The engine is recovering until somebody's step succeeds, so for ever when nobody comes."""

    waiting_for_a_step = False

    @property
    def recovering(self) -> bool:
        return super().recovering or self.waiting_for_a_step

    def _recover(self, plan: StepPlan | None, error: Exception) -> list[TokenEvent]:
        events = super()._recover(plan, error)
        self.waiting_for_a_step = True
        return events

    def _commit_oldest(self) -> list[TokenEvent]:
        self.waiting_for_a_step = False
        return super()._commit_oldest()


class AlwaysReady(Engine):
    """The engine says that it is ready while its device is away."""

    @property
    def recovering(self) -> bool:
        return False


class NotTriedWhenIdle(Engine):
    """While nobody is in line, a device that is away is not tried again."""

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work


class WaitsInTheDark(Engine):
    """Whoever drives the engine is not told that there is a pause, and spins."""

    @property
    def wait_s(self) -> float:
        return 0.0


class WithRecovery(Engine):
    """An engine with another ``Recovery``."""

    kind: type[Recovery] = Recovery

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self._recovery = self.kind(self.runner, self._clock)


class NoPause(Recovery):
    """A reset that fails is repeated at once."""

    def attempt(self) -> bool:
        done = super().attempt()
        self._next_at = self._clock()
        return done


class SamePauseForEver(Recovery):
    """A device that does not come back is tried for ever."""

    def attempt(self) -> bool:
        self._num_failed = min(self._num_failed, 2)
        return super().attempt()


class GivesUpTooEarly(Recovery):
    """The last pause is not waited for."""

    def begin(self) -> None:
        super().begin()
        self._num_failed = 1


class ProofIsNotAwaited(Recovery):
    """A reset that fails counts as one that succeeded."""

    def attempt(self) -> bool:
        done = super().attempt()
        if self._num_failed:
            self.pending = False
        return done


# ---------------------------------------------------------------------------------------------------------------- the loop


class FlightsKept(Engine):
    """After a failure a step that was dispatched before it is still read."""

    def _recover(self, plan: StepPlan | None, error: Exception) -> list[TokenEvent]:
        flights = list(self._in_flight)
        events = super()._recover(plan, error)
        self._in_flight.extend(flights)
        return events


class FailedDispatchForgotten(Engine):
    """A step that could not be started is not recovered from."""

    def _dispatch(self, plan: StepPlan) -> None:
        super()._dispatch(plan)
        if isinstance(self._in_flight[-1].handle, _FailedDispatch):
            self._in_flight.pop()


class WildIdsDelivered(Engine):
    """An id that the vocabulary does not have is passed on as a token."""

    def _with_valid_tokens(self, result: StepResult) -> StepResult:
        return result


class NegativeIdsDelivered(Engine):
    """Only ids above the vocabulary are caught."""

    def _with_valid_tokens(self, result: StepResult) -> StepResult:
        known = [max(token, 0) for token in result.tokens]
        return super()._with_valid_tokens(dataclasses.replace(result, tokens=known))


class StopCountedAsAbort(Engine):
    """What a stop string ended is told as an abort."""

    def abort(self, request_id, index=None, *, reason=FinishReason.ABORT) -> list[TokenEvent]:
        return super().abort(request_id, index)


class AbortsNotCounted(Engine):
    """Records of requests that were aborted are kept."""

    def abort(self, request_id, index=None, *, reason=FinishReason.ABORT) -> list[TokenEvent]:
        events = self.scheduler.abort(request_id, index)
        return [dataclasses.replace(event, finish_reason=reason) for event in events]


class RestartForgetsNobody(Engine):
    """After an interrupt the requests that ran go on."""

    def reset(self) -> list[TokenEvent]:
        self._in_flight.clear()
        self.scheduler.start_over()
        self._recovery.begin()
        self._revive()
        return []


class RestartKeepsThePool(Engine):
    """After an interrupt the device is not reset."""

    def reset(self) -> list[TokenEvent]:
        begin, self._recovery.begin = self._recovery.begin, lambda: None
        events = super().reset()
        self._recovery.begin = begin
        return events


ONLY_REQUESTS = {"rates": Rates(), "poisoned": 0.9, "impatience": 0.5}
SAMPLES = {"beams": 0.0, "samples": (2, 3), "max_num_seqs": 5}
ALLOCATIONS = {"rates": Rates(allocate=0.3)}
AWAY = {"rates": Rates(read=0.1, away=0.5)}

MUTANTS: dict[type, dict[str, object]] = {
    FailedStepsCounted: ONLY_REQUESTS,
    UnplannedNotCounted: ALLOCATIONS,
    GoodStepsCountForNothing: ALLOCATIONS,
    FailuresNotTold: ALLOCATIONS,
    AccusationForgotten: ONLY_REQUESTS | SAMPLES,
    AcquittedByAChunk: ONLY_REQUESTS,
    AllAccused: {},
    NobodyAccusedOfPlans: ALLOCATIONS,
    MercyForTheAccused: {},
    StartOverKeepsFlights: {},
    ReadyOnlyAfterAStep: {},
    AlwaysReady: AWAY,
    NotTriedWhenIdle: AWAY,
    WaitsInTheDark: AWAY,
    NoPause: AWAY,
    SamePauseForEver: AWAY,
    GivesUpTooEarly: AWAY,
    ProofIsNotAwaited: AWAY,
    FlightsKept: {},
    FailedDispatchForgotten: {},
    WildIdsDelivered: {},
    NegativeIdsDelivered: {},
    StopCountedAsAbort: {},
    AbortsNotCounted: {},
    RestartForgetsNobody: {},
    RestartKeepsThePool: {},
}
"""Each bug, and what worlds are made for it."""

LIMIT = 300
"""Worlds within which each of them must be found."""


def plant(mutant: type, options: dict[str, object]) -> Callable[[int], object]:
    """Returns a simulation with the bug in it."""

    def mutate(scheduler: Scheduler) -> None:
        if issubclass(mutant, Scheduler):
            scheduler.__class__ = mutant

    make: type[Engine] = Engine
    if issubclass(mutant, Engine):
        make = mutant
    elif issubclass(mutant, Recovery):
        make = type(mutant.__name__, (WithRecovery,), {"kind": mutant})
    return lambda seed: simulate_engine(seed, make=make, mutate=mutate, max_calls=1500, **options)


@pytest.fixture(autouse=True)
def quiet():
    """The engine logs each failure."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_worlds_find(mutant):
    found, _ = runs_to_detection(plant(mutant, MUTANTS[mutant]), 100_000, LIMIT)
    assert found is not None, f"{LIMIT} worlds did not find: {mutant.__doc__}"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_what_a_mutant_replaces_is_still_there(mutant):
    """Or the bug is not planted, and whatever is found is something else."""
    own = [name for name, value in vars(mutant).items() if callable(value) or isinstance(value, property)]
    assert own
    assert all(hasattr(mutant.__base__, name) for name in own)


@pytest.mark.parametrize("options", [{}, ONLY_REQUESTS, ALLOCATIONS, AWAY], ids=("drawn", "only requests", "allocations", "away"))
def test_nothing_is_found_without_a_bug(options):
    assert runs_to_detection(plant(WithRecovery, options), 100_000, 60) == (None, "not found")


def test_an_engine_that_gives_up_for_a_request_is_found_by_name():
    _, what = runs_to_detection(plant(FailedStepsCounted, ONLY_REQUESTS), 100_000, LIMIT)
    assert "nothing but requests failed" in what


def main() -> None:
    """Prints a table: mutant, worlds to detection from each of five seeds, what found it."""
    logging.disable(logging.CRITICAL)
    for mutant, options in MUTANTS.items():
        results = [runs_to_detection(plant(mutant, options), start, LIMIT) for start in range(200_000, 700_000, 100_000)]
        print(f"| {mutant.__name__} | {', '.join(str(found or f'>{LIMIT}') for found, _ in results)} | {results[0][1][:90]} |", flush=True)


if __name__ == "__main__":
    main()
