"""Charts as inline SVG, for the report: bars from zero, points where a log axis is needed, lines over sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDE = 30
"""Ratio of the largest value to the smallest above which points on a log axis stand in for bars."""
_WIDTH, _LEFT, _RIGHT, _ROW, _TOP = 560, 8, 130, 46, 6
"""Narrow, with names above the bars: what a telephone shows is to be read as well."""


@dataclass(frozen=True)
class Bar:
    """A value with its name.

    Attributes:
        label: What it is of.
        value: Above zero.
        text: What is written beside it.
        kind: `ours`, `peer`, `spoiled` by other processes, or `wrong`.
    """

    label: str
    value: float
    text: str
    kind: str


@dataclass(frozen=True)
class Line:
    """Values over sizes.

    Attributes:
        label: What they are of.
        points: Size and value, both above zero.
        color: Of CSS.
        ours: Whether they are linattn's.
    """

    label: str
    points: Sequence[tuple[float, float]]
    color: str
    ours: bool


def bar_chart(bars: Sequence[Bar], unit: str) -> str:
    """Horizontal bars from zero; where one is `WIDE` times as long as another, points on a log axis."""
    least, most = min(bar.value for bar in bars), max(bar.value for bar in bars)
    is_log = most > WIDE * least
    low = 10 ** math.floor(math.log10(least)) if is_log else 0.0
    high = 10 ** math.ceil(math.log10(most * 1.01)) if is_log else most
    span = _WIDTH - _LEFT - _RIGHT

    def place(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if is_log else value / high
        return _LEFT + span * share

    bottom = _TOP + _ROW * len(bars)
    marks = _decades(low, high) if is_log else _steps(high)
    parts = [f'<line class="grid" x1="{place(m):.1f}" x2="{place(m):.1f}" y1="{_TOP}" y2="{bottom}"/>' for m in marks]
    for index, bar in enumerate(bars):
        y = _TOP + _ROW * index
        parts.append(f'<text x="{_LEFT}" y="{y + 16}">{escape(_cut(bar.label))}</text>')
        if is_log:
            parts.append(f'<circle class="{bar.kind}" cx="{place(bar.value):.1f}" cy="{y + 31}" r="7"/>')
        else:
            width = place(bar.value) - _LEFT
            parts.append(f'<rect class="{bar.kind}" x="{_LEFT}" y="{y + 22}" width="{width:.1f}" height="18" rx="2"/>')
        parts.append(f'<text x="{place(bar.value) + 12:.1f}" y="{y + 36}">{escape(bar.text)}</text>')
    first = ' style="text-anchor: start"'  # in the middle of its mark it would be cut off at the edge
    parts += [
        f'<text class="tick"{"" if index else first} x="{place(m):.1f}" y="{bottom + 18}">{_short(m)}</text>'
        for index, m in enumerate(marks)
    ]
    scale = "log axis" if is_log else "from zero"
    parts.append(f'<text class="unit" x="{_WIDTH}" y="{bottom + 38}">{escape(unit)}, {scale}</text>')
    return _svg(parts, bottom + 46, f"{unit} of {', '.join(bar.label for bar in bars)}")


def line_chart(lines: Sequence[Line], x_text: str, y_text: Callable[[float], str]) -> str:
    """Lines on two log axes, and their names below."""
    xs = sorted({x for line in lines for x, _ in line.points})
    ys = [y for line in lines for _, y in line.points]
    left, right, top, height = 70, _WIDTH - 10, 16, 300
    low, high = 10 ** math.floor(math.log10(min(ys))), 10 ** math.ceil(math.log10(max(ys) * 1.01))
    wide = math.log(xs[-1] / xs[0]) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + 20 + (right - left - 40) * math.log(x / xs[0]) / wide
        return across, top + (height - top) * (1 - math.log(y / low) / math.log(high / low))

    parts: list[str] = []
    for mark in _decades(low, high):
        y = at(xs[0], mark)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="label" x="{left - 8}" y="{y + 4:.1f}">{escape(y_text(mark))}</text>')
    parts += [f'<text class="tick" x="{at(x, high)[0]:.1f}" y="{height + 18}">{_short(x)}</text>' for x in xs]
    parts.append(f'<text class="unit" x="{right}" y="{height + 38}">{escape(x_text)}, log axes</text>')
    for index, line in enumerate(lines):
        places = [at(x, y) for x, y in line.points]
        dash = "" if line.ours else ' stroke-dasharray="6 4"'
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{line.color}" stroke-width="2.2"{dash}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{line.color}"/>' for x, y in places]
        y = height + 60 + 20 * index
        parts.append(f'<line x1="{left}" x2="{left + 30}" y1="{y - 4}" y2="{y - 4}" stroke="{line.color}"{dash}/>')
        parts.append(f'<text x="{left + 40}" y="{y}">{escape(line.label)}</text>')
    return _svg(parts, height + 60 + 20 * len(lines), ", ".join(line.label for line in lines))


def _svg(parts: Sequence[str], height: float, title: str) -> str:
    body = "\n".join(parts)
    box = f'viewBox="0 0 {_WIDTH} {height:.0f}"'
    return f'<svg {box} role="img" xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title>\n{body}\n</svg>'


def _decades(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(round(math.log10(low)), round(math.log10(high)) + 1)]


def _steps(high: float) -> list[float]:
    """Round numbers from zero up to the largest value, about five."""
    raw = high / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    return [step * index for index in range(int(high / step) + 1)]


def _short(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e4 else f"{value:g}"


def _cut(text: str, width: int = 72) -> str:
    return text if len(text) <= width else "..." + text[3 - width :]
