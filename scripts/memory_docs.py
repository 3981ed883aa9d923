#!/usr/bin/env python3
"""Runs every command that docs/memory.md shows and puts what it prints below it; ``--check`` only says which differ.

A command stands on the first line of a ``console`` block, after ``$ ``.
"""

import argparse
import contextlib
import io
import re
import shlex
import sys
import time
from pathlib import Path

from jaxpaged.cli import main as jaxpaged

PAGE = Path(__file__).resolve().parent.parent / "docs" / "memory.md"
_BLOCK = re.compile(r"^```console\n\$ jaxpaged (?P<command>.+)\n(?P<printed>(?:.*\n)*?)```$", re.MULTILINE)


def shown(text: str) -> list[tuple[str, str]]:
    """Returns each command of a page, without the program's name, and what the page says that it prints."""
    return [(match["command"], match["printed"]) for match in _BLOCK.finditer(text)]


def printed_by(command: str) -> str:
    """Runs a command in this process and returns what it prints, without spaces at the ends of lines."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        code = jaxpaged(shlex.split(command))
    if code:
        raise RuntimeError(f"jaxpaged {command} ended with {code}")
    return "".join(f"{line.rstrip()}\n" for line in stream.getvalue().splitlines())


def main() -> int:
    """Returns 1 if ``--check`` finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    stale = 0
    for command, before in shown(text):
        began = time.perf_counter()
        now = printed_by(command)
        stale += now != before
        print(f"{'same' if now == before else 'differs':8} {time.perf_counter() - began:6.1f} s  jaxpaged {command}", flush=True)
        text = text.replace(f"$ jaxpaged {command}\n{before}```", f"$ jaxpaged {command}\n{now}```")
    if stale and not arguments.check:
        PAGE.write_text(text, encoding="utf-8")
    return int(bool(stale and arguments.check))


if __name__ == "__main__":
    sys.exit(main())
