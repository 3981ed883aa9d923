"""Command-line flags made from the options of ``config``, and vLLM's beside them: parsing and precedence.

An option's value comes from the first of: the command line, ``JAXPAGED_<NAME>`` in the environment, the YAML file of
``--config``, the option's default.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxpaged.config import EngineConfig, Option, iter_options, make_config, read_environment, read_yaml, suggest
from jaxpaged.errors import ConfigError
from jaxpaged.vllm_options import VLLM_OPTIONS, VllmOption, replace_vllm_options

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 and the number of SIGINT."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are ConfigErrors, that takes no abbreviations, and answers unknown flags by name."""

    def __init__(self, *, description: str = "", **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, description=description.replace("``", ""), **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError instead of printing usage."""
        raise ConfigError(message)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses ``argv``; ``_`` and ``-`` are alike in flags.

        Raises:
            ConfigError: A flag is unknown (says which of ours is nearest) or lacks its value.
        """
        args, rest = self.parse_known_args([_dashed(arg) for arg in argv])
        if rest:
            self._complain(rest[0])
        return args

    def _complain(self, arg: str) -> NoReturn:
        name = arg.lstrip("-").partition("=")[0]
        if not arg.startswith("-"):
            raise ConfigError(f"unexpected argument {arg!r}")
        shown = [action for action in self._actions if action.help is not argparse.SUPPRESS]
        known = {flag.lstrip("-"): flag for action in shown for flag in action.option_strings}
        raise ConfigError(f"unknown flag {arg.partition('=')[0]}{suggest(name, known)}")


def add_options(parser: argparse.ArgumentParser, *groups: type) -> None:
    """Adds ``--config`` and a flag for each option of these dataclasses, grouped as they are."""
    parser.add_argument("--config", metavar="FILE.yaml", help="options from a YAML file, with the same names")
    sections: dict[type, Any] = {}
    for opt in iter_options(*groups):
        if opt.name == "model":
            # Before the flags, since one that takes several texts would take it too; and all flags stand below with their meaning.
            parser.usage = "%(prog)s [MODEL] [--flag [VALUE ...] ...]"
            parser.add_argument("model_argument", nargs="?", metavar="MODEL", help=opt.help)
        section = sections.get(opt.group)
        if section is None:
            section = sections[opt.group] = parser.add_argument_group(_title(opt.group))
        _add_option(section, opt)
    if EngineConfig in groups:
        for name, theirs in VLLM_OPTIONS.items():
            _add_vllm_option(parser, name, theirs)


def read_options(args: argparse.Namespace, *groups: type) -> tuple[Any, ...]:
    """Returns one config per group from the parsed flags, the environment and ``--config``.

    Raises:
        ConfigError: Names the option, its value and what is allowed.
    """
    merged, _ = _merge(args, groups)
    return tuple(make_config(group, {o.name: merged[o.name] for o in iter_options(group) if o.name in merged}) for group in groups)


def options_without_effect(args: argparse.Namespace, *groups: type) -> tuple[str, ...]:
    """Returns a line for each option of vLLM's that was given and asks for what happens anyway.

    Raises:
        ConfigError: As ``read_options``.
    """
    return _merge(args, groups)[1]


def _merge(args: argparse.Namespace, groups: tuple[type, ...]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the values that hold, by name, and the notes on vLLM's options."""
    known = {spelling: opt.name for opt in iter_options(*groups) for spelling in (opt.name, *opt.aliases)}
    merged: dict[str, Any] = {}
    notes: list[str] = []
    layers = (
        (read_yaml(args.config), f"--config {args.config}: ") if args.config else ({}, ""),
        (read_environment(*groups), ""),
        (given_options(args), ""),
    )
    for layer, where in layers:
        ours, without_effect = replace_vllm_options(layer, known, where=where)
        notes += without_effect
        for name, value in ours.items():
            if name not in known:
                raise ConfigError(f"{where}unknown option {name!r}{suggest(name, known)}")
            merged[known[name]] = value
    if getattr(args, "model_argument", None):
        merged["model"] = args.model_argument
    if "model" not in merged:
        _refuse_swallowed_model(args, groups)
    return merged, tuple(notes)


def _refuse_swallowed_model(args: argparse.Namespace, groups: tuple[type, ...]) -> None:
    """Raises ConfigError if MODEL seems to stand behind a flag that takes several values: it would become one of them, unseen."""
    for opt in iter_options(*groups):
        values = getattr(args, opt.name, None)
        if _takes_several(opt) and values and len(values) > 1 and ("/" in values[-1] or Path(values[-1]).is_dir()):
            raise ConfigError(
                f"{opt.flag} takes all values behind it, and the last looks like a model; name the model before the flags or with --model"
            )


def _add_option(section: Any, opt: Option) -> None:
    spellings = [opt.flag, *("--" + alias.replace("_", "-") for alias in opt.aliases)]
    text = opt.help if opt.default in (None, (), "") or "default" in opt.help else f"{opt.help} (default {opt.default})"
    text = text.replace("%", "%%")
    if opt.type is bool:
        section.add_argument(*spellings, dest=opt.name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
    elif _takes_several(opt):
        section.add_argument(*spellings, dest=opt.name, action="extend", nargs="+", default=argparse.SUPPRESS, metavar="TEXT", help=text)
    else:
        section.add_argument(*spellings, dest=opt.name, default=argparse.SUPPRESS, metavar=_metavar(opt), help=text)


def _takes_several(opt: Option) -> bool:
    return bool(opt.type == tuple[str, ...])


def _add_vllm_option(parser: argparse.ArgumentParser, name: str, opt: VllmOption) -> None:
    """Adds a flag of vLLM's, which ``--help`` does not show."""
    spellings = ["--" + name.replace("_", "-"), *(dash + alias for alias in opt.aliases for dash in ("-", "--"))]
    hidden: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    if opt.is_switch:
        parser.add_argument(*spellings, action=argparse.BooleanOptionalAction, **hidden)
    else:
        parser.add_argument(*spellings, **hidden)


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options that stand on the command line, by name, without a command's own and without MODEL."""
    internal = {"config", "model_argument", "command", "run"}
    return {name: value for name, value in vars(args).items() if name not in internal and not name.startswith("own_")}


def _metavar(opt: Option) -> str:
    words = {int: "N", float: "X", str: "TEXT"}
    literal = [arg for arg in getattr(opt.type, "__args__", ()) if isinstance(arg, str)]
    if literal:
        return "{" + ",".join(literal) + "}"
    return next((word for kind, word in words.items() if kind is opt.type or kind in getattr(opt.type, "__args__", ())), "VALUE")


def _title(group: type) -> str:
    return (group.__doc__ or group.__name__).split("\n")[0].rstrip(".").lower().replace("``", "")


def _dashed(arg: str) -> str:
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value


def say(line: str) -> None:
    """Prints one line for a person on standard error."""
    print(f"jaxpaged: {line}", file=sys.stderr)  # noqa: T201


def fail(error: Exception) -> int:
    """Prints one line for a person and returns exit code 2."""
    say(str(error))
    return 2
