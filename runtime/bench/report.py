"""`linattn-bench report`: one page of results of several machines, with nothing outside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from linattn.runtime.errors import InputError
from linattn.runtime.outputs import new_file
from linattn.runtime.sizes import size_text

from .charts import Bar, Line, bar_chart, line_chart
from .table import label_of, model_table, notes, op_table, rate_text, time_text

_COLORS = ("#1f5fbf", "#c2410c", "#2a9d8f", "#7b4fb5", "#6b7280", "#b83280", "#3f7f1f", "#a16207")
_STYLE = """
:root { --ink: #1f2937; --dim: #5b6472; --paper: #fff; --line: #e2e5ea; --soft: #f5f6f8; --ours: #1f5fbf;
  --peer: #9aa3b0; --wrong: #c81e1e; --spoiled: #d69a2d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ec; --dim: #a2abb8; --paper: #14171c; --line: #303640;
  --soft: #1d2128; --ours: #6ba1f0; --peer: #78828f; --wrong: #f07171;
  --spoiled: #c58a1f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1440px; padding: 24px 20px 60px; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; } h2 { margin: 40px 0 8px; font-size: 1.25rem; }
h3 { margin: 24px 0 4px; font-size: 1rem; } p { margin: 6px 0; } .dim { color: var(--dim); }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; margin: 10px 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr)); column-gap: 32px; }
table { border-collapse: collapse; width: 100%; font-size: 0.75rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 5px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { background: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
.text td, .text th { text-align: left; white-space: normal; } .text td:first-child { white-space: nowrap; }
tr:last-child td { border-bottom: 0; } tr.peer td { color: var(--dim); } tr.wrong td { color: var(--wrong); }
code, pre { font: 0.85rem/1.4 ui-monospace, "DejaVu Sans Mono", monospace; }
pre { background: var(--soft); border-radius: 6px; padding: 10px 12px; white-space: pre-wrap; overflow-wrap: anywhere; }
.note { border-left: 4px solid var(--spoiled); background: var(--soft); padding: 8px 12px; margin: 10px 0; }
svg { width: 100%; max-width: 700px; height: auto; display: block; margin: 8px 0; }
svg text { fill: var(--ink); font-size: 14px; } svg .label { text-anchor: end; } svg .tick { text-anchor: middle;
  fill: var(--dim); } svg .unit { text-anchor: end; fill: var(--dim); } svg .grid { stroke: var(--line); }
svg .ours { fill: var(--ours); } svg .peer { fill: var(--peer); }
svg .wrong { fill: var(--wrong); } svg .spoiled { fill: var(--spoiled); }
"""

Result = Mapping[str, Any]


def write_page(results: Sequence[Result], files: Sequence[str], path: Path) -> None:
    """Writes the page.

    Args:
        results: As `run_op` or `run_model` return them, read back from their JSON.
        files: Where each came from.
        path: File to write.

    Raises:
        InputError: A result that has no table, such as a profile.
    """
    other = next((str(result["kind"]) for result in results if result["kind"] not in ("op", "model")), None)
    if other is not None:
        raise InputError("no page for such a result", got=other, expected="results of op or model")
    with new_file(path) as partial:
        partial.write_text(page(results, files), encoding="utf-8")


def page(results: Sequence[Result], files: Sequence[str]) -> str:
    """The page as text."""
    models = [result for result in results if result["kind"] == "model"]
    parts = [
        "<h1>linattn benchmarks</h1>",
        f'<p class="dim">{len(results)} result{"s" if len(results) > 1 else ""}, '
        f"measured {_dates(results)}. Rates by the medians.</p>",
    ]
    if models:
        parts += _models(models)
    for result in results:
        if result["kind"] == "op":
            parts += _operator(result)
    parts += _machines(results, files)
    body = "\n".join(parts)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>linattn benchmarks</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _models(results: Sequence[Result]) -> list[str]:
    """A chart for each prompt length and phase, over all machines, then each result's table."""
    parts = ["<h2>Whole models</h2>"]
    every = [(result, row) for result in results for row in result["rows"]]
    lengths = sorted({row["prompt"] for _, row in every})
    parts.append('<div class="charts">')
    for length in lengths:
        some = [(result, row) for result, row in every if row["prompt"] == length]
        parts.append(_chart(f"Prompt of {length} tokens: tokens/s until the first one is known", some, "prefill"))
    longest = [(result, row) for result, row in every if row["prompt"] == max(result["method"]["prefill"])]
    after = " or ".join(str(length) for length in sorted({row["prompt"] for _, row in longest}))
    parts.append(_chart(f"Decode after {after} tokens: tokens/s, one token after another", longest, "decode"))
    parts.append("</div>")
    for result in results:
        names = ", ".join(model["name"] for model in result["models"])
        parts.append(f"<h3>{escape(names)} on {escape(_machine(result))}</h3>")
        parts += [f'<p class="note">{escape(note)}</p>' for note in notes(result)]
        parts.append(_table(*model_table(result), result["rows"]))
    return parts


def _bar(result: Result, row: Mapping[str, Any], phase: str) -> Bar:
    value = row[phase]["tokens_per_s"]
    kind = "ours" if row["kind"] == "linattn" else "peer"
    kind = "wrong" if row["status"] != "ok" else "spoiled" if row["load"]["spoiled"] else kind
    same = [
        other[phase]["tokens_per_s"]
        for other in result["rows"]
        if (other["subject"], other["prompt"]) == (row["reference"], row["prompt"]) and not other["load"]["spoiled"]
    ]
    text = f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    text += {"wrong": " WRONG", "spoiled": " !"}.get(kind, "")
    text += f" ({value / same[0]:.2f}x)" if same and kind == "ours" else ""
    model = next(model["name"] for model in result["models"] if model["sha256"] == row["model_sha256"])
    subject = label_of(row, result["devices"])
    label = subject if subject.startswith(model) else f"{model}:{subject}"
    return Bar(f"{label}, {_where(result, row)}", value, text, kind)


def _operator(result: Result) -> list[str]:
    case = ", ".join(f"{key} {value}" for key, value in result["case"].items() if key not in ("op", "seed"))
    parts = [f"<h2>{escape(str(result['case']['op']))}</h2>", f'<p class="dim">{escape(case)}; {_machine(result)}</p>']
    parts += [f'<p class="note">{escape(note)}</p>' for note in notes(result)]
    for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
        lines: list[Line] = []
        rows = [row for row in result["rows"] if row["dtype"] == dtype and row["status"] == "ok"]
        for index, subject in enumerate(dict.fromkeys(row["subject"] for row in rows)):
            mine = [row for row in rows if row["subject"] == subject]
            points = sorted((row["tokens"], row["call"]["median"]) for row in mine)
            label = label_of(mine[0], result["devices"])
            lines.append(Line(label, points, _COLORS[index % len(_COLORS)], mine[0]["kind"] == "linattn"))
        if lines:
            parts.append(f"<h3>{escape(dtype)}: median time of a call</h3>")
            parts.append(line_chart(lines, "tokens of a call", time_text))
    parts.append(_table(*op_table(result), result["rows"]))
    return parts


def _machines(results: Sequence[Result], files: Sequence[str]) -> list[str]:
    """Where each result came from: machine, devices, versions, method, command."""
    parts = ["<h2>Machines, versions, commands</h2>"]
    for result, file in zip(results, files, strict=True):
        machine = result["machine"]
        load = machine["load_average"]
        memory = f", {size_text(machine['memory_bytes'])}" if machine["memory_bytes"] else ""
        rows = [
            ("machine", f"{machine['cpu']}, {machine['cores']} cores{memory}; {machine['system']}"),
            ("load before", f"{load[0]:.2f}" if load else "not told"),
            *((target, _device(device)) for target, device in result["devices"].items()),
            ("versions", ", ".join(f"{name} {version}" for name, version in result["versions"].items())),
            ("commit", str(result.get("commit") or "not told")),
            (
                "method",
                ", ".join(f"{key} {'default' if value is None else value}" for key, value in result["method"].items()),
            ),
            *((f"absent: {row['name']}", row["reason"]) for row in result["absent"]),
        ]
        cells = "\n".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in rows)
        parts.append(f"<h3>{escape(file)}, {escape(result['started'])}</h3>")
        parts.append(f'<div class="wide text"><table>{cells}</table></div>')
        parts.append(f"<pre>{escape(' '.join(result['command']))}</pre>")
    return parts


def _device(device: Mapping[str, Any]) -> str:
    text = f"{device['name']} ({device['driver']} driver, {device['driver_version']})"
    text += ", in software: no GPU" if device.get("software") else ""
    ceilings = device.get("ceilings")
    if not ceilings:
        return text
    copy, fma = ceilings["copy_bytes_per_s"], ceilings["fma_flop_per_s"]
    return f"{text}; copies {rate_text(copy, 'B/s')}, multiplies {rate_text(fma, 'FLOP/s')} in f32"


def _where(result: Result, row: Mapping[str, Any]) -> str:
    device = result["devices"].get(row["target"])
    return device["name"] if device else result["machine"]["cpu"]


def _machine(result: Result) -> str:
    return f"{result['machine']['cpu']}, {result['machine']['cores']} cores"


def _dates(results: Sequence[Result]) -> str:
    days = sorted({result["started"][:10] for result in results})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _chart(title: str, rows: Sequence[tuple[Result, Mapping[str, Any]]], phase: str) -> str:
    bars = [_bar(result, row, phase) for result, row in rows]
    return f"<section><h3>{escape(title)}</h3>\n{bar_chart(bars, 'tokens/s')}</section>"


def _table(header: Sequence[str], cells: Sequence[Sequence[str]], rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in header)]
    body: list[str] = []
    for row, texts in zip(rows, cells, strict=True):
        kind = "wrong" if row["status"] != "ok" else "" if row["kind"] == "linattn" else "peer"
        body.append(f'<tr class="{kind}">' + "".join(f"<td>{escape(text)}</td>" for text in texts) + "</tr>")
    return f'<div class="wide"><table><tr>{lines[0]}</tr>\n' + "\n".join(body) + "</table></div>"
