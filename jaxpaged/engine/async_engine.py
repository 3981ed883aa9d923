"""The engine in a thread of its own behind three methods, ``submit``, ``abort`` and ``reset_prefix_cache``.

Only frozen data crosses between the threads: requests and aborts go in through one inbox, token events come out with one
call per step into the event loop. Nothing here would change if the thread became a process.

Memory of a client that never reads: its unread events wait in its stream. While it blocks its reader, ``MAX_UNREAD_EVENTS`` of them may;
when more of them wait for ``SLOW_READER_S`` seconds in which the event loop turned, its request is aborted and its stream ends with the
GenerationError ``slow_reader``. A reader that is not blocked is never ended, however late the event loop lets it read: what waits for it
is bounded by what its request may generate.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable

from jaxpaged.config import EngineConfig
from jaxpaged.engine.engine import Engine
from jaxpaged.engine.progress import Progress, Quiet
from jaxpaged.engine.startup import LoadedEngine, load_engine
from jaxpaged.engine.status import EngineInfo, EngineState, EngineStatus
from jaxpaged.engine.telemetry import EngineStats
from jaxpaged.errors import EngineStopped, GenerationError, JaxpagedError, QueueFull, RequestError
from jaxpaged.scheduling.plan import TokenEvent
from jaxpaged.scheduling.request import FinishReason, Request

logger = logging.getLogger(__name__)

MAX_UNREAD_EVENTS = 4096
"""Events that a client which blocks its reader may leave unread; bounds the memory of a client that never reads."""

SLOW_READER_S = 1.0
"""Seconds for which a blocked reader may have more events than that unread. Time in which the event loop stood still does not count."""

_ABORT_S = 5.0
"""Seconds that aborted requests get to end when draining."""

_IDLE_CHECK_S = 1.0
"""Seconds of idleness after which the invariants are checked, once per idle spell."""


@dataclasses.dataclass(frozen=True)
class _Submit:
    request: Request


@dataclasses.dataclass(frozen=True)
class _Abort:
    request_id: str
    index: int | None
    reason: FinishReason


@dataclasses.dataclass(frozen=True)
class _ResetCache:
    """Forget earlier prompts, one tenant's or all, and say so."""

    number: int
    tenant: str | None


@dataclasses.dataclass(frozen=True)
class _Wake:
    """Only makes the thread look at its flags."""


@dataclasses.dataclass(frozen=True)
class _News:
    """What one turn of the thread has to tell the event loop: requests taken in, requests refused, token events, resets done."""

    accepted: tuple[str, ...]
    refused: tuple[tuple[str, JaxpagedError], ...]
    events: tuple[TokenEvent, ...]
    resets: tuple[int, ...] = ()


