"""The report as one HTML page: no script, no request to anybody, light and dark."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from jaxpaged.memory.charts import Line, Part, column_chart, legend, line_chart, stacked_bars
from jaxpaged.memory.ledger import Figures
from jaxpaged.memory.report import has_hits, name_of, percent, prefix_line, ratio, size
from jaxpaged.memory.study import Report, Row

_COLORS = {"paged": "ours", "max": "max", "pow2": "pow2", "oracle": "oracle"}
_PARTS = (("holds tokens", "tokens", "tokens"), ("will hold tokens later", "later", "to_come"), ("never will", "never", "never"))

_STYLE = Path(__file__).with_name("page.css")

_TERMS = (
    (
        "Used",
        "Cells that hold a token's keys and values, of the cells that are allocated; summed over all steps. A cell that several sequences "
        "read counts once.",
    ),
    ("Later, never", "Allocated cells without a token that their owner will fill before it ends, and those that it will not."),
    (
        "External waste",
        "Cells that nobody has, in steps in which a request waits for memory: the free runs are too short, or the last pages are kept for "
        "growth.",
    ),
    ("Requests at once", "Mean over the steps in which a request waits for memory; over all steps if none ever does. Peak: the most."),
    (
        "Saved by sharing",
        "Cells saved because sequences share pages, of the cells that they would hold without sharing; summed over all steps.",
    ),
    (
        "Contiguous",
        "Continuous batching with one contiguous run for each sequence, as long as the longest context, as the prompt and the next power "
        "of two above the answer, or exactly as long as needed; nothing is preempted.",
    ),
)


def to_html(report: Report, command: str = "") -> str:
    """Returns the page.

    Args:
        report: What to show.
        command: The command line that made it, for the foot of the page.
    """
    sections = [_division(report), _concurrency(report), _occupancy(report)]
    if len(report.page_sizes) > 1:
        sections.append(_page_sizes(report.page_sizes))
    if len(report.sharing) > 1:
        sections.append(_sharing(report.sharing))
    if has_hits(report):
        sections.append(_section("Prefix cache", prefix_line(report).partition(": ")[2] + ".", ""))
    sections += [_lengths(report), _numbers(report), _terms()]
    style = _STYLE.read_text(encoding="utf-8")
    title = f"KV memory: {report.model.name}, {report.workload.name}"
    foot = f'<p class="note">Made by <code>{html.escape(command)}</code></p>' if command else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{_head(report)}\n{_tiles(report)}\n"
        + "\n".join(sections)
        + f"\n{foot}\n</main>\n</body>\n</html>\n"
    )


def _head(report: Report) -> str:
    shape, workload = report.model, report.workload
    text = (
        f"{shape.name} ({shape.num_layers} layers, {shape.num_kv_heads} K/V heads of {shape.head_dim}, {report.kv_cache_dtype}: "
        f"{size(report.token_bytes)} a token) serves {workload.requests:,} requests of the workload {workload.name}, on average "
        f"{workload.mean_prompt:.0f} tokens in and {workload.mean_output:.0f} out, from {size(report.memory_bytes)} of K/V memory: "
        f"{report.num_cells:,} tokens."
    )
    if workload.dropped:
        text += f" {workload.dropped} more requests, longer than {report.max_model_len:,} tokens, were left out."
    return f'<h1>How much of the KV memory holds tokens</h1>\n<p class="lead">{html.escape(text)}</p>'


def _tiles(report: Report) -> str:
    ours = report.comparison[0]
    figures = _figures(ours)
    tiles = [(percent(figures.used), "of what paging allocates holds tokens")]
    for row in report.comparison[1:]:
        times = ratio(ours, row)
        if times is not None and row.system in ("max", "oracle"):
            than = {"max": "reserving the longest context", "oracle": "knowing every length and reserving just that"}[row.system]
            tiles.append((f"{times:.1f} ×", f"as many requests at once as {than}"))
    shared = max(report.sharing, key=lambda row: _figures(row).saved)
    hits = ours.hit_tokens / report.workload.prompt_tokens
    if shared.num_sequences > 1:
        kind = "samples" if shared.decoding == "sample" else "beams"
        tiles.append((percent(_figures(shared).saved), f"saved by sharing among {shared.num_sequences} {kind}"))
    elif hits > 0.01:
        tiles.append((percent(hits), "of prompt tokens found in the prefix cache"))
    else:
        tiles.append((percent(figures.internal_waste), "of what paging allocates is wasted"))
    items = "\n".join(f"<li><b>{value}</b>{html.escape(meaning)}</li>" for value, meaning in tiles)
    return f'<ul class="tiles">\n{items}\n</ul>'


def _division(report: Report) -> str:
    rows = [row for row in report.comparison if row.figures is not None and row.figures.tokens is not None]
    if not rows:
        return _section(
            "Where the memory goes", "The memory was never full: no request ever waited for it. A smaller --memory shows more.", ""
        )
    parts = [Part(name, color, [getattr(row.figures, field) for row in rows]) for name, color, field in _PARTS]
    parts.append(Part("free, but of no use", "external", [row.figures.external or 0.0 for row in rows if row.figures is not None]))
    chart = stacked_bars([name_of(row) for row in rows], parts, title="Division of the memory while requests wait for some")
    said = "All of the memory while requests wait for some: what holds tokens, what is reserved for tokens to come, and what is lost."
    return _section("Where the memory goes", said, legend([(part.name, part.color) for part in parts]) + chart)


def _concurrency(report: Report) -> str:
    lines, cut = _over_steps(report, 1)
    chart = line_chart(lines, title="Requests at once over the steps", x_label="step", y_label="requests at once", show_y=_count)
    said = f"The same requests in the same memory. More at once means fewer steps until the last one is answered.{cut}"
    return _section("Requests at once", said, legend([(line.name, line.color) for line in lines]) + chart)


def _occupancy(report: Report) -> str:
    lines, cut = _over_steps(report, 2)
    chart = line_chart(
        lines,
        title="Share of the memory that holds tokens",
        x_label="step",
        y_label="share with tokens",
        show_y=lambda y: f"{100 * y:.0f} %",
    )
    said = f"Share of all of the memory, over the steps.{cut}"
    return _section("Memory that holds tokens", said, legend([(line.name, line.color) for line in lines]) + chart)


def _over_steps(report: Report, column: int) -> tuple[list[Line], str]:
    """Returns a line for each system, and what to say of those that go on far beyond the others and are cut."""
    rows = [row for row in report.comparison if row.history]
    ends = sorted(row.history[-1][0] for row in rows)
    limit = 1.4 * ends[-2] if len(ends) > 1 else ends[0]
    lines = [
        Line(name_of(row), _COLORS[row.system], [(point[0], point[column]) for point in row.history if point[0] <= limit]) for row in rows
    ]
    far = [f" {name_of(row).capitalize()} goes on until step {_figures(row).steps:,}." for row in rows if row.history[-1][0] > limit]
    return lines, "".join(far)


def _page_sizes(rows: Sequence[Row]) -> str:
    ordered = sorted(rows, key=lambda row: row.page_size or 0)
    sizes = [float(row.page_size or 0) for row in ordered]
    waste = [Line("internal waste", "never", [(x, _figures(row).internal_waste) for x, row in zip(sizes, ordered, strict=True)])]
    requests = [Line("requests at once", "ours", [(x, _figures(row).mean_requests) for x, row in zip(sizes, ordered, strict=True)])]
    common = {"x_label": "tokens in a page", "x_ticks": sizes, "log_x": True, "dots": True, "height": 230}
    charts = line_chart(waste, title="Waste by page size", y_label="internal waste", show_y=lambda y: f"{100 * y:.1f} %", **common)  # type: ignore[arg-type]
    charts += line_chart(requests, title="Requests at once by page size", y_label="requests at once", show_y=_count, **common)  # type: ignore[arg-type]
    said = "A sequence wastes half of its last page on average: small pages waste less, large ones make a kernel's work simpler."
    return _section("Page size", said, charts)


def _sharing(rows: Sequence[Row]) -> str:
    kind = "samples of each request" if rows[0].decoding == "sample" else "beam width"
    ordered = sorted(rows, key=lambda row: row.num_sequences)
    columns = [("saved by sharing", "ours", [_figures(row).saved for row in ordered])]
    labels = [str(row.num_sequences) for row in ordered]
    chart = column_chart(labels, columns, title="Saved by sharing", x_label=kind, show_y=lambda y: f"{100 * y:.1f} %")
    return _section(
        "Saved by sharing", "Cells saved because sequences of a request share pages, of those that they would hold without.", chart
    )


def _lengths(report: Report) -> str:
    workload = report.workload
    edges = [2**power for power in range(max(*workload.prompts, *workload.outputs).bit_length() + 1)]

    def counts(lengths: Sequence[int]) -> list[float]:
        return [float(sum(low <= length < 2 * low for length in lengths)) for low in edges[:-1]]

    columns = [("prompts", "oracle", counts(workload.prompts)), ("answers", "ours", counts(workload.outputs))]
    labels = ["1" if low == 1 else f"{low:,}-{2 * low - 1:,}" for low in edges[:-1]]
    if len(labels) > 10:
        labels = [f"{low:,}" for low in edges[:-1]]
    chart = column_chart(labels, columns, title="Lengths", x_label="tokens (from this number up to its double)", show_y=_count)
    return _section("The workload", "Requests by length.", legend([(name, color) for name, color, _ in columns]) + chart)


def _numbers(report: Report) -> str:
    header = ("", "used", "internal waste", "external waste", "requests", "peak", "saved", "steps", "preempted")
    unique = list(dict.fromkeys((*report.comparison, *report.page_sizes, *report.sharing)))
    lines = []
    for row in unique:
        figures = row.figures
        name = name_of(row) + (
            f", {row.num_sequences} {'samples' if row.decoding == 'sample' else 'beams'}" if row.num_sequences > 1 else ""
        )
        if figures is None:
            cells = [name, row.reason, *[""] * (len(header) - 2)]
        else:
            cells = [
                name,
                percent(figures.used),
                percent(figures.internal_waste),
                percent(figures.external),
                f"{figures.mean_requests:.1f}",
                _count(figures.peak_requests),
                percent(figures.saved),
                _count(figures.steps),
                _count(row.preemptions) if row.page_size else "",
            ]
        mark = ' class="ours"' if row is unique[0] else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "\n".join(lines)
    content = f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
    return _section("The numbers", "", content)


def _terms() -> str:
    items = "\n".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(meaning)}</dd>" for term, meaning in _TERMS)
    return _section("What is counted", "", f"<dl>\n{items}\n</dl>")


def _section(title: str, said: str, content: str) -> str:
    paragraph = f"<p>{html.escape(said)}</p>\n" if said else ""
    return f"<section>\n<h2>{html.escape(title)}</h2>\n{paragraph}{content}\n</section>"


def _figures(row: Row) -> Figures:
    """Returns the figures of a paged row, which always has some."""
    if row.figures is None:
        raise ValueError(f"{row.system} has no figures: {row.reason}")
    return row.figures


def _count(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"
