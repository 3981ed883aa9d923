"""Compiles many rows in a few worker processes, each of which serves one target at a time."""

from __future__ import annotations

import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from compile_targets.reports import Kernel, Measured
from compile_targets.table import Row
from compile_targets.targets import TARGETS

_ROOT = Path(__file__).resolve().parents[2]
_ROW_LIMIT_S = 900
"""A compiler that takes longer is ended, and the row is red."""


class Session:
    """Compiles rows in the order given, target by target; each row's result is a future.

    Args:
        rows: What to compile.
        jobs: Worker processes at once.
    """

    def __init__(self, rows: Iterable[Row], jobs: int = 2) -> None:
        self.futures: dict[Row, concurrent.futures.Future[Measured]] = {row: concurrent.futures.Future() for row in rows}
        self._queues: dict[str, deque[Row]] = {}
        for row in self.futures:
            self._queues.setdefault(row.target, deque()).append(row)
        self._serving: dict[str, int] = dict.fromkeys(self._queues, 0)
        self._lock = threading.Lock()
        self._closed = False
        self._workers: set[_Worker] = set()
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(min(jobs, len(self.futures)))]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers; rows that are not done yet are cancelled."""
        with self._lock:
            self._closed = True
            for queue in self._queues.values():
                queue.clear()
            for worker in self._workers:
                worker.kill()
        for thread in self._threads:
            thread.join()
        for future in self.futures.values():
            future.cancel()

    def _serve(self) -> None:
        """Takes the target with the most rows per worker, serves it to its end, then the next."""
        while True:
            with self._lock:
                waiting = {name: len(queue) / (1 + self._serving[name]) for name, queue in self._queues.items() if queue}
                if not waiting:
                    return
                name = max(waiting, key=waiting.__getitem__)
                self._serving[name] += 1
                worker = _Worker(name)
                self._workers.add(worker)
            try:
                while row := self._next(name):
                    self.futures[row].set_result(worker.compile(row))
            finally:
                worker.kill()
                with self._lock:
                    self._serving[name] -= 1
                    self._workers.discard(worker)

    def _next(self, name: str) -> Row | None:
        with self._lock:
            return self._queues[name].popleft() if self._queues[name] else None


class _Worker:
    """One worker process, started when the first row comes and again after it died."""

    def __init__(self, target: str) -> None:
        self._target = TARGETS[target]
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[bytes] | None = None
        self._killed = False

    def compile(self, row: Row) -> Measured:
        missing = self._target.missing()
        if missing:
            return Measured(0.0, problems=(missing,))
        started = time.monotonic()
        process = self._started()
        limit = threading.Timer(_ROW_LIMIT_S, process.kill)
        limit.start()
        try:
            print(json.dumps(row.__dict__), file=process.stdin, flush=True)
            answer = process.stdout.readline() if process.stdout else ""
        except BrokenPipeError:
            answer = ""
        finally:
            limit.cancel()
        if not answer:
            return self._died(time.monotonic() - started)
        fields = json.loads(answer)
        kernels = tuple(Kernel(**kernel) for kernel in fields.pop("kernels"))
        return Measured(**{**fields, "kernels": kernels, "problems": tuple(fields["problems"])})

    def kill(self) -> None:
        self._killed = True
        if self._process is not None:
            self._process.kill()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            paths = [str(_ROOT / "scripts"), str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = os.environ | self._target.environment() | {"PYTHONPATH": os.pathsep.join(paths)}
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
            self._process = subprocess.Popen(
                [sys.executable, "-m", "compile_targets.worker", self._target.name],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment,
            )  # fmt: skip
            if self._killed:
                self._process.kill()
        return self._process

    def _died(self, seconds: float) -> Measured:
        process, self._process = self._process, None
        code = process.wait() if process else 0
        said = ""
        if self._errors is not None:
            self._errors.seek(0)
            said = " ".join(self._errors.read().decode(errors="replace").split())[-300:]
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        return Measured(seconds, problems=(f"the compiling process ended with {how} after {seconds:.0f} s: {said or 'it said nothing'}",))
