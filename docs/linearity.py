"""Draws linearity.svg, LinearAttention's time a thousand tokens over the length of the prompt, from linearity.jsonl.

    python docs/linearity.py

A line of linearity.jsonl is what one implementation takes: `points` are [tokens, microseconds of all its kernels].
docs/benchmarks.md says how they are measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def draw(rows: list[Row]) -> str:
    """The picture as SVG; its colours follow the reader's scheme."""
    lines = [
        Line(row["name"], [(tokens / 1024, 1000 * time / tokens) for tokens, time in row["points"]], color, row["ours"])
        for row, color in zip(rows, COLORS, strict=True)
    ]
    chart = line_chart(lines, "length of the prompt in 1,024 tokens, time of 1,000", lambda us: f"{us:.0f} us")
    head, _, rest = chart.partition("<title>")
    return f"{head}{_STYLE}<title>{rest}\n"


if __name__ == "__main__":
    (DOCS / "linearity.svg").write_text(draw(read()))
