"""``jaxpaged serve | generate | chat | memory | collect-env``: finds the command and runs it; ``--version`` says which one this is.

Commands are loaded when used, so that ``jaxpaged --help`` does not wait for JAX.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from jaxpaged.config import suggest
from jaxpaged.errors import ConfigError, JaxpagedError
from jaxpaged.flags import INTERRUPTED, fail
from jaxpaged.version import installed_version

COMMANDS = {
    "serve": ("jaxpaged.commands.serve", "serve a model over OpenAI's HTTP API"),
    "generate": ("jaxpaged.commands.generate", "complete prompts offline"),
    "chat": ("jaxpaged.commands.chat", "chat in the terminal, with a model here or a running server"),
    "memory": ("jaxpaged.commands.memory", "show how much K/V memory paging saves on a workload"),
    "collect-env": ("jaxpaged.commands.collect_env", "print versions and devices for a bug report"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments after the program's name; default: the process's.

    Returns:
        The exit code: 0, 130 after Ctrl-C, or 2 with one line on standard error for a mistake in the options.
    """
    _open_standard_streams()
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if args else 2
    if args[0] in ("-V", "--version", "version"):
        print(f"jaxpaged {installed_version()}")
        return 0
    if args[0] not in COMMANDS:
        return fail(ConfigError(f"unknown command {args[0]!r}{suggest(args[0], COMMANDS)}; commands: {', '.join(COMMANDS)}"))
    try:
        code: int = importlib.import_module(COMMANDS[args[0]][0]).run(args[1:])
    except JaxpagedError as error:
        return fail(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def _open_standard_streams() -> None:
    """Opens those of descriptors 0 to 2 that the caller has closed (``2>&-``) on the null device, as daemons do.

    Else the next file or socket gets the number, and whatever somebody writes to standard error ends up there.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115  (it stays open)


def _usage() -> str:
    lines = [f"  {name:12} {help}" for name, (_, help) in COMMANDS.items()]
    return (
        "usage: jaxpaged COMMAND ...\n\n"
        + "\n".join(lines)
        + "\n\njaxpaged COMMAND --help lists its flags; jaxpaged --version says which version this is."
    )
