"""The life of a server process: bind, load, serve, drain, stop.

::

    bind the port ─▶ answer health routes ─▶ load in the engine's thread ─▶ ready ─▶ SIGTERM: drain ─▶ exit 0
                     (503 with progress)          └─ ConfigError ─▶ exit 2     │        └─ again: end every call, exit in 2 s
                                                                               └─ engine failed ─▶ /readyz 503 ─▶ exit 70

SIGINT does what SIGTERM does, and so does SIGHUP, of a terminal that goes away, unless ``nohup`` has it ignored. Whatever hangs, the
process ends: ``_Deadline`` sees to that.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import math
import os
import queue
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from jaxpaged.config import EngineConfig, ServerConfig
from jaxpaged.engine.async_engine import AsyncEngine
from jaxpaged.engine.progress import Lines, Progress, make_progress
from jaxpaged.engine.telemetry import EngineStats
from jaxpaged.errors import ConfigError, EngineStopped
from jaxpaged.server.app import create_app
from jaxpaged.server.callers import Callers
from jaxpaged.server.http import GuardedProtocol
from jaxpaged.server.keys import read_keys
from jaxpaged.server.listen import BACKLOG, bind, is_loopback, url_of
from jaxpaged.server.logs import QueuedHandler, logging_to
from jaxpaged.server.service import Service
from jaxpaged.server.text_pool import ProcessPool

logger = logging.getLogger(__name__)

EXIT_FAILED = 70
"""Exit code when the engine died while serving, or the process did not end in time (EX_SOFTWARE): a supervisor should start a new one."""

END_S = 10.0
"""Seconds that the process gets to end once its calls have ended."""

STATS_EVERY_S = 10.0
LAST_WORDS_S = 1.0
"""Seconds that ended calls get to send their last event."""

MakeEngine = Callable[[EngineConfig, Progress], AsyncEngine]


def run(
    engine_config: EngineConfig, server_config: ServerConfig, *, notes: Sequence[str] = (), make_engine: MakeEngine | None = None
) -> int:
    """Serves until a signal, or until the engine dies.

    Args:
        engine_config: What to load.
        server_config: Where and how to serve.
        notes: Lines for the log about the options.
        make_engine: Makes the engine; tests pass one that makes a fake.

    Returns:
        The exit code: 0 after a signal, 70 when the engine died.

    Raises:
        ConfigError: The port is taken, a file cannot be read, or the model cannot be loaded; exit code 2.
    """
    _check_tls(server_config)
    keys = read_keys(server_config)
    listener = bind(server_config)
    local = is_loopback(listener)
    with contextlib.ExitStack() as stack:
        stack.callback(_close, listener, server_config)
        # Until the server takes it, Ctrl-C ends the process at once: the exception that Python makes of it can be lost in a callback.
        stack.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.SIG_DFL))
        log = stack.enter_context(logging_to(None, server_config.log_format, server_config.uvicorn_log_level))
        deadline = _Deadline(log)
        stack.callback(deadline.cancel)
        for note in notes:
            logger.info("%s", note)
        callers = Callers(
            local_only=local and not keys,
            allowed_origins=server_config.allowed_origins,
            # No page can name a UNIX socket; what forwards requests to one may call it as it likes.
            allowed_hosts=server_config.allowed_hosts or (("*",) if server_config.uds is not None else ()),
        )
        if not local and not keys:
            logger.warning(
                "%s is open to the network without a key: anybody who reaches it can use the model. Set --api-key, or --host 127.0.0.1",
                server_config.host,
            )
        for name, path in (("TLS key", server_config.ssl_keyfile), ("file of API keys", server_config.api_key_file)):
            if path is not None and Path(path).stat().st_mode & 0o077:
                logger.warning("the %s can be read by other users of this machine; chmod 600 it", name)
        # Bars on a terminal; else lines of the log, with their time.
        progress = make_progress() if server_config.log_format == "text" and sys.stderr.isatty() else Lines(logger.info)
        engine = (make_engine or _make_engine)(engine_config, progress)
        texts = ProcessPool()
        stack.callback(texts.close)
        app = create_app(engine, server_config, texts, names=_names(engine_config), callers=callers, keys=keys)
        http = _http(app, server_config, callers)
        life = _Life(engine, app.state.service, texts, http, url_of(listener, server_config), deadline, needs_key=bool(keys))
        with asyncio.Runner(loop_factory=http.config.get_loop_factory()) as runner:
            code = runner.run(life.live(listener))
        texts.close()
        _leave(life, log, code)
    return code


def _make_engine(config: EngineConfig, progress: Progress) -> AsyncEngine:
    return AsyncEngine(config, progress=progress)


class _Http(uvicorn.Server):
    """uvicorn without its signal handlers: the process's life is ours to end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Life:
    """One run of a server.

    Args:
        engine: Not started yet.
        service: The routes' side of it.
        texts: Prepares calls; not loaded yet.
        http: Not started yet.
        url: For the ready line.
        deadline: For the process.
        needs_key: Whether the ready line shows a key.

    Attributes:
        engine_stopped: Whether the engine's thread has ended.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        service: Service,
        texts: ProcessPool,
        http: _Http,
        url: str,
        deadline: _Deadline,
        *,
        needs_key: bool,
    ) -> None:
        self._engine = engine
        self._service = service
        self._texts = texts
        self._http = http
        self._url = url
        self._deadline = deadline
        self._needs_key = needs_key
        self._signals = 0
        self._signalled = asyncio.Event()
        self._hurried = asyncio.Event()
        self.engine_stopped = False

    async def live(self, listener: socket.socket) -> int:
        """Serves; returns the exit code."""
        with self._taking_signals(asyncio.get_running_loop()):
            return await self._live(listener)

    async def _live(self, listener: socket.socket) -> int:
        began = time.monotonic()
        serving = asyncio.create_task(self._http.serve(sockets=[listener]))
        self._engine.start(asyncio.get_running_loop())
        code = 0
        try:
            if await self._until_ready():
                self._say_ready(time.monotonic() - began)
                code = await self._until_end()
            await self._drain(0.0 if code else self._service.config.shutdown_timeout)
        finally:
            self._deadline.within(END_S)
            self._service.calls.draining = True
            self._service.calls.end_all()
            await self._service.calls.wait_idle(LAST_WORDS_S)
            self._http.should_exit = True
            self.engine_stopped = await self._stop_engine()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(serving, 2 * LAST_WORDS_S)
        return code

    async def _stop_engine(self) -> bool:
        """Tells the engine to stop; returns whether its thread ended soon. It may be deep in a step or a compilation."""
        stopping = threading.Thread(target=self._engine.stop, name="jaxpaged-stop", daemon=True)
        stopping.start()
        until = time.monotonic() + LAST_WORDS_S
        while stopping.is_alive() and time.monotonic() < until:
            await asyncio.sleep(0.01)
        return not stopping.is_alive()

    @contextlib.contextmanager
    def _taking_signals(self, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        """Takes the signals that end a server. The handler runs between two instructions, so that a busy loop delays no deadline."""
        calls_s = self._service.config.shutdown_timeout

        def handle(number: int, frame: FrameType | None) -> None:
            self._signals += 1
            self._deadline.within(END_S + (calls_s if self._signals == 1 else 0.0))
            with contextlib.suppress(RuntimeError):  # the loop is closed: the end is near
                loop.call_soon_threadsafe(self._on_signal)

        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self) -> None:
        """The first signal drains; the second ends every call."""
        self._service.calls.draining = True
        self._signalled.set()
        if self._signals > 1:
            self._hurried.set()

    async def _until_ready(self) -> bool:
        """Waits for the engine, or for a signal; returns whether the server is ready."""
        ready = asyncio.create_task(self._load())
        signalled = asyncio.create_task(self._signalled.wait())
        try:
            await asyncio.wait({ready, signalled}, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                return False
            try:
                ready.result()
            except EngineStopped as error:
                raise ConfigError(f"the engine could not be started: {error}") from error
            return True
        finally:
            ready.cancel()
            signalled.cancel()

    async def _load(self) -> None:
        """Waits for the engine and gives the text processes its tokenizer."""
        await self._texts.load(await self._engine.wait_ready())

    async def _until_end(self) -> int:
        """Waits for a signal or the engine's death; returns the exit code."""
        report = _Report(self._engine.stats())
        quiet_until = time.monotonic() + STATS_EVERY_S
        while not self._signalled.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._signalled.wait(), 0.5)
            if self._engine.status.state in ("failed", "stopped"):
                logger.error("the engine has failed; leaving, so that a supervisor can start a new process")
                return EXIT_FAILED
            if self._service.config.log_stats and time.monotonic() >= quiet_until:
                quiet_until = time.monotonic() + STATS_EVERY_S
                if line := report.line(self._engine.stats()):
                    logger.info("%s", line)
        return 0

    async def _drain(self, timeout_s: float) -> None:
        """Lets the calls in flight finish, for a while or until the second signal."""
        self._service.calls.draining = True
        if self._signals == 1 and len(self._service.calls):
            logger.info("draining %d calls for up to %g s; a second signal ends them", len(self._service.calls), timeout_s)
        idle = asyncio.create_task(self._service.calls.wait_idle(timeout_s))
        hurried = asyncio.create_task(self._hurried.wait())
        await asyncio.wait({idle, hurried}, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        hurried.cancel()

    def _say_ready(self, seconds: float) -> None:
        info = self._engine.info
        if info is None:
            return
        name = self._service.names(info)[0]
        logger.info("ready     %s  (/v1 OpenAI · /health · /metrics)  in %.1f s", self._url, seconds)
        config = self._service.config
        key = ' -H "Authorization: Bearer $API_KEY"' if self._needs_key else ""
        where = f"--unix-socket {config.uds} http://localhost" if config.uds else self._url
        body = json.dumps({"model": name, "messages": [{"role": "user", "content": "What is a page?"}], "stream": True})
        logger.info("try       curl -N %s/v1/chat/completions -H 'Content-Type: application/json'%s -d '%s'", where, key, body)


class _Deadline:
    """Ends the process when its time is up, whatever hangs: the event loop, a thread, the interpreter's own end.

    Args:
        log: Gets the last word.
    """

    def __init__(self, log: QueuedHandler) -> None:
        self._log = log
        self._orders: queue.SimpleQueue[float | None] = queue.SimpleQueue()  # the one lock that a signal handler may take
        self._thread = threading.Thread(target=self._wait, name="jaxpaged-deadline", daemon=True)
        self._thread.start()

    def within(self, seconds: float) -> None:
        """The process has to end within this time from now, and within what was said before; callable from a signal handler."""
        self._orders.put(time.monotonic() + seconds)

    def cancel(self) -> None:
        """The server has ended; the process may go on."""
        self._orders.put(None)
        self._thread.join()

    def _wait(self) -> None:
        until = math.inf
        with contextlib.suppress(queue.Empty):
            while (order := self._orders.get(timeout=min(max(0.0, until - time.monotonic()), threading.TIMEOUT_MAX))) is not None:
                until = min(until, order)
            return
        logger.error("the server did not end in time; leaving without what still runs")
        self._log.finish()
        os._exit(EXIT_FAILED)


class _Report:
    """vLLM's periodic line, made from two snapshots."""

    def __init__(self, stats: EngineStats) -> None:
        self._before = stats
        self._at = time.monotonic()

    def line(self, stats: EngineStats) -> str | None:
        """Returns the line since the last call, or None if nothing happened."""
        before, self._before = self._before, stats
        now = time.monotonic()
        seconds, self._at = now - self._at, now
        if stats.steps == before.steps and not stats.running and not stats.waiting:
            return None
        return (
            f"Engine 000: Avg prompt throughput: {(stats.prompt_tokens - before.prompt_tokens) / seconds:.1f} tokens/s, "
            f"Avg generation throughput: {(stats.generation_tokens - before.generation_tokens) / seconds:.1f} tokens/s, "
            f"Running: {stats.running} reqs, Waiting: {stats.waiting} reqs, KV cache usage: {100 * stats.kv_cache_usage:.1f}%"
        )


def _http(app: object, config: ServerConfig, callers: Callers) -> _Http:
    settings = uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=functools.partial(GuardedProtocol, callers=callers),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=1,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
    )
    try:
        settings.load()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"ssl_certfile and ssl_keyfile cannot be used: {error}") from error
    return _Http(settings)


