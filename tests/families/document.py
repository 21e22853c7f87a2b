"""The rows of tests/families/table.py as a page for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.families.compare import Family, families

HEAD = """# Model families

Tiny exports (2 to 4 layers, random weights) of the hybrid models that onnxruntime-genai 0.18.0 and mobius-onnx 0.1.0
write, each compiled with the defaults and run in a session: prompts of 1, 5 and 65 tokens and 16 tokens after each,
against ONNX Runtime 1.32 on the same file, or on its f32 sibling where ONNX Runtime's CPU cannot run the file (bf16,
fp16 with MoE, qnn). This page is written by `python -m tests.families.table`.

**right**: the largest relative error of a prompt's or a step's logits is below the limit: f32 1e-4 (and all 48 greedy
tokens equal), f16 1e-2, bf16 1e-1, int4 1.5 times ONNX Runtime's own noise. That noise is how far ONNX Runtime itself
is from the reference when it runs on the machine of the test with f32 weights (norms, scales) moved by up to 1e-7 of
themselves, at most of eight ways: activations rounded to int8 make a percent of it.
"""


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the page: one line an export, one column a target and device, below it what failed."""
    columns = sorted({_column(row) for row in rows})
    lines = [HEAD, "| family | exporter | flavour | " + " | ".join(map(_title, columns)) + " |"]
    lines.append("|---" * (3 + len(columns)) + "|")
    notes: list[str] = []
    for name in families():
        cells = [_cell([row for row in rows if row["folder"] == name], column, notes) for column in columns]
        lines.append(f"| {' | '.join([*Family(name).parts, *cells])} |")
    if notes:
        lines += ["", *(f"{i + 1}. {note}" for i, note in enumerate(notes))]
    path.write_text("\n".join(lines) + "\n")


def _column(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["machine"], row["device"]


def _title(column: tuple[str, str]) -> str:
    machine, device = column
    return f"{machine}, {device}" if device else f"{machine}, compiled only"


def _cell(rows: Sequence[Mapping[str, Any]], column: tuple[str, str], notes: list[str]) -> str:
    row = next((row for row in rows if _column(row) == column), None)
    if row is None:
        return ""
    if "error" in row:
        limit = f", limit {row['limit']:.1e}" if Family(row["folder"]).kind == "int4" else ""
        tokens = f", {row['tokens']} of {row['of']} tokens" if row["tokens"] < row["of"] else ""
        where = f", {row['worst']}" if row["verdict"] == "wrong" else ""
        verdict = row["verdict"] if row["verdict"] == "right" else f"**{row['verdict']}**"
        return f"{verdict} {row['error']:.1e}{limit}{tokens}{where}"
    if row["verdict"] == "compiled":
        return "compiles"
    line = row["line"].replace("|", "\\|")
    if line not in notes:
        notes.append(line)
    return f"**{row['verdict']}** ({notes.index(line) + 1})"
