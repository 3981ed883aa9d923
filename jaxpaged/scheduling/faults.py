"""Who is to blame when a step fails: found by trying again, never by guessing.

A failed step makes each of its sequences a *suspect*, until it gets its next token and so is past the point of the failure. A request is
suspect while one of its sequences is. The scheduler puts no more than one suspect request into a step. If such a step fails, the
request is *accused*, and tried again in steps of its own. The one that fails ``MAX_FAULTS`` times is *guilty*. So no request ends for the
fault of a neighbour, and no fault of a request comes back for ever.
"""

from __future__ import annotations

from collections.abc import Iterable

from jaxpaged.scheduling.plan import StepPlan
from jaxpaged.scheduling.request import Group, Sequence, Status

MAX_FAULTS = 4
"""A request ends after this many failed steps that it alone can have caused. More than one, so that a device which fails three times in a
row for reasons of its own costs time and no request."""


def blame(failed: Iterable[StepPlan]) -> Group | None:
    """Marks the sequences of a failed step (of all in flight, if it is not known which failed) as suspects, or accuses the only request.

    Returns:
        The request that is guilty, if one is.
    """
    involved = {work.sequence.order: work.sequence for plan in failed for work in plan.work}
    alive = [sequence for sequence in involved.values() if sequence.status is not Status.FINISHED]
    groups = dict.fromkeys(sequence.group for sequence in alive)
    candidates = [group for group in groups if group.suspect] or list(groups)
    for sequence in alive:
        sequence.suspect = True
    if len(candidates) != 1:
        return None
    (accused,) = candidates
    accused.num_faults += 1
    return accused if accused.num_faults >= MAX_FAULTS else None


def clear(sequence: Sequence) -> None:
    """Drops all suspicion of a sequence that got a token, and of its request if it was the last one under suspicion."""
    sequence.suspect = False
    if not sequence.group.suspect:
        sequence.group.num_faults = 0
