"""A process that compiles rows for one target: a row as JSON on a line of stdin, its result as JSON on a line of stdout.

    python -m compile_targets.worker TARGET

Importing jax and opening a compiler takes seconds, so that one process serves many rows. Compilers print to the file descriptors of
stdout and stderr; both go to a file, where the row's reports are read, and the results go to a copy of the first.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import jax

from compile_targets.measure import measure, open_device, processor_seconds
from compile_targets.reports import Kernel, Measured
from compile_targets.table import Row
from compile_targets.targets import TARGETS

_MOST_OF_A_MESSAGE = 600


def main() -> None:
    target = TARGETS[sys.argv[1]]
    answers = os.fdopen(os.dup(1), "w")
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
        captured = _reader(printed.fileno())
        device = open_device(target)
        reported: dict[frozenset[str], list[Kernel]] = {}
        for line in sys.stdin:
            row = Row(**json.loads(line))
            started = processor_seconds()
            try:
                result = measure(row, target, device, captured, reported)
            except Exception as error:  # whatever a compiler raises is the row's result
                where = traceback.extract_tb(error.__traceback__)[-1]
                said = " ".join(str(error).split())[:_MOST_OF_A_MESSAGE]
                problem = f"{type(error).__name__}: {said} ({Path(where.filename).name}:{where.lineno})"
                result = Measured(processor_seconds() - started, problems=(problem,))
            jax.clear_caches()
            print(json.dumps(dataclasses.asdict(result)), file=answers, flush=True)


def _reader(descriptor: int) -> Callable[[], str]:
    """Returns a function that returns what was written to a file since its last call, without moving the writers' place in it."""
    position = 0

    def read() -> str:
        nonlocal position
        sys.stdout.flush()
        sys.stderr.flush()
        written = os.pread(descriptor, os.fstat(descriptor).st_size - position, position)
        position += len(written)
        return written.decode(errors="replace")

    return read


if __name__ == "__main__":
    main()
