"""Who is to blame when a step fails: found by trying again, never by guessing.

A failed step makes each of its sequences a *suspect*, until it gets its next token and so is past the point of the failure. The
scheduler puts no more than one suspect into a step. If such a step fails, its suspect is *accused*, and tried again in steps of its own.
The one that fails ``MAX_FAULTS`` times is *guilty*. So no sequence ends for the fault of a neighbour, and no fault of a sequence comes
back for ever.
"""

from __future__ import annotations

from collections.abc import Iterable

from jaxpaged.scheduling.plan import StepPlan
from jaxpaged.scheduling.request import Sequence, Status

MAX_FAULTS = 4
"""A sequence ends after this many failed steps that it alone can have caused. More than one, so that a device which fails three times in a
row for reasons of its own costs time and no request."""


def blame(failed: Iterable[StepPlan]) -> Sequence | None:
    """Marks the sequences of a failed step (of all in flight, if it is not known which failed) as suspects, or accuses the only one.

    Returns:
        The sequence that is guilty, if one is.
    """
    involved = {work.sequence.order: work.sequence for plan in failed for work in plan.work}
    alive = [sequence for sequence in involved.values() if sequence.status is not Status.FINISHED]
    candidates = [sequence for sequence in alive if sequence.suspect] or alive
    for sequence in alive:
        sequence.suspect = True
    if len(candidates) != 1:
        return None
    accused = candidates[0]
    accused.num_faults += 1
    return accused if accused.num_faults >= MAX_FAULTS else None


def clear(sequence: Sequence) -> None:
    """Drops all suspicion of a sequence that got a token."""
    sequence.suspect = False
    sequence.num_faults = 0
