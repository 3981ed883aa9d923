"""Whose turn it is where few places serve many: one place is kept for small work, and large work waits in a line for each owner."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque

_Line = deque["asyncio.Future[None]"]


class Turns:
    """Hands out places. Small work comes first, in the order in which it came; the owners of large work take turns.

    Large work never takes the last place, so small work waits for small work only. Call from one event loop.

    Args:
        count: How many places there are, at least 2.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._free_for_large = count - 1
        self._small: _Line = deque()
        self._large: OrderedDict[str, _Line] = OrderedDict()

    async def take(self, *, large: bool, owner: str) -> None:
        """Waits for a place; ``give`` must be called once for it, unless waiting was cancelled.

        Args:
            large: Whether the work may take long.
            owner: Whose work it is; owners share alike, however many pieces each has in line.
        """
        if self._free and not large and not self._small:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        (self._large.setdefault(owner, deque()) if large else self._small).append(turn)
        self._call()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(large=large)
            raise

    def give(self, *, large: bool) -> None:
        """Gives a place back."""
        self._free += 1
        self._free_for_large += large
        self._call()

    def _call(self) -> None:
        """Calls those whose turn it is while places are free."""
        while self._free and (turn := self._next_small() or self._next_large()) is not None:
            self._free -= 1
            turn.set_result(None)

    def _next_small(self) -> asyncio.Future[None] | None:
        return _first_waiting(self._small)

    def _next_large(self) -> asyncio.Future[None] | None:
        while self._free_for_large and self._large:
            owner, line = self._large.popitem(last=False)
            turn = _first_waiting(line)
            if line:
                self._large[owner] = line  # behind the other owners
            if turn is not None:
                self._free_for_large -= 1
                return turn
        return None


def _first_waiting(line: _Line) -> asyncio.Future[None] | None:
    """Takes the first out of a line who was not cancelled while he waited."""
    while line:
        turn = line.popleft()
        if not turn.done():
            return turn
    return None
