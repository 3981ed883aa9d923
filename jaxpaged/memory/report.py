"""The report as text for a terminal, and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

from jaxpaged.memory.study import Report, Row
from jaxpaged.memory.worked import WorkedExample

NAMES = {
    "max": "contiguous, longest context",
    "pow2": "contiguous, next power of two",
    "oracle": "contiguous, true length",
}
"""What a reader calls the contiguous systems."""

SCHEMA_VERSION = 1


def to_json(report: Report) -> str:
    """Returns the report as JSON; names and meanings as in ``study.Report`` and ``ledger.Figures``, without the plots' histories."""
    content = dataclasses.asdict(report)
    for table in ("comparison", "page_sizes", "sharing"):
        for row in content[table]:
            del row["history"]
    content["workload"]["mean_prompt"] = report.workload.mean_prompt
    content["workload"]["mean_output"] = report.workload.mean_output
    del content["workload"]["prompts"], content["workload"]["outputs"]
    return json.dumps({"schema_version": SCHEMA_VERSION, **content}, indent=2) + "\n"


def to_text(report: Report) -> str:
    """Returns the report as plain text."""
    parts = [_head(report), _comparison(report)]
    if len(report.page_sizes) > 1:
        parts.append(_page_sizes(report.page_sizes))
    if len(report.sharing) > 1 or report.sharing[0].num_sequences > 1:
        parts.append(_sharing(report.sharing))
    if has_hits(report):
        parts.append(prefix_line(report))
    return "\n\n".join(parts) + "\n"


def worked_text(example: WorkedExample) -> str:
    """Returns a worked example as plain text."""
    return (
        f"contiguous: {example.reserved:,} tokens reserved, {example.used:,} used: {percent(example.contiguous_waste)} wasted\n"
        f"paged:      {example.num_pages} pages of {example.page_size} = {example.paged:,} tokens, {example.used:,} used: "
        f"{percent(example.paged_waste)} wasted\n"
    )


def has_hits(report: Report) -> bool:
    """Whether there is something for the prefix cache to find."""
    return report.prefix_caching and report.workload.repeated > 0.01 * report.workload.prompt_tokens


def prefix_line(report: Report) -> str:
    """Says what the prefix cache found, in a sentence."""
    workload, hits = report.workload, report.comparison[0].hit_tokens
    host = f" with {report.swap_space:g} GiB of host memory" if report.swap_space else ""
    return (
        f"prefix cache{host}: {hits:,} of {workload.prompt_tokens:,} prompt tokens found ({percent(hits / workload.prompt_tokens)}); "
        f"{workload.repeated:,} repeat an earlier text ({percent(workload.repeated / workload.prompt_tokens)})"
    )


def percent(share: float | None) -> str:
    """Shows a share; a dash for None."""
    return "-" if share is None else f"{100 * share:.1f} %"


def size(num_bytes: float) -> str:
    """Shows bytes in the largest binary unit that leaves at least 1."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GiB"


def name_of(row: Row) -> str:
    """Returns what a reader calls a row's system."""
    return NAMES.get(row.system, f"paged, {row.page_size} token{'' if row.page_size == 1 else 's'} a page")


def ratio(ours: Row, other: Row) -> float | None:
    """Returns how many times the other's concurrency ours is, where requests waited for memory in both."""
    if ours.figures is None or other.figures is None or not (ours.figures.waiting_steps and other.figures.waiting_steps):
        return None
    return ours.figures.mean_requests / other.figures.mean_requests


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lays out columns, the first to the left and the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _times(factor: float | None) -> str:
    return "-" if factor is None else f"{factor:.2f} x"


def _head(report: Report) -> str:
    shape, workload = report.model, report.workload
    window = f", window {shape.window:,}" if shape.window else ""
    dropped = f"; {workload.dropped} longer than {report.max_model_len:,} left out" if workload.dropped else ""
    return "\n".join(
        (
            f"model     {shape.name}: {shape.num_layers} layers, {shape.num_kv_heads} K/V heads of {shape.head_dim}, "
            f"{report.kv_cache_dtype}{window}: {size(report.token_bytes)} a token",
            f"workload  {workload.name}, seed {report.seed}: {workload.requests} requests, on average {workload.mean_prompt:.1f} tokens in "
            f"and {workload.mean_output:.1f} out{dropped}",
            f"memory    {size(report.memory_bytes)}: {report.num_cells:,} tokens, {report.num_pages:,} pages; at most "
            f"{report.max_num_seqs} sequences, {report.max_model_len:,} tokens each",
        )
    )


def _comparison(report: Report) -> str:
    ours = report.comparison[0]
    header = ("", "used", "waste", "|  tokens", "to come", "never", "external", "|  requests", "peak", "ours is", "steps")
    rows = []
    for row in report.comparison:
        figures = row.figures
        if figures is None:
            rows.append((name_of(row), *["-"] * 9, row.reason))
            continue
        rows.append(
            (
                name_of(row),
                percent(figures.used),
                percent(figures.internal_waste),
                *(percent(share) for share in (figures.tokens, figures.to_come, figures.never, figures.external)),
                f"{figures.mean_requests:.1f}",
                str(figures.peak_requests),
                "" if row is ours else _times(ratio(ours, row)),
                f"{figures.steps:,}",
            )
        )
    kind = {"sample": "samples", "beam": "beams"}[ours.decoding]
    each = f", {ours.num_sequences} {kind} each" if ours.num_sequences > 1 else ""
    return (
        f"of what is allocated (all steps) | of all memory, while requests wait for some | requests at once{each}\n"
        f"{table(header, rows)}\n"
        f"contiguous runs are found by {report.contiguous}; preempted by ours and computed again: {ours.preemptions}"
    )


def _page_sizes(rows: Sequence[Row]) -> str:
    rows = sorted(rows, key=lambda row: row.page_size or 0)
    header = ("page size", "used", "waste", "requests", "peak", "steps", "preempted")
    return table(header, ((str(row.page_size), *_short(row), str(row.preemptions)) for row in rows))


def _sharing(rows: Sequence[Row]) -> str:
    header = ("samples" if rows[0].decoding == "sample" else "beam width", "saved by sharing", "used", "waste", "requests", "peak", "steps")
    return table(
        header, ((str(row.num_sequences), percent(None if row.figures is None else row.figures.saved), *_short(row)) for row in rows)
    )


def _short(row: Row) -> tuple[Any, ...]:
    figures = row.figures
    if figures is None:
        return ("-",) * 5
    return (
        percent(figures.used),
        percent(figures.internal_waste),
        f"{figures.mean_requests:.1f}",
        str(figures.peak_requests),
        f"{figures.steps:,}",
    )
