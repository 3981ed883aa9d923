"""The table, for a terminal and for docs/kernels.md."""

from __future__ import annotations

from collections.abc import Mapping

from compile_targets.reports import Measured
from compile_targets.table import Row
from compile_targets.targets import TARGETS

_PLATFORMS = {"cuda": "NVIDIA", "tpu": "TPU"}


def line(row: Row, result: Measured) -> str:
    """Returns a row's line for a terminal."""
    registers = " ".join(f"{kernel.registers}r/{kernel.spill_bytes}s" for kernel in result.kernels)
    verdict = "ok" if not result.problems else "RED " + "; ".join(result.problems)
    return f"{row!s:95} {result.seconds:6.1f} s {_size(result.temp_bytes):>9} {registers:18} {verdict}"


def markdown(results: Mapping[Row, Measured]) -> str:
    """Returns one table per platform; a line is a program and a shape, and the chips stand side by side."""
    parts = []
    for platform, title in _PLATFORMS.items():
        names = [name for name, target in TARGETS.items() if target.platform == platform and any(row.target == name for row in results)]
        if not names:
            continue
        lines: dict[tuple[str, ...], dict[str, Measured]] = {}
        for row, result in results.items():
            if row.target in names:
                key = (_program(row), row.implementation, row.model, row.call, row.kv_dtype)
                lines.setdefault(key, {})[row.target] = result
        gpu = platform == "cuda"
        head = ["program", "kernel", "shape of", "call", "pages"] + (["registers", "spills"] if gpu else [])
        head += [f"{name}: s, temp" for name in names] + [""]
        parts += [f"### {title}: {', '.join(names)}", "", _cells(head), _cells(["---"] * len(head))]
        for key, by_target in lines.items():
            kernels = next((result.kernels for result in by_target.values() if result.kernels), ())
            cells = [*key]
            if gpu:
                cells += [_together(k.registers for k in kernels), _together(k.spill_bytes for k in kernels)]
            cells += [_cell(by_target.get(name)) for name in names]
            cells.append("ok" if all(not result.problems for result in by_target.values()) else "**red**")
            parts.append(_cells(cells))
        parts.append("")
    return "\n".join(parts)


def _program(row: Row) -> str:
    if row.program != "step":
        return row.program
    layers = row.step_model.layers_on(TARGETS[row.target])
    return "step" if layers == row.step_model.num_layers else f"step ({layers} of {row.step_model.num_layers} layers)"


def _together(values: object) -> str:
    return ", ".join(str(value) for value in values) or "–"  # type: ignore[attr-defined]


def _cell(result: Measured | None) -> str:
    return "" if result is None else f"{result.seconds:.1f}, {_size(result.temp_bytes)}"


def _size(number: int) -> str:
    return f"{number / 2**20:.1f} MiB" if number < 2**30 else f"{number / 2**30:.2f} GiB"


def _cells(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
