"""Processes that prepare calls, so that no template, tokenizer, pattern or body of a client keeps the server from its work.

A thread for each process waits for its answers. A process that dies, of a job's time or memory, is replaced; the job's client is told.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from typing import Any, Protocol

from jaxpaged.engine.status import EngineInfo
from jaxpaged.errors import ConfigError, EngineStopped, JaxpagedError, RequestError
from jaxpaged.server.prepare import Job, Prepared
from jaxpaged.server.text_process import MEMORY_BYTES, Fault
from jaxpaged.server.turns import Turns

logger = logging.getLogger(__name__)

JOB_S = 10.0
JOB_BYTES = 2 * 2**20
"""A job may take ``JOB_S`` seconds of a processor, and once more for every ``JOB_BYTES`` of its body."""

SMALL_BODY_BYTES = 32 * 1024
"""Bodies up to this size are small: they need no budget, are parsed where they arrive, and have a process that large ones may not use."""


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
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="jaxpaged-text")
        self._idle = [_Process() for _ in range(count)]
        self._all: Sequence[_Process] = tuple(self._idle)
        self._loaded = asyncio.Event()

    async def load(self, info: EngineInfo) -> None:
        """Gives the processes their tokenizer and tries the chat template; jobs wait until that is done.

        Raises:
            ConfigError: The chat template is not valid, or takes too long or too much for one short message.
        """
        loop = asyncio.get_running_loop()
        results = await asyncio.gather(*(loop.run_in_executor(self._threads, process.load, self._job_s, info) for process in self._all))
        if (error := results[0]) is not None:
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
        done = asyncio.get_running_loop().run_in_executor(self._threads, process.do, seconds, job)

        def give_back(_: object) -> None:  # not before the process is done, even where nobody waits for it any more
            self._idle.append(process)
            self._turns.give(large=large)

        done.add_done_callback(give_back)
        answer = await asyncio.shield(done)
        if isinstance(answer, Fault):
            logger.error("request %s failed while it was prepared: %s", job.request_id, answer)
        if isinstance(answer, JaxpagedError | Fault):
            raise answer
        return answer

    def close(self) -> None:
        """Ends the processes, whatever they do; what waits for them gets EngineStopped."""
        for process in self._all:
            process.end()
        self._threads.shutdown(wait=False, cancel_futures=True)


class _Process:
    """One process. Its methods block; ``end`` may be called while another waits."""

    def __init__(self) -> None:
        self._first: tuple[float, EngineInfo] | None = None
        self._ended = False
        self._start()

    def load(self, seconds: float, info: EngineInfo) -> JaxpagedError | None:
        """Sends the first message, now and to each process that replaces this one; returns what the trial of the template said."""
        self._first = seconds, info
        answer: JaxpagedError | None = self._ask(seconds, info)
        return answer

    def do(self, seconds: float, job: Job) -> Prepared | JaxpagedError | Fault:
        """Sends a job and returns its answer; a process that is gone is replaced, before the job or after it."""
        if self._process.poll() is not None:
            self._replace()
        answer: Prepared | JaxpagedError | Fault = self._ask(seconds, job)
        if self._process.poll() is not None:
            self._replace()
        return answer

    def end(self) -> None:
        """Ends the process at once."""
        self._ended = True
        self._process.kill()
        self._process.wait()

    def _ask(self, seconds: float, what: EngineInfo | Job) -> Any:
        try:
            self._connection.send_bytes(pickle.dumps((seconds, what)))
            return pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            code = self._process.wait()
        if self._ended:
            return EngineStopped("the server is shutting down")
        limit = f"{seconds:.3g} s of a processor" if code == -signal.SIGPROF else f"{MEMORY_BYTES >> 20} MiB of memory"
        logger.warning("a text process ended (%d) over work that takes more than %s; another takes its place", code, limit)
        return RequestError(f"preparing this request takes more than {limit}", code="request_too_costly")

    def _replace(self) -> None:
        if not self._ended and self._first is not None:
            self._connection.close()
            self._start()
            self._ask(*self._first)

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        command = [sys.executable, "-P", "-m", "jaxpaged.server.text_process", str(theirs.fileno())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
        )
        theirs.close()
