"""The process at the other end of a ``text_pool``: it prepares one call after another, and ends when one takes too long.

The limit of time is an alarm of the operating system that counts the processor's seconds. So it holds in a loop of a template and in
compiled code, even when the server is gone, and nobody's request is ended because the machine is busy. The process does not load JAX.
"""

from __future__ import annotations

import contextlib
import gc
import pickle
import resource
import signal
import sys
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from jaxpaged.engine.chat_template import import_transformers
from jaxpaged.engine.status import EngineInfo
from jaxpaged.errors import JaxpagedError, RequestError
from jaxpaged.server.prepare import Job, Prepared, prepare

MEMORY_BYTES = 2**30
"""Memory that a job may take on top of what the process holds when it is ready."""


class Fault(Exception):
    """An exception that nobody expected. Its text says where it was raised, and not what it said: that may quote a prompt."""


def serve(server: Connection) -> None:
    """Answers messages until the connection is closed; all are pickled.

    The first message is a number of seconds of a processor and the ``EngineInfo``, answered with what a trial of the chat template raised,
    or None. Each further one is a number of seconds and a ``Job``, answered with what ``prepare`` returned or raised, or with a
    ``Fault``. A message that takes more than its seconds ends the process with SIGPROF.
    """
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    import_transformers("transformers.utils.chat_template_utils")
    seconds, info = pickle.loads(server.recv_bytes())
    _limit_memory()
    with _alarm(seconds):
        answer = pickle.dumps(_try_template(info))
    server.send_bytes(answer)
    gc.collect()
    gc.freeze()  # what was loaded lives as long as the process; collections need not look at it
    while True:
        seconds, job = pickle.loads(server.recv_bytes())
        with _alarm(seconds):
            answer = pickle.dumps(_do(job, info))
        server.send_bytes(answer)


def _do(job: Job, info: EngineInfo) -> Prepared | JaxpagedError | Fault:
    try:
        return prepare(job, info)
    except JaxpagedError as error:
        return error
    except MemoryError:
        return RequestError(f"preparing this request takes more than {MEMORY_BYTES >> 20} MiB of memory", code="request_too_costly")
    except BaseException as error:  # a tokenizer that panics raises an exception that is no Exception
        frames = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(traceback.extract_tb(error.__traceback__)[-6:]))
        return Fault(f"{type(error).__name__} at {frames}")


def _try_template(info: EngineInfo) -> RequestError | None:
    """Renders one short conversation, so that a template that cannot work is known before the first client comes."""
    try:
        if info.tokenizer.has_chat_template:
            info.tokenizer.apply_chat_template([{"role": "user", "content": "Hello."}])
    except MemoryError:
        return RequestError(f"it takes more than {MEMORY_BYTES >> 20} MiB of memory for one short message", code="invalid_chat_template")
    except RequestError as error:
        return error
    return None


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory() -> None:
    """Bounds the address space; systems without /proc have no such limit either."""
    held = Path("/proc/self/statm")
    if held.exists():
        most = int(held.read_text().split()[0]) * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    with Connection(int(sys.argv[1])) as connection, contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        serve(connection)
