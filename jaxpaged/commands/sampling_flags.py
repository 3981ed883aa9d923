"""Flags for sampling parameters, shared by ``generate`` and ``chat``; their names and ranges are the request fields'."""

from __future__ import annotations

import argparse
import json
from typing import Any

from jaxpaged.errors import ConfigError
from jaxpaged.scheduling.fields import SAMPLING_FIELDS


def add_sampling_flags(section: Any) -> None:
    """Adds ``--max-tokens``, ``--temperature`` and ``--sampling``."""
    section.add_argument("--max-tokens", dest="own_max_tokens", type=int, metavar="N", help="most tokens to generate")
    section.add_argument("--temperature", dest="own_temperature", type=float, metavar="X", help="0 takes the most likely token")
    section.add_argument(
        "--sampling", dest="own_sampling", metavar="JSON", help='any request field, as in \'{"top_p": 0.9, "seed": 7, "stop": ["END"]}\''
    )


def read_sampling_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields that were given.

    Raises:
        ConfigError: ``--sampling`` is not a JSON object of known fields.
    """
    try:
        values = json.loads(args.own_sampling) if args.own_sampling else {}
    except json.JSONDecodeError as error:
        raise ConfigError(f"--sampling must be a JSON object; got {args.own_sampling!r} ({error})") from error
    known = [field.name for field in SAMPLING_FIELDS]
    if not isinstance(values, dict) or any(name not in known for name in values):
        raise ConfigError(f"--sampling must be a JSON object with fields of {', '.join(known)}; got {args.own_sampling!r}")
    if isinstance(values.get("logit_bias"), dict):
        values["logit_bias"] = {int(key): value for key, value in values["logit_bias"].items()}
    if args.own_max_tokens is not None:
        values["max_tokens"] = args.own_max_tokens
    if args.own_temperature is not None:
        values["temperature"] = args.own_temperature
    return values
