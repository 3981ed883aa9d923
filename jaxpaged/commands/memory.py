"""``jaxpaged memory [MODEL]``: how much K/V memory paging saves on a workload, without weights or a device.

A workload is replayed through the scheduler that serves requests, and through three systems that reserve contiguous memory: for the
longest context, for the next power of two, and for the true length. docs/memory.md says what each figure counts.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxpaged.errors import ConfigError
from jaxpaged.flags import Parser, add_options, read_options
from jaxpaged.memory.options import MemoryConfig
from jaxpaged.memory.page import to_html
from jaxpaged.memory.report import to_json, to_text, worked_text
from jaxpaged.memory.study import Study
from jaxpaged.memory.worked import work_example


def run(argv: Sequence[str]) -> int:
    """Prints the report, or writes it where ``--json`` and ``--html`` say."""
    parser = Parser(prog="jaxpaged memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, MemoryConfig)
    (config,) = read_options(parser.parse(argv), MemoryConfig)
    if config.reserved is not None or config.used is not None:
        return _work_example(config)
    report = Study(config).run()
    if config.json == "-":
        print(to_json(report), end="")
    else:
        print(to_text(report), end="")
    if config.json not in (None, "-"):
        _write("json", config.json, to_json(report))
    if config.html is not None:
        _write("html", config.html, to_html(report, shlex.join(("jaxpaged", "memory", *argv))))
    return 0


def _work_example(config: MemoryConfig) -> int:
    if config.reserved is None or config.used is None:
        raise ConfigError("reserved and used belong together; give both")
    for page_size in config.page_size:
        if not 1 <= page_size <= 1024:
            raise ConfigError(f"page_size must be an integer from 1 to 1024; got {page_size}")
        print(worked_text(work_example(reserved=config.reserved, used=config.used, page_size=page_size)), end="")
    return 0


def _write(name: str, path: str, text: str) -> None:
    try:
        Path(path).expanduser().write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--{name} {path}: {error.strerror}") from error
    print(f"written: {path}", file=sys.stderr)
