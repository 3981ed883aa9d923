"""The generation calls in flight: who they are, and the one way to end one early.

A call may end before its answer is complete for four reasons: the client went away, the operator's time limit passed, the
server is stopping, or the engine gave up. All but the last come from outside the task that answers; each is an exception
handed to ``Call.end``, which raises it inside that task.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator

from jaxpaged.server.answers import RequestTimedOut, Unavailable


class Call:
    """One call.

    Attributes:
        id: The request's id, as in ``x-request-id``.
        started_s: Monotonic time of its arrival, in seconds.
    """

    def __init__(self, request_id: str) -> None:
        self.id = request_id
        self.started_s = time.monotonic()
        self._reason: Exception | None = None
        self._scope: asyncio.Timeout | None = None

    def end(self, reason: Exception) -> None:
        """Ends the call with ``reason``; the first one counts. Call from the loop's thread."""
        if self._reason is None:
            self._reason = reason
            if self._scope is not None:
                self._scope.reschedule(asyncio.get_running_loop().time())

    @contextlib.asynccontextmanager
    async def limit(self, timeout_s: float | None) -> AsyncIterator[None]:
        """Runs the body until it is done, ``timeout_s`` seconds have passed, or ``end`` is called.

        Raises:
            RequestTimedOut: The time passed.
            Exception: Whatever ``end`` was given.
        """
        if self._reason is not None:
            raise self._reason
        try:
            async with asyncio.timeout(timeout_s) as self._scope:
                yield
        except TimeoutError:
            raise self._reason or RequestTimedOut(f"the request took longer than {timeout_s:g} s") from None
        finally:
            self._scope = None


class Calls:
    """Every call in flight.

    Attributes:
        draining: Whether new calls are refused because the server is about to stop.
    """

    def __init__(self) -> None:
        self.draining = False
        self._open: set[Call] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._open)

    @contextlib.contextmanager
    def track(self, request_id: str) -> Iterator[Call]:
        """Keeps a call in the books while it is answered.

        Raises:
            Unavailable: The server is draining.
        """
        if self.draining:
            raise Unavailable("the server is shutting down")
        call = Call(request_id)
        self._open.add(call)
        self._idle.clear()
        try:
            yield call
        finally:
            self._open.discard(call)
            if not self._open:
                self._idle.set()

    def end_all(self) -> None:
        """Ends every call: a stream gets an error event, the others a 503."""
        for call in tuple(self._open):
            call.end(Unavailable("the server is shutting down"))

    async def wait_idle(self, timeout_s: float) -> bool:
        """Waits until no call is in flight; returns whether that came within ``timeout_s`` seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return not self._open
