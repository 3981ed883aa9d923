"""Command-line flags made from the options of ``config``: parsing, precedence, and answers to flags that we lack.

An option's value comes from the first of: the command line, ``JAXPAGED_<NAME>`` in the environment, the YAML file of
``--config``, the option's default.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jaxpaged.config import Option, iter_options, make_config, read_environment, read_yaml, suggest
from jaxpaged.errors import ConfigError

LACKING: Mapping[str, str] = {
    "trust-remote-code": "code from a model directory is never executed; convert the model to a supported architecture",
    "tensor-parallel-size": "this version runs on one device",
    "tp": "this version runs on one device",
    "pipeline-parallel-size": "this version runs on one device",
    "data-parallel-size": "start one server per device behind a router",
    "quantization": "this version computes in bfloat16, float16 or float32",
    "enable-chunked-prefill": "chunked prefill is always on",
    "no-enable-chunked-prefill": "chunked prefill is always on; raise --max-num-batched-tokens to make chunks larger",
    "scheduling-policy": "requests run first come, first served",
    "enforce-eager": "every step is compiled; use --no-warmup to compile on first use",
    "enable-lora": "adapters are not in this version",
    "speculative-config": "speculative decoding is not in this version",
    "enable-auto-tool-choice": "tool calls are not in this version",
    "tool-call-parser": "tool calls are not in this version",
    "reasoning-parser": "reasoning parsers are not in this version",
    "num-scheduler-steps": "steps overlap with the host by default, see --async-depth",
    "tokenizer-mode": "the fast tokenizer is always used",
    "cpu-offload-gb": "weights stay on the device",
    "device": "JAX picks the device; set JAX_PLATFORMS to choose another",
    "limit-mm-per-prompt": "models take text only",
    "disable-log-requests": "requests are not logged unless --log-requests is given",
    "disable-log-stats": "use --no-log-stats",
    "enable-request-id-headers": "every answer carries x-request-id",
    "enable-prompt-tokens-details": "cached tokens are always reported",
    "gpu-memory-utilisation": "spelt --gpu-memory-utilization",
}
"""vLLM's flags that we know and do not have, each with what to do instead."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are ConfigErrors, that takes no abbreviations, and answers unknown flags by name."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError instead of printing usage."""
        raise ConfigError(message)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses ``argv``; ``_`` and ``-`` are alike in flags.

        Raises:
            ConfigError: A flag is unknown (says whether vLLM has it, or which of ours is nearest) or lacks its value.
        """
        args, rest = self.parse_known_args([_dashed(arg) for arg in argv])
        if rest:
            self._complain(rest[0])
        return args

    def _complain(self, arg: str) -> NoReturn:
        name = arg.lstrip("-").partition("=")[0]
        if not arg.startswith("-"):
            raise ConfigError(f"unexpected argument {arg!r}")
        if name in LACKING:
            raise ConfigError(f"--{name} is a flag of vLLM that jaxpaged does not have: {LACKING[name]}")
        known = {flag.lstrip("-"): flag for action in self._actions for flag in action.option_strings}
        raise ConfigError(f"unknown flag --{name}{suggest(name, known)}")


def add_options(parser: argparse.ArgumentParser, *groups: type) -> None:
    """Adds ``--config`` and a flag for each option of these dataclasses, grouped as they are."""
    parser.add_argument("--config", metavar="FILE.yaml", help="options from a YAML file, with the same names")
    sections: dict[type, Any] = {}
    for opt in iter_options(*groups):
        if opt.name == "model":
            parser.add_argument("model_argument", nargs="?", metavar="MODEL", help=opt.help)
        section = sections.get(opt.group)
        if section is None:
            section = sections[opt.group] = parser.add_argument_group(_title(opt.group))
        _add_option(section, opt)


def read_options(args: argparse.Namespace, *groups: type) -> tuple[Any, ...]:
    """Returns one config per group from the parsed flags, the environment and ``--config``.

    Raises:
        ConfigError: Names the option, its value and what is allowed.
    """
    known = {spelling: opt.name for opt in iter_options(*groups) for spelling in (opt.name, *opt.aliases)}
    merged: dict[str, Any] = {}
    layers = (
        (read_yaml(args.config), f"--config {args.config}: ") if args.config else ({}, ""),
        (read_environment(*groups), ""),
        (_given(args), ""),
    )
    for layer, where in layers:
        for name, value in layer.items():
            if name not in known:
                hint = LACKING.get(name.replace("_", "-"))
                raise ConfigError(f"{where}unknown option {name!r}" + (f": {hint}" if hint else suggest(name, known)))
            merged[known[name]] = value
    if getattr(args, "model_argument", None):
        merged["model"] = args.model_argument
    return tuple(make_config(group, {o.name: merged[o.name] for o in iter_options(group) if o.name in merged}) for group in groups)


def _add_option(section: Any, opt: Option) -> None:
    spellings = [opt.flag, *("--" + alias.replace("_", "-") for alias in opt.aliases)]
    text = opt.help if opt.default in (None, ()) else f"{opt.help} (default {opt.default})"
    text = text.replace("%", "%%")
    if opt.type is bool:
        section.add_argument(*spellings, dest=opt.name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
    elif str(opt.type).startswith("tuple[str"):
        section.add_argument(*spellings, dest=opt.name, action="append", default=argparse.SUPPRESS, metavar="TEXT", help=text)
    else:
        section.add_argument(*spellings, dest=opt.name, default=argparse.SUPPRESS, metavar=_metavar(opt), help=text)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    internal = {"config", "model_argument", "command", "run"}
    return {name: value for name, value in vars(args).items() if name not in internal and not name.startswith("own_")}


def _metavar(opt: Option) -> str:
    words = {int: "N", float: "X", str: "TEXT"}
    literal = [arg for arg in getattr(opt.type, "__args__", ()) if isinstance(arg, str)]
    if literal:
        return "{" + ",".join(literal) + "}"
    return next((word for kind, word in words.items() if kind is opt.type or kind in getattr(opt.type, "__args__", ())), "VALUE")


def _title(group: type) -> str:
    return (group.__doc__ or group.__name__).split("\n")[0].rstrip(".").lower()


def _dashed(arg: str) -> str:
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value


def fail(error: Exception) -> int:
    """Prints one line for a person and returns exit code 2."""
    print(f"jaxpaged: {error}", file=sys.stderr)  # noqa: T201
    return 2
