"""How start-up is shown: bars in a terminal, plain lines elsewhere, nothing in tests."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichBars

_LABEL_WIDTH = 9
_STEPS = 10


class Progress(Protocol):
    """Told of each stage of start-up, in order: ``begin``, ``advance`` any number of times, ``end``; and single lines between them."""

    def begin(self, stage: str, total: int, unit: str) -> None:
        """A stage begins; ``total`` is the last value of ``advance``, in bytes or in what the stage is named after."""

    def advance(self, done: int, note: str = "") -> None:
        """The stage has come this far; ``note`` says more about it."""

    def end(self, text: str) -> None:
        """The stage is over; the line that stays."""

    def say(self, text: str) -> None:
        """A line of its own."""


class Quiet:
    """Shows nothing."""

    def begin(self, stage: str, total: int, unit: str) -> None:
        """Nothing."""

    def advance(self, done: int, note: str = "") -> None:
        """Nothing."""

    def end(self, text: str) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""


class Lines:
    """Plain lines: one per tenth of a stage that takes longer than a second, and one at its end.

    Args:
        write: Takes each line.
        clock: Monotonic seconds.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._stage, self._unit = "", ""
        self._total = self._shown = 0
        self._began = 0.0

    def begin(self, stage: str, total: int, unit: str) -> None:
        """Remembers the stage."""
        self._stage, self._total, self._unit, self._shown, self._began = stage, total, unit, 0, self._clock()

    def advance(self, done: int, note: str = "") -> None:
        """Writes a line if another tenth is done, with the time that the rest takes if it goes on like this."""
        share, spent = _STEPS * done // self._total if self._total else 0, self._clock() - self._began
        if share > self._shown and done < self._total and spent > 1.0:
            self._shown = share
            left = f"about {spent / done * (self._total - done):.0f} s left"
            parts = (f"{_amount(done, self._unit)} of {_amount(self._total, self._unit)}", note, left)
            self._write(f"{self._stage:{_LABEL_WIDTH}} {', '.join(filter(None, parts))}")

    def end(self, text: str) -> None:
        """Writes the stage's outcome."""
        self._write(f"{self._stage:{_LABEL_WIDTH}} {text}")

    def say(self, text: str) -> None:
        """Writes a line."""
        self._write(text)


class Bars:
    """Bars that give way to one line each.

    Args:
        console: The terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: RichBars | None = None
        self._task = TaskID(0)
        self._stage, self._unit = "", ""
        self._total = 0

    def begin(self, stage: str, total: int, unit: str) -> None:
        """Opens a bar."""
        self._stage, self._total, self._unit = stage, total, unit
        columns = (
            TextColumn(f"{{task.description:{_LABEL_WIDTH}}}"),
            BarColumn(24),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bars = RichBars(*columns, console=self._console, transient=True)
        self._task = self._bars.add_task(stage, total=max(1, total), amount="")
        self._bars.start()

    def advance(self, done: int, note: str = "") -> None:
        """Moves it."""
        if self._bars is not None:
            parts = (f"{_amount(done, self._unit)}/{_amount(self._total, self._unit)}", note)
            self._bars.update(self._task, completed=done, amount=", ".join(filter(None, parts)))

    def end(self, text: str) -> None:
        """Closes it and leaves the outcome."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
        self.say(f"{self._stage:{_LABEL_WIDTH}} {text}")

    def say(self, text: str) -> None:
        """Writes a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def make_progress(stream: TextIO | None = None) -> Progress:
    """Returns bars if ``stream`` (default: what standard error is now) is a terminal, plain lines if not."""
    stream = stream or sys.stderr
    if stream.isatty():
        return Bars(Console(file=stream))
    return Lines(lambda line: print(line, file=stream, flush=True))


def gib(num_bytes: float) -> str:
    """Writes bytes in the unit that suits them."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:.1f} MiB"


def _amount(value: int, unit: str) -> str:
    return gib(value) if unit == "bytes" else str(value)
