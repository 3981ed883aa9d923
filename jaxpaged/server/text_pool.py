"""Processes that prepare calls, so that no template, tokenizer, pattern or body of a client keeps the server from its work.

A process that dies, of a job's time or memory, is replaced; the job's client is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Protocol

from jaxpaged.engine.status import EngineInfo
from jaxpaged.errors import ConfigError, EngineStopped, JaxpagedError, RequestError
from jaxpaged.server.prepare import Job, Prepared
from jaxpaged.server.text_process import MEMORY_BYTES, Fault
from jaxpaged.server.turns import Turns

logger = logging.getLogger(__name__)

_LENGTH = struct.Struct("!i")
"""What ``multiprocessing.connection.Connection``, at the other end, writes before a message."""

JOB_S = 10.0
JOB_BYTES = 2 * 2**20
"""A job may take ``JOB_S`` seconds of a processor, and once more for every ``JOB_BYTES`` of its body."""

SMALL_BODY_BYTES = 32 * 1024
"""Bodies up to this size are small: they need no budget, are parsed where they arrive, and have a process that large ones may not use."""


_STOPPING = "the server is shutting down"


class TextPool(Protocol):
    """What the routes need; ``ProcessPool`` is the real one, tests have one without processes."""

    async def run(self, job: Job, info: EngineInfo, *, size: int, owner: str) -> Prepared:
        """Does a job, see ``ProcessPool.run``."""
        ...

    def close(self) -> None:
        """Ends it."""
        ...


class ProcessPool:
    """A few processes, each with a tokenizer of its own.

    Args:
        count: How many, at least 2; default: one for each four processors, from 2 to 4.
        job_s: Seconds of a processor that a job may take, and once more for every ``JOB_BYTES`` of its body.
    """

    def __init__(self, count: int | None = None, *, job_s: float = JOB_S) -> None:
        self._job_s = job_s
        count = count or max(2, min(4, (os.cpu_count() or 1) // 4))
        self._turns = Turns(count)
        self._idle = [_Process() for _ in range(count)]
        self._all: Sequence[_Process] = tuple(self._idle)
        self._loaded = asyncio.Event()

    async def load(self, info: EngineInfo) -> None:
        """Gives the processes their tokenizer and tries the chat template; jobs wait until that is done.

        Raises:
            ConfigError: A process cannot start; or the chat template is not valid, or takes too long or too much for one short message.
        """
        error, *_ = await asyncio.gather(*(process.load(self._job_s, info) for process in self._all))
        if failed := next((process.exit_code for process in self._all if (process.exit_code or 0) > 0), None):
            raise ConfigError(f"a text process ended with exit code {failed} before it was ready; the lines above may say why")
        if error is not None:
            if isinstance(error, RequestError) and error.code in ("invalid_chat_template", "request_too_costly"):
                raise ConfigError(f"the chat template cannot be used: {error}; give another with --chat-template")
            logger.warning("the chat template refuses a conversation of one short message by the user: %s", error)
        self._loaded.set()

    async def run(self, job: Job, info: EngineInfo, *, size: int, owner: str) -> Prepared:
        """Does a job.

        Args:
            job: What to do.
            info: What ``load`` was given.
            size: Of the body, in bytes.
            owner: Whose body it is: owners of large ones take turns.

        Raises:
            RequestError: The body does not fit, or takes too long or too much memory.
        """
        await self._loaded.wait()
        large = size > SMALL_BODY_BYTES
        await self._turns.take(large=large, owner=owner)
        process = self._idle.pop()
        seconds = self._job_s * (1 + size / JOB_BYTES)
        doing = asyncio.create_task(process.do(seconds, job))

        def give_back(_: object) -> None:  # not before the process is done, even where nobody waits for it any more
            self._idle.append(process)
            self._turns.give(large=large)

        doing.add_done_callback(give_back)
        answer = await asyncio.shield(doing)
        if isinstance(answer, Fault):
            logger.error("request %s failed while it was prepared: %s", job.request_id, answer)
        if isinstance(answer, JaxpagedError | Fault):
            raise answer
        return answer

    def close(self) -> None:
        """Ends the processes, whatever they do; what waits for them gets EngineStopped."""
        for process in self._all:
            process.end()


class _Process:
    """One process, started at once and spoken to from an event loop, by one caller at a time."""

    def __init__(self) -> None:
        self._first: tuple[float, EngineInfo] | None = None
        self._ended = False
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._start()

    @property
    def exit_code(self) -> int | None:
        """What the process is known to have ended with; minus a signal's number, None while it lives."""
        return self._process.returncode

    async def load(self, seconds: float, info: EngineInfo) -> JaxpagedError | None:
        """Sends the first message, now and to each process that replaces this one; returns what the trial of the template said."""
        self._first = seconds, info
        answer: JaxpagedError | None = await self._ask(seconds, info)
        return answer

    async def do(self, seconds: float, job: Job) -> Prepared | JaxpagedError | Fault:
        """Sends a job and returns its answer; a process that is gone is replaced.

        If it was not the job's time that ended the process, the job is tried once more: somebody else may have ended it (the system where
        memory is short, say), just before the job came.
        """
        answer, code = await self._try(seconds, job)
        if code not in (None, -signal.SIGPROF):
            answer, _ = await self._try(seconds, job)
        return answer

    async def _try(self, seconds: float, job: Job) -> tuple[Prepared | JaxpagedError | Fault, int | None]:
        """Returns the answer to a job, and the exit code of the process if it died over it."""
        if self._process.poll() is not None:
            await self._replace()
        answer: Prepared | JaxpagedError | Fault = await self._ask(seconds, job)
        code = self.exit_code
        if code is not None:
            await self._replace()
        return answer, code

    def end(self) -> None:
        """Ends the process at once; callable after the event loop has ended."""
        self._ended = True
        self._process.kill()
        self._process.wait()
        self._disconnect()

    async def _ask(self, seconds: float, what: EngineInfo | Job) -> Any:
        if self._ended:
            return EngineStopped(_STOPPING)
        message = pickle.dumps((seconds, what))
        reader, writer = self._streams = self._streams or await asyncio.open_unix_connection(sock=self._socket)
        try:
            writer.write(_LENGTH.pack(len(message)) + message)
            (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
            return pickle.loads(await reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError):
            code = await asyncio.to_thread(self._process.wait)
        if self._ended:
            return EngineStopped(_STOPPING)
        limit = f"{seconds:.3g} s of a processor" if code == -signal.SIGPROF else f"{MEMORY_BYTES >> 20} MiB of memory"
        logger.warning("a text process ended with code %d while it prepared a request; another takes its place", code)
        return RequestError(f"preparing this request takes more than {limit}", code="request_too_costly")

    async def _replace(self) -> None:
        if not self._ended and self._first is not None:
            self._disconnect()
            await asyncio.to_thread(self._start)
            await self._ask(*self._first)

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "jaxpaged.server.text_process", str(theirs.fileno())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
        )
        theirs.close()

    def _disconnect(self) -> None:
        with contextlib.suppress(RuntimeError):  # of an event loop that has ended
            if self._streams is not None:
                self._streams[1].close()
        self._streams = None
        self._socket.close()
