"""Where log lines go: one background thread writes them, so that a full pipe never holds up a request.

A line says what happened in ids, counts and seconds. Prompts, completions, keys and header values are never logged; control
characters in what is logged are escaped, so that nobody can forge a line.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Literal, TextIO

MAX_QUEUED_LINES = 10_000
"""Lines that wait for a slow sink; beyond them lines are dropped and counted."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class LineFormatter(logging.Formatter):
    """Writes a record as one line with its time: as text (local time) or as a JSON object (UTC).

    Args:
        kind: ``text`` or ``json``.
    """

    def __init__(self, kind: Literal["text", "json"]) -> None:
        super().__init__()
        self._kind = kind

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line, control characters escaped."""
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        if self._kind == "json":
            moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
            return json.dumps({"time": moment, "level": record.levelname.lower(), "logger": record.name, "message": message})
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created)) + f".{int(record.msecs):03d}"
        safe = "\n  ".join(_CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", line) for line in message.splitlines())
        if record.levelno <= logging.INFO:
            return f"{moment} {safe}"
        return f"{moment} {record.levelname.lower():9} {safe}"


class QueuedHandler(logging.Handler):
    """Hands finished lines to a thread; drops them when the sink is slower than we are.

    Args:
        stream: The sink.

    Attributes:
        dropped: Lines that were dropped.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.dropped = 0
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_QUEUED_LINES)
        self._thread = threading.Thread(target=self._write, name="jaxpaged-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queues a record's line."""
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self.dropped += 1

    def finish(self, timeout_s: float = 1.0) -> None:
        """Waits until all lines are written, but not for a sink that is stuck."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
            self._thread.join(timeout_s)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            with contextlib.suppress(OSError, ValueError):
                self._stream.write(line + "\n")
                self._stream.flush()


@contextlib.contextmanager
def logging_to(stream: TextIO | None, kind: Literal["text", "json"], http_level: str) -> Iterator[QueuedHandler]:
    """Sends this package's log, and uvicorn's from ``http_level`` on, to ``stream`` (default: standard error) for a while."""
    handler = QueuedHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(LineFormatter(kind))
    levels = {"jaxpaged": logging.INFO, "uvicorn": logging.getLevelName(http_level.upper())}
    before = {}
    for name, level in levels.items():
        log = logging.getLogger(name)
        before[name] = (log.level, log.propagate)
        log.addHandler(handler)
        log.setLevel(level)
        log.propagate = False
    try:
        yield handler
    finally:
        for name, (old_level, propagate) in before.items():
            log = logging.getLogger(name)
            log.removeHandler(handler)
            log.setLevel(old_level)
            log.propagate = propagate
        handler.finish()
