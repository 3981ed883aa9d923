#!/usr/bin/env python3
"""Writes the generated parts of docs/ from the tables in the code; ``--check`` only says whether they are up to date.

A generated part stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.
"""

import argparse
import json
import re
import sys
import typing
from collections.abc import Callable
from pathlib import Path

from jaxpaged.config import TINY_MODEL, EngineConfig, Option, ServerConfig, iter_options
from jaxpaged.scheduling.fields import SAMPLING_FIELDS
from jaxpaged.server.fields import ENDPOINTS, Status
from jaxpaged.vllm_options import VLLM_OPTIONS

DOCS = Path(__file__).resolve().parent.parent / "docs"


def options_table(*groups: type) -> str:
    """Returns the options of these dataclasses as a Markdown table."""
    rows = ["| flag | takes | default | meaning |", "|---|---|---|---|"]
    for opt in iter_options(*groups):
        spellings = ", ".join(f"`--{name.replace('_', '-')}`" for name in (opt.name, *opt.aliases))
        rows.append(f"| {spellings} | {takes(opt)} | {default(opt)} | {opt.help} |")
    return "\n".join(rows)


def takes(opt: Option) -> str:
    """Says in words what an option takes."""
    literal = [arg for arg in typing.get_args(opt.type) if isinstance(arg, str)]
    if literal:
        return ", ".join(f"`{arg}`" for arg in literal)
    if opt.type is bool:
        return f"`{opt.flag}` or `--no-{opt.flag[2:]}`"
    names = {int: "integer", float: "number", str: "text", dict: "JSON object", tuple: "list"}
    kinds = (opt.type, *typing.get_args(opt.type))
    return next(name for kind, name in names.items() if any(k is kind or typing.get_origin(k) is kind for k in kinds))


def default(opt: Option) -> str:
    """Returns an option's default as shown."""
    if opt.default in (None, "", ()):
        return ""
    return "the packaged tiny model" if opt.default == str(TINY_MODEL) else f"`{opt.default}`"


def vllm_table() -> str:
    """Returns vLLM's options that are not ours: the values that are taken, and what happens instead."""
    rows = ["| option of vLLM | taken | what happens |", "|---|---|---|"]
    for name, opt in VLLM_OPTIONS.items():
        spellings = ", ".join(f"`--{name.replace('_', '-')}`" if len(name) > 3 else f"`-{name}`" for name in (name, *opt.aliases))
        values = (*opt.same, *(opt.becomes[1] if opt.becomes else ()))
        taken = ", ".join(f"`{json.dumps(value) if not isinstance(value, str) else value}`" for value in values)
        rows.append(f"| {spellings} | {taken} | {opt.why} |")
    return "\n".join(rows)


def sampling_table() -> str:
    """Returns the sampling fields as a Markdown table."""
    rows = ["| field | takes | default | meaning |", "|---|---|---|---|"]
    for field in SAMPLING_FIELDS:
        shown = "" if field.default is None else f"`{json.dumps(field.default)}`"
        rows.append(f"| `{field.name}` | {field.allowed()} | {shown} | {field.meaning} |")
    return "\n".join(rows)


def fields_table(path: str, status: Status) -> str:
    """Returns an endpoint's fields of one fate."""
    fields = [field for field in ENDPOINTS[path] if field.status == status]
    if status == "no effect":
        return ", ".join(f"`{field.name}`" for field in fields)
    if status == "unsupported":
        rows = ["| field | stands for | taken nevertheless |", "|---|---|---|"]
        return "\n".join([*rows, *(f"| `{field.name}` | {field.meaning} | {shown_values(field.neutral)} |" for field in fields)])
    rows = ["| field | takes | default | meaning |", "|---|---|---|---|"]
    for field in fields:
        default = "required" if field.required else "" if field.default is None else f"`{json.dumps(field.default)}`"
        rows.append(f"| `{field.name}` | {field.type} | {default} | {field.meaning} |")
    return "\n".join(rows)


def shown_values(values: tuple[object, ...]) -> str:
    """Shows JSON values."""
    return ", ".join(f"`{json.dumps(value)}`" for value in (None, *values))


PARTS: dict[str, Callable[[], str]] = {
    "engine options": lambda: options_table(EngineConfig),
    "server options": lambda: options_table(ServerConfig),
    "vllm options": vllm_table,
    "chat fields": lambda: fields_table("/v1/chat/completions", "honoured"),
    "chat fields without effect": lambda: fields_table("/v1/chat/completions", "no effect"),
    "chat fields not supported": lambda: fields_table("/v1/chat/completions", "unsupported"),
    "completion fields": lambda: fields_table("/v1/completions", "honoured"),
    "completion fields without effect": lambda: fields_table("/v1/completions", "no effect"),
    "completion fields not supported": lambda: fields_table("/v1/completions", "unsupported"),
    "tokenize fields": lambda: fields_table("/tokenize", "honoured"),
    "detokenize fields": lambda: fields_table("/detokenize", "honoured"),
    "sampling fields": sampling_table,
    "fields of samples": lambda: ", ".join(f"`{field.name}`" for field in SAMPLING_FIELDS if field.goes_with == "samples"),
}


def render(text: str) -> str:
    """Returns a page with each of its generated parts renewed."""
    for name, make in PARTS.items():
        pattern = rf"(<!-- begin {re.escape(name)} -->\n).*?(\n<!-- end {re.escape(name)} -->)"
        text = re.sub(pattern, lambda match, make=make: match[1] + make() + match[2], text, flags=re.DOTALL)  # type: ignore[misc]
    return text


def main() -> int:
    """Returns 1 if ``--check`` finds a page out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = []
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if render(text) != text:
            stale.append(page.name)
            if not args.check:
                page.write_text(render(text), encoding="utf-8")
    print(f"{'out of date' if args.check else 'written'}: {', '.join(stale) or 'nothing'}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
