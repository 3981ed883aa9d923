"""The engine in a thread of its own behind two methods, ``submit`` and ``abort``.

Only frozen data crosses between the threads: requests and aborts go in through one inbox, token events come out with one
call per step into the event loop. Nothing here would change if the thread became a process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from jaxpaged.config import EngineConfig
from jaxpaged.engine.status import EngineInfo, EngineStatus
from jaxpaged.engine.telemetry import EngineStats
from jaxpaged.scheduling.plan import TokenEvent
from jaxpaged.scheduling.request import Request

MAX_UNREAD_EVENTS = 4096
"""Events a client may leave unread before its request is aborted; bounds the memory of a client that never reads."""


class RequestStream(AsyncIterator[TokenEvent]):
    """The events of one request, in order; ends after the last event of its last sample.

    Iterating raises EngineStopped when the engine stops or dies first, QueueFull or RequestError if the engine's thread refused
    the request after all. Closing, cancelling the task that waits, or dropping the stream aborts the request.
    """

    async def accepted(self) -> None:
        """Waits until the engine's thread has taken the request in; raises its refusal. Call before the first byte of an answer."""
        raise NotImplementedError

    async def __anext__(self) -> TokenEvent:
        """Returns the next event; several unread events of one sample may come merged into one."""
        raise NotImplementedError

    def close(self) -> None:
        """Aborts the request unless it has ended; idempotent, callable from any thread."""
        raise NotImplementedError


class AsyncEngine:
    """One engine, served from its own thread.

    Args:
        config: What to load.
        load: Loads the engine in the thread; tests pass a fake.
        clock: Monotonic seconds.

    Attributes:
        info: What is fixed once loaded; None before.
    """

    info: EngineInfo | None

    def __init__(self, config: EngineConfig, *, load: Callable[..., object] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        raise NotImplementedError

    @property
    def status(self) -> EngineStatus:
        """How the engine is doing now; cheap, callable from any thread."""
        raise NotImplementedError

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the thread, which loads, compiles and then serves; events are delivered in ``loop``."""
        raise NotImplementedError

    async def wait_ready(self) -> EngineInfo:
        """Waits until requests are taken.

        Raises:
            ConfigError: Loading failed, as it was raised in the thread.
            EngineStopped: It was stopped before.
        """
        raise NotImplementedError

    def submit(self, request: Request) -> RequestStream:
        """Hands a request in; call from the loop's thread.

        Raises:
            EngineStopped: Not ready, draining, stopped or failed.
            QueueFull: As many requests as the operator allows are waiting.
            RequestError: It can never fit.
        """
        raise NotImplementedError

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one of its samples; idempotent, unknown ids are ignored. Its stream still gets its last events."""
        raise NotImplementedError

    async def drain(self, timeout_s: float) -> None:
        """Takes no more requests, lets the running ones finish for ``timeout_s`` seconds, then aborts the rest."""
        raise NotImplementedError

    def stop(self) -> None:
        """Stops the thread and waits for it; open streams raise EngineStopped. Idempotent."""
        raise NotImplementedError

    def stats(self) -> EngineStats:
        """Returns a snapshot of all counters."""
        raise NotImplementedError
