"""Plots as inline SVG. Colours are classes (``c-NAME``), so that the page's style sheet decides them, in the light and in the dark."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Sequence

_WIDTH = 880
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 16, 14, 46


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a plot: its name, its colour's class, and its points."""

    name: str
    color: str
    points: Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Part:
    """One kind of segment of stacked bars: its name, its colour's class, and a share in [0, 1] for each bar."""

    name: str
    color: str
    shares: Sequence[float]


def nice_ticks(most: float, count: int = 5) -> list[float]:
    """Returns round numbers from 0 to at least ``most``, about ``count`` of them."""
    if most <= 0:
        return [0.0, 1.0]
    raw = most / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9)) * power
    return [step * i for i in range(math.ceil(most / step - 1e-9) + 1)]


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Returns a legend of (name, colour) as HTML."""
    items = "".join(f'<li><span class="swatch b-{color}"></span>{html.escape(name)}</li>' for name, color in entries)
    return f'<ul class="legend">{items}</ul>'


def stacked_bars(labels: Sequence[str], parts: Sequence[Part], *, title: str) -> str:
    """Returns one horizontal bar of full width for each label, cut into parts."""
    left, bar, gap = 250, 34, 18
    inner = _WIDTH - left - _RIGHT
    body = []
    for row, label in enumerate(labels):
        y = _TOP + row * (bar + gap)
        body.append(_text(left - 14, y + bar / 2 + 5, label, anchor="end", kind="label" if row else "label strong"))
        x = float(left)
        for part in parts:
            width = inner * part.shares[row]
            shown = f"{100 * part.shares[row]:.1f} %"
            body.append(
                f'<rect class="f-{part.color}" x="{x:.1f}" y="{y}" width="{max(0.0, width - 1):.1f}" height="{bar}" rx="2">'
                f"<title>{html.escape(f'{label}: {part.name} {shown}')}</title></rect>"
            )
            if width > 52:
                body.append(_text(x + width / 2, y + bar / 2 + 5, shown, anchor="middle", kind=f"inside i-{part.color}"))
            x += width
    height = _TOP + len(labels) * (bar + gap) + 18
    for tick in (0, 0.25, 0.5, 0.75, 1):
        anchor = {0: "start", 1: "end"}.get(int(tick) if tick in (0, 1) else 2, "middle")
        body.append(_text(left + inner * tick, height - 6, f"{100 * tick:.0f} %", anchor=anchor, kind="tick"))
    return _svg(height, body, title)


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    show_y: Callable[[float], str],
    x_ticks: Sequence[float] | None = None,
    log_x: bool = False,
    dots: bool = False,
    height: int = 300,
) -> str:
    """Returns a plot of lines from y = 0 on.

    Args:
        lines: At least one, each of at least one point.
        title: For screen readers.
        x_label: What x is.
        y_label: What y is.
        show_y: Makes the text of a value of y.
        x_ticks: Where x gets a number; default: round ones from 0.
        log_x: Whether x is drawn by its logarithm.
        dots: Whether points are marked.
        height: In pixels at full width.
    """
    xs = [x for line in lines for x, _ in line.points]
    y_ticks = nice_ticks(max(y for line in lines for _, y in line.points))
    x_ticks = nice_ticks(max(xs), 8)[:-1] if x_ticks is None else x_ticks
    low, high = (math.log(min(xs)), math.log(max(xs))) if log_x else (0.0, max(xs))
    inner_w, inner_h = _WIDTH - _LEFT - _RIGHT, height - _TOP - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        along = ((math.log(x) if log_x else x) - low) / ((high - low) or 1.0)
        return _LEFT + inner_w * along, _TOP + inner_h * (1 - y / y_ticks[-1])

    body = []
    for tick in y_ticks:
        y = at(xs[0], tick)[1]
        body.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(_text(_LEFT - 8, y + 4, show_y(tick), anchor="end", kind="tick"))
    for tick in x_ticks:
        body.append(_text(at(tick, 0)[0], height - _BOTTOM + 18, f"{tick:,.0f}", anchor="middle", kind="tick"))
    for line in reversed(lines):
        places = [at(x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        body.append(f'<polyline class="line s-{line.color}" points="{path}"><title>{html.escape(line.name)}</title></polyline>')
        for (x, y), (value_x, value_y) in zip(places, line.points, strict=True) if dots else ():
            shown = html.escape(f"{line.name}, {value_x:,.0f}: {show_y(value_y)}")
            body.append(f'<circle class="f-{line.color}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{shown}</title></circle>')
    body.append(_text(_LEFT + inner_w / 2, height - 6, x_label, anchor="middle", kind="axis"))
    upwards = f"translate(14 {_TOP + inner_h / 2:.1f}) rotate(-90)"
    body.append(f'<text class="axis" text-anchor="middle" transform="{upwards}">{html.escape(y_label)}</text>')
    return _svg(height, body, title)


def column_chart(
    labels: Sequence[str], columns: Sequence[tuple[str, str, Sequence[float]]], *, title: str, x_label: str, show_y: Callable[[float], str]
) -> str:
    """Returns groups of columns.

    Args:
        labels: One for each group.
        columns: Name, colour and one value for each group.
        title: For screen readers.
        x_label: What the groups are.
        show_y: Makes the text of a value.
    """
    height = 260
    ticks = nice_ticks(max(value for _, _, values in columns for value in values))
    inner_w, inner_h = _WIDTH - _LEFT - _RIGHT, height - _TOP - _BOTTOM
    group = inner_w / len(labels)
    thick = min(56.0, group * 0.8 / len(columns))
    body = []
    for tick in ticks:
        y = _TOP + inner_h * (1 - tick / ticks[-1])
        body.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(_text(_LEFT - 8, y + 4, show_y(tick), anchor="end", kind="tick"))
    for place, label in enumerate(labels):
        middle = _LEFT + group * (place + 0.5)
        body.append(_text(middle, height - _BOTTOM + 18, label, anchor="middle", kind="tick"))
        for number, (name, color, values) in enumerate(columns):
            tall = inner_h * values[place] / ticks[-1]
            x = middle + thick * (number - len(columns) / 2)
            top = _TOP + inner_h - tall
            shown = show_y(values[place])
            body.append(
                f'<rect class="f-{color}" x="{x + 1:.1f}" y="{top:.1f}" width="{thick - 2:.1f}" height="{tall:.1f}" rx="2">'
                f"<title>{html.escape(f'{name}, {label}: {shown}')}</title></rect>"
            )
            if thick > 40:
                body.append(_text(x + thick / 2, top - 5, shown, anchor="middle", kind="label"))
    body.append(_text(_LEFT + inner_w / 2, height - 6, x_label, anchor="middle", kind="axis"))
    return _svg(height, body, title)


def _text(x: float, y: float, text: str, *, anchor: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(height: float, body: Sequence[str], title: str) -> str:
    content = "\n".join(body)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{html.escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">\n{content}\n</svg>'
    )