class RequestStream(AsyncIterator[TokenEvent]):
    """The events of one request, in order; ends after the last event of its last sample.

    Iterating raises EngineStopped when the engine stops or dies first, QueueFull or RequestError if the engine's thread refused
    the request after all. Closing, cancelling the task that waits, or dropping the stream aborts the request.

    Args:
        request: Whose events.
        abort: Called once with the request's id if the stream is left before its end; must be callable from any thread.
        is_blocked: Whether the reader waits for its client now, and so does not read.
    """

    def __init__(self, request: Request, abort: Callable[[str], None], is_blocked: Callable[[], bool]) -> None:
        self.request = request
        self._abort = abort
        self._is_blocked = is_blocked
        self._watched = False
        self._unread: deque[TokenEvent] = deque()
        self._open_samples = request.params.num_sequences
        self._accepted = False
        self._error: JaxpagedError | None = None
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None

    async def accepted(self) -> None:
        """Waits until the engine's thread has taken the request in; raises its refusal. Call before the first byte of an answer."""
        while not (self._accepted or self._error is not None):
            await self._wait()
        if not self._accepted and self._error is not None:
            raise self._error

    async def __anext__(self) -> TokenEvent:
        """Returns the next event."""
        while not self._unread:
            if self._error is not None:
                raise self._error
            if self._closed or self._open_samples == 0:
                raise StopAsyncIteration
            await self._wait()
        return self._unread.popleft()

    def close(self) -> None:
        """Aborts the request unless it has ended; idempotent, callable from any thread."""
        if not self._closed:
            self._closed = True
            self._unread.clear()
            if self._open_samples and self._error is None:
                self._abort(self.request.id)

    def __del__(self) -> None:
        self.close()

    @property
    def ended(self) -> bool:
        """Whether no more events will come."""
        return self._open_samples == 0 or self._error is not None

    def accept(self) -> None:
        """The engine has taken the request in. For AsyncEngine, in the loop's thread, as are the next two."""
        self._accepted = True
        self._wake()

    def put(self, event: TokenEvent) -> None:
        """An event has come."""
        if self._error is not None:
            return
        self._open_samples -= event.finish_reason is not None
        self._unread.append(event)
        if len(self._unread) > MAX_UNREAD_EVENTS and not self._watched and self._is_blocked():
            self._watch_reader()
        self._wake()

    def fail(self, error: JaxpagedError) -> None:
        """No more events will come, for this reason; those unread are dropped."""
        if not self.ended:
            self._unread.clear()
            self._error = error
            self._wake()

    def _watch_reader(self) -> None:
        """Looks again after a while, in which the event loop can send what its client takes."""
        loop = asyncio.get_running_loop()
        self._watched = True
        loop.call_later(SLOW_READER_S, self._judge_reader, loop.time() + SLOW_READER_S)

    def _judge_reader(self, due: float) -> None:
        """Ends the request of a client that still keeps its reader from reading."""
        self._watched = False
        unread = len(self._unread)
        if self.ended or unread <= MAX_UNREAD_EVENTS or not self._is_blocked():
            return
        if asyncio.get_running_loop().time() - due > SLOW_READER_S:  # the loop stood still, so nobody could read
            self._watch_reader()
            return
        logger.warning("request %s was ended: its client reads too slowly and left %d events unread", self.request.id, unread)
        self._abort(self.request.id)
        self.fail(GenerationError("the client reads too slowly; the request was ended", code="slow_reader"))

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class AsyncEngine:
    """One engine, served from its own thread.

    Args:
        config: What to load.
        progress: Told of the stages of loading, from the thread.
        load: Loads the engine in the thread; tests pass one that makes a fake.
        clock: Monotonic seconds.

    Attributes:
        info: What is fixed once loaded; None before.
        progress: Where loading is reported to.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        progress: Progress | None = None,
        load: Callable[[EngineConfig, Progress], LoadedEngine] = load_engine,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.info: EngineInfo | None = None
        self.progress: Progress = progress or Quiet()
        self._load = load
        self._clock = clock
        self._state: EngineState = "loading"
        self._detail = "starting"
        self._error: JaxpagedError | None = None
        self._engine: Engine | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._inbox: queue.SimpleQueue[_Submit | _Abort | _ResetCache | _Wake] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._streams: weakref.WeakValueDictionary[str, RequestStream] = weakref.WeakValueDictionary()
        self._resets: dict[int, asyncio.Future[None]] = {}
        self._num_resets = 0
        self._num_refused = 0
        self._changed: asyncio.Event | None = None

    # ------------------------------------------------------------------------------------------- called from the loop's thread

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the thread, which loads, compiles and then serves; events are delivered in ``loop``."""
        if self._thread is not None:
            raise RuntimeError("an AsyncEngine is started once")
        self._loop = loop
        self._changed = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="jaxpaged-engine", daemon=True)
        self._thread.start()

    @property
    def status(self) -> EngineStatus:
        """How the engine is doing now; cheap, callable from any thread."""
        engine = self._engine
        if engine is None or self._state in ("loading", "compiling", "stopped", "failed"):
            return EngineStatus(self._state, self._detail)
        state: EngineState = "recovering" if self._state == "ready" and engine.recovering else self._state
        age = max(0.0, self._clock() - engine.progress_at) if engine.has_work else 0.0
        scheduler = engine.scheduler
        return EngineStatus(state, self._detail, scheduler.num_running, scheduler.num_waiting, age, engine.telemetry.step_p99_s)

    async def wait_ready(self) -> EngineInfo:
        """Waits until requests are taken.

        Raises:
            ConfigError: Loading failed, as it was raised in the thread.
            EngineStopped: It was stopped before, or failed for another reason.
        """
        while self.info is None or self._state in ("loading", "compiling"):
            if self._error is not None:
                raise self._error
            await self._next_change()
        return self.info

    def submit(self, request: Request, *, is_blocked: Callable[[], bool] = lambda: False) -> RequestStream:
        """Hands a request in; call from the loop's thread.

        Args:
            request: What to generate.
            is_blocked: Whether whoever reads the stream waits for a client of its own now; see ``MAX_UNREAD_EVENTS``.

        Raises:
            EngineStopped: Not ready, draining, stopped or failed.
            QueueFull: As many requests as the operator allows are waiting.
            RequestError: It can never fit, or its id is in use.
        """
        info = self.info
        if info is None or self._state != "ready":
            raise EngineStopped(f"the engine is {self._state}: {self._detail}" if self._detail else f"the engine is {self._state}")
        if len(request.prompt) + request.max_tokens > info.max_request_tokens:
            message = f"{len(request.prompt)} prompt tokens and max_tokens {request.max_tokens} exceed {info.max_request_tokens} tokens"
            raise RequestError(message, code="context_length_exceeded")
        if request.id in self._streams:
            raise RequestError(f"request id {request.id} is in use")
        if len(self._streams) >= info.max_num_seqs + info.max_waiting and self._num_open() >= info.max_num_seqs + info.max_waiting:
            self.count_refusal()
            retry_after_s = 1 if self._engine is None else self._engine.scheduler.retry_after_s()
            raise QueueFull(f"{self._num_open()} requests are running or waiting; try again later", retry_after_s=retry_after_s)
        stream = RequestStream(request, self.abort, is_blocked)
        self._streams[request.id] = stream
        self._inbox.put(_Submit(request))
        return stream

    def abort(self, request_id: str, index: int | None = None, *, reason: FinishReason = FinishReason.ABORT) -> None:
        """Ends a request, or one of its samples; idempotent, unknown ids are ignored. Its stream still gets its last events.

        Args:
            request_id: Whose.
            index: Which sample; None for all.
            reason: STOP where a stop string was found in the text, so that the metrics count it as such.
        """
        self._inbox.put(_Abort(request_id, index, reason))

    async def reset_prefix_cache(self, tenant: str | None = None) -> None:
        """Forgets the keys and values of earlier prompts, one tenant's or all; returns when that is done. Call from the loop's thread.

        Raises:
            EngineStopped: Not loaded yet, stopped or failed.
        """
        if self.info is None or self._state in ("loading", "compiling", "stopped", "failed"):
            raise EngineStopped(f"the engine is {self._state}")
        self._num_resets += 1
        done = self._resets[self._num_resets] = asyncio.get_running_loop().create_future()
        self._inbox.put(_ResetCache(self._num_resets, tenant))
        await done

    async def drain(self, timeout_s: float) -> None:
        """Takes no more requests, lets the running ones finish for ``timeout_s`` seconds, then aborts the rest."""
        if self._state == "ready":
            self._set_state("draining", f"{self._num_open()} requests are finishing")
        if not await self._until_empty(timeout_s):
            for request_id in list(self._streams):
                self.abort(request_id)
            await self._until_empty(_ABORT_S)

    def stop(self, timeout_s: float = 30.0) -> None:
        """Stops the thread and waits for it; open streams raise EngineStopped. Idempotent.

        Args:
            timeout_s: Longest wait, in seconds; a thread that is compiling can take that long to notice.
        """
        self._stopping.set()
        self._inbox.put(_Wake())
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def count_refusal(self) -> None:
        """Counts a request that was refused for want of room before the engine's thread saw it; call from the loop's thread."""
        self._num_refused += 1

    def stats(self) -> EngineStats:
        """Returns a snapshot of all counters; callable from any thread."""
        stats = EngineStats() if self._engine is None else self._engine.stats()
        return dataclasses.replace(stats, refused=stats.refused + self._num_refused)

    def _num_open(self) -> int:
        return sum(not stream.ended for stream in list(self._streams.values()))

    async def _until_empty(self, timeout_s: float) -> bool:
        """Waits until every stream has had its last event; returns whether that came in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._num_open() and self._state not in ("stopped", "failed"):
                    await self._next_change()
        except TimeoutError:
            return False
        return True

    async def _next_change(self) -> None:
        if self._changed is None:
            raise EngineStopped("the engine was not started")
        await self._changed.wait()

    def _deliver(self, news: _News) -> None:
        """Hands one turn's news to the streams."""
        for request_id in news.accepted:
            if stream := self._streams.get(request_id):
                stream.accept()
        for number in news.resets:
            _settle(self._resets.pop(number, None), None)
        for request_id, error in news.refused:
            if stream := self._streams.pop(request_id, None):
                stream.fail(error)
        for event in news.events:
            if stream := self._streams.get(event.request_id):
                stream.put(event)
                if stream.ended:
                    self._streams.pop(event.request_id, None)
        if news.refused or any(event.finish_reason is not None for event in news.events):
            self._notify()

    def _end_streams(self, error: JaxpagedError) -> None:
        for stream in list(self._streams.values()):
            stream.fail(error)
        self._streams.clear()
        for done in self._resets.values():
            _settle(done, error)
        self._resets.clear()
        self._notify()

    def _notify(self) -> None:
        if self._changed is not None:
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()

    # ---------------------------------------------------------------------------------------------- runs in the engine's thread

    def _run(self) -> None:
        close = _nothing
        error: JaxpagedError = EngineStopped("the engine was stopped")
        try:
            loaded = self._load(self.config, _Reporting(self))
            close = loaded.close
            gc.collect()
            gc.freeze()  # what was loaded lives as long as the process; collections need not look at it
            self._engine, self.info = loaded.engine, loaded.info
            self._set_state("ready", "")
            self._serve(loaded.engine)
            self._set_state("stopped", "")
        except _Stopped:
            self._set_state("stopped", "")
        except JaxpagedError as raised:
            error = raised
            self._set_state("failed", str(raised))
        except Exception as raised:
            logger.exception("the engine's thread died")
            error = EngineStopped(f"the engine died: {type(raised).__name__}: {raised}")
            self._set_state("failed", str(error))
        finally:
            self._error = error
            self._call(self._end_streams, error if isinstance(error, EngineStopped) else EngineStopped(str(error)))
            close()

    def _serve(self, engine: Engine) -> None:
        """Takes in what the inbox holds, does a step, tells the loop; sleeps in the inbox while there is nothing to do."""
        checked = True
        while not self._stopping.is_set():
            if engine.has_work:
                news = self._take_in(engine, timeout_s=engine.wait_s)
                events = news.events if engine.wait_s else (*news.events, *engine.step())
                checked = False
            else:
                news = self._take_in(engine, timeout_s=None if checked else _IDLE_CHECK_S)
                events = news.events
                if not (news.accepted or engine.has_work or checked):
                    engine.check()
                    checked = True
            if events or news.accepted or news.refused or news.resets:
                self._call(self._deliver, dataclasses.replace(news, events=events))

    def _take_in(self, engine: Engine, *, timeout_s: float | None) -> _News:
        """Empties the inbox into the engine; waits that long for the first thing in it, None for as long as it takes."""
        accepted: list[str] = []
        refused: list[tuple[str, JaxpagedError]] = []
        events: list[TokenEvent] = []
        resets: list[int] = []
        with contextlib.suppress(queue.Empty):
            while True:
                match self._inbox.get(block=timeout_s != 0, timeout=timeout_s):
                    case _Submit(request):
                        try:
                            engine.add(request)
                            accepted.append(request.id)
                        except (RequestError, QueueFull) as error:
                            refused.append((request.id, error))
                    case _Abort(request_id, index, reason):
                        events += engine.abort(request_id, index, reason=reason)
                    case _ResetCache(number, tenant):
                        engine.reset_prefix_cache(tenant)
                        resets.append(number)
                timeout_s = 0
        return _News(tuple(accepted), tuple(refused), tuple(events), tuple(resets))

    def _set_state(self, state: EngineState, detail: str) -> None:
        self._state, self._detail = state, detail
        self._call(self._notify)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        """Runs something in the loop's thread; a loop that is closed needs no news."""
        with contextlib.suppress(RuntimeError):
            if self._loop is not None:
                self._loop.call_soon_threadsafe(function, *args)

    def report(self, state: EngineState, detail: str) -> None:
        """Says how loading goes on; ends it when the engine was told to stop."""
        if self._stopping.is_set():
            raise _Stopped
        self._state, self._detail = state, detail


class _Stopped(Exception):
    """Loading was ended by ``stop``."""


class _Reporting:
    """Passes the progress of loading on, and keeps the engine's status up to date."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._to = engine.progress

    def begin(self, stage: str, total: int, unit: str) -> None:
        """A stage begins."""
        self._total, self._stage = total, stage
        self._report(0)
        self._to.begin(stage, total, unit)

    def advance(self, done: int, note: str = "") -> None:
        """It has come this far."""
        self._report(done)
        self._to.advance(done, note)

    def end(self, text: str) -> None:
        """It is over, with this to show for."""
        self._to.end(text)

    def say(self, text: str) -> None:
        """Something worth a line of its own."""
        self._to.say(text)

    def _report(self, done: int) -> None:
        if self._stage == "programs":
            self._engine.report("compiling", f"loading or compiling programs, {done}/{self._total}")
        else:
            percent = 100 * done // self._total if self._total else 0
            self._engine.report("loading", f"loading {self._stage}, {percent} %")


def _settle(done: asyncio.Future[None] | None, error: JaxpagedError | None) -> None:
    """Ends somebody's wait, unless he has given up."""
    if done is None or done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


def _nothing() -> None:
    pass
