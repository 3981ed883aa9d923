"""Which request is to blame when a step fails: found by trying again, never by guessing.

A failed step makes each of its sequences a *suspect*, until it gets its next token and so is past the point of the failure. A request is
suspect while one of its sequences is. The scheduler puts no more than one suspect request into a step. If such a step fails, the
request is *accused*, and tried again in steps of its own. The one that fails ``MAX_FAULTS`` times is *guilty*. So no request ends for the
fault of a neighbour, and no fault of a request comes back for ever.

A suspect that leaves without a token (its client is gone, or a stop string was found in its text) leaves its suspicion to the other samples
of its request: the accusation stands until they are past the failure or the whole request is gone.

Whether it was a request at all, or the device that fails for everybody, is not decided here: the engine resets the device and has it prove
that it computes (``engine.recovery``).
"""

from __future__ import annotations

from collections.abc import Iterable

from jaxpaged.scheduling.request import Group, Sequence, Status

MAX_FAULTS = 4
"""A request ends after this many failed steps that it alone can have caused. More than one, so that a device which fails three times in a
row for reasons of its own costs time and no request."""


def blame(involved: Iterable[Sequence]) -> Group | None:
    """Marks the sequences that a failure may be due to as suspects, or accuses the only request that it can be due to.

    Args:
        involved: Sequences of the failed step, finished ones among them; or all that were looked at, if it is not known which step it was.

    Returns:
        The request that is guilty, if one is.
    """
    alive = [sequence for sequence in involved if sequence.status is not Status.FINISHED and not sequence.idle]
    groups = dict.fromkeys(sequence.group for sequence in alive)
    accused = [group for group in groups if group.num_faults]  # an accused one is tried alone, whoever else runs
    candidates = accused or [group for group in groups if group.suspect] or list(groups)
    for sequence in alive:
        sequence.suspect = True
    if len(candidates) != 1:
        return None
    (group,) = candidates
    group.num_faults += 1
    return group if group.num_faults >= MAX_FAULTS else None


def clear(sequence: Sequence) -> None:
    """Drops all suspicion of a sequence that got a token, and of its request if it was the last one under suspicion."""
    sequence.suspect = False
    if not sequence.group.suspect:
        sequence.group.num_faults = 0


def leave(sequence: Sequence) -> None:
    """Passes the suspicion of a sequence that ends on to the rest of its request, which has not shown yet that it is innocent."""
    if sequence.suspect:
        for other in sequence.group.sequences:
            other.suspect = True
