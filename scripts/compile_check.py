"""Compiles every kernel and the whole engine step for TPUs and GPUs that are not there, and prints the table of docs/kernels.md.

    pip install -e '.[aot]'
    python scripts/compile_check.py
    python scripts/compile_check.py --target H200 --only "attention mosaic_gpu / Llama-3-8B"
    python scripts/compile_check.py --write docs/kernels.md

A row is green if it compiles, its scratch memory is within the bound, the pages are updated in place and copied nowhere, and no
GPU kernel of ours spills registers. Each row's line appears when it is done (on stderr with --markdown).
Exit status: 0 if all are green, 1 if one is red.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import importlib.metadata
import os
import platform
import sys
import time
from pathlib import Path

from compile_targets.report import line, markdown
from compile_targets.session import Session
from compile_targets.table import rows
from compile_targets.targets import TARGETS

BEGIN, END = "<!-- compile_check: begin -->", "<!-- compile_check: end -->"


def write_between_marks(page: Path, tables: str) -> None:
    """Replaces what stands between the page's marks by the tables, and says when, where and with what they were made."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{page}: the marks {BEGIN} and {END} are missing")
    packages = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    versions = ", ".join(f"{name} {packages[name]}" for name in ("jax", "libtpu", "nvidia-cuda-nvcc") if name in packages)
    made = f"{datetime.date.today():%d %B %Y}, {versions}, {os.cpu_count()} cores of {platform.machine()}."
    page.write_text(f"{before}{BEGIN}\n{made}\n\n{tables.rstrip()}\n{END}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="a chip; may be given more than once (default: all)")
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="rows whose name holds this text, and any other that is given"
    )
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="compilers at once (default: %(default)s)")
    parser.add_argument("--markdown", action="store_true", help="print the tables of docs/kernels.md on stdout")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables between the marks of a page: docs/kernels.md")
    parser.add_argument("--list", action="store_true", help="print the rows' names and compile nothing")
    arguments = parser.parse_args()
    chosen = [
        row
        for row in rows()
        if (not arguments.target or row.target in arguments.target) and all(text in str(row) for text in arguments.only)
    ]
    if not chosen:
        parser.error("no row fits --target and --only; --list shows their names")
    if arguments.list:
        print(*chosen, sep="\n")
        return 0
    progress = sys.stderr if arguments.markdown else sys.stdout
    started = time.monotonic()
    with Session(chosen, arguments.jobs) as session:
        of = {future: row for row, future in session.futures.items()}
        for done, future in enumerate(concurrent.futures.as_completed(of), start=1):
            print(f"{done:3}/{len(of)} {line(of[future], future.result())}", file=progress, flush=True)
        results = {row: future.result() for row, future in session.futures.items()}
    red = sum(bool(result.problems) for result in results.values())
    print(f"{len(results)} rows, {red} red, {time.monotonic() - started:.0f} s", file=progress)
    if arguments.markdown:
        print(markdown(results))
    if arguments.write:
        write_between_marks(arguments.write, markdown(results))
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