def _check_tls(config: ServerConfig) -> None:
    if config.ssl_keyfile and not config.ssl_certfile:
        raise ConfigError("ssl_keyfile needs ssl_certfile")
    for name in ("ssl_keyfile", "ssl_certfile"):
        path = getattr(config, name)
        try:
            if path is not None:
                Path(path).open("rb").close()
        except OSError as error:
            raise ConfigError(f"{name} {path} cannot be read: {error.strerror}") from error


def _names(config: EngineConfig) -> tuple[str, ...]:
    """Returns the model's names: as the operator wrote it if it is a hub id, and in every case its last part."""
    last = Path(config.model).name
    return (config.model, last) if not Path(config.model).exists() and "/" in config.model else (last,)


def _close(listener: socket.socket, config: ServerConfig) -> None:
    listener.close()
    if config.uds is not None:
        Path(config.uds).unlink(missing_ok=True)


def _leave(life: _Life, log: QueuedHandler, code: int) -> None:
    """Ends the process at once if a thread is stuck, the engine's in the device, say: an orderly exit would wait for it."""
    until = time.monotonic() + LAST_WORDS_S
    for thread in _own_threads():
        thread.join(max(0.0, until - time.monotonic()))
    if not life.engine_stopped or _own_threads():
        logger.info("leaving without waiting for %s", "the engine, which is busy" if not life.engine_stopped else "threads that are busy")
        log.finish()
        sys.stderr.flush()
        os._exit(code)


def _own_threads() -> list[threading.Thread]:
    """Returns the threads that the interpreter would wait for at its end."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("jaxpaged") and not thread.daemon]
