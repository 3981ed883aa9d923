"""Which calls are there to be made: all at once, but for later turns, which wait for the answer before them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from jaxpaged.memory.workloads import Call, Workload


class Arrivals:
    """Hands out the places of calls as they become due; the same for every system that is compared."""

    def __init__(self, workload: Workload) -> None:
        self._followers: defaultdict[int, list[int]] = defaultdict(list)
        self._due: list[int] = []
        for place, call in enumerate(workload.calls):
            (self._due if call.after is None else self._followers[call.after]).append(place)

    def due(self) -> list[int]:
        """Returns the calls that became due since the last time."""
        due, self._due = self._due, []
        return due

    def answered(self, place: int) -> None:
        """Says that a call was answered."""
        self._due += self._followers.pop(place, [])


def drop_long(calls: Iterable[Call], limit: int) -> tuple[Call, ...]:
    """Returns the calls that no system must refuse, those that follow a refused one not included.

    Args:
        calls: All calls; earlier turns before later ones.
        limit: Most tokens, prompt plus answer.
    """
    kept: list[Call] = []
    places: dict[int | None, int | None] = {None: None}
    for place, call in enumerate(calls):
        if call.after in places and len(call.prompt) + len(call.output) <= limit:
            places[place] = len(kept)
            kept.append(Call(call.prompt, call.output, places[call.after]))
    return tuple(kept)
