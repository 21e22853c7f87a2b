"""Draws linearity.svg, LinearAttention's time a thousand tokens over the length of the prompt, from linearity.jsonl.

    python docs/linearity.py

A line of linearity.jsonl is what one implementation takes: `points` are [tokens, microseconds of all its kernels].
docs/benchmarks.md says how they are measured. Under the picture stands the straight line through them, what a call
takes whatever its length and what 1,024 tokens take, with the largest distance of a point from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from linattn.runtime.bench.charts import Line, line_chart

DOCS = Path(__file__).resolve().parent
COLORS = "#1f7a70", "#c2571a", "#5b6770"
_STYLE = """<style>text{font:14px sans-serif;fill:#1d2b30}.label{text-anchor:end}.tick{text-anchor:middle}
.unit{text-anchor:end}.grid{stroke:#cfd8dc}svg{background:#fff}
@media (prefers-color-scheme:dark){text{fill:#e3ecee}.grid{stroke:#455a64}svg{background:none}}</style>"""

Row = dict[str, Any]


def read() -> list[Row]:
    """What was measured."""
    return [json.loads(line) for line in (DOCS / "linearity.jsonl").read_text().splitlines()]


def spread(row: Row) -> float:
    """By how much the slowest token takes longer than the fastest, of the lengths that were measured."""
    rates = [time / tokens for tokens, time in row["points"]]
    return max(rates) / min(rates) - 1


def fit(row: Row) -> tuple[float, float, float]:
    """The straight line with the least squares of relative distances.

    Returns:
        Microseconds of a call, of 1,024 tokens more, and the largest distance from a point as a part of that.
    """
    tokens, times = np.array(row["points"], float).T
    terms = np.stack([1 / times, tokens / 1024 / times], axis=1)
    call, each = np.linalg.lstsq(terms, np.ones(len(times)), rcond=None)[0]
    return float(call), float(each), float(abs(terms @ (call, each) - 1).max())


def label(row: Row) -> str:
    """Its name and its straight line."""
    call, each, apart = fit(row)
    return f"{row['name']}: {round(call, 1) + 0.0} + {each:.1f} us a 1,024, ± {100 * apart:.1f} %"


def draw(rows: list[Row]) -> str:
    """The picture as SVG; its colours follow the reader's scheme."""
    lines = [
        Line(label(row), [(tokens / 1024, 1000 * time / tokens) for tokens, time in row["points"]], color, row["ours"])
        for row, color in zip(rows, COLORS, strict=True)
    ]
    chart = line_chart(lines, "length of the prompt in 1,024 tokens, time of 1,000", lambda us: f"{us:.0f} us")
    head, _, rest = chart.partition("<title>")
    return f"{head}{_STYLE}<title>{rest}\n"


if __name__ == "__main__":
    (DOCS / "linearity.svg").write_text(draw(read()))
