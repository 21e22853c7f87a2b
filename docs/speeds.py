"""The tables of speeds in README.md and docs/benchmarks.md, from docs/speeds.jsonl; `make bench-readme` measures.

    python docs/speeds.py --measure build/bench    # the benchmark models on what this machine has, then the tables
    python docs/speeds.py                          # the tables only

A row is a machine with one kind of weights. Measuring replaces the rows of this machine and leaves those of others.
What other processes disturbed, what is wrong, a Vulkan driver in software and code that is not committed make no row.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SPEEDS = ROOT / "docs" / "speeds.jsonl"
PAGES = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
PROMPTS, STEPS, TURNS = (64, 512), 64, 3
_BETWEEN = re.compile(r"(?<=<!-- speeds -->\n).*?(?=<!-- /speeds -->)", re.S)
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}

Row = dict[str, Any]


def read() -> list[Row]:
    """The rows that were kept."""
    return [json.loads(line) for line in SPEEDS.read_text().splitlines()]


def rows_of(result: Row) -> tuple[list[Row], list[str]]:
    """What a result of `linattn-bench model --json` is worth.

    Args:
        result: Of models with both prompts.

    Returns:
        Its rows, and why there are no others.
    """
    rows: list[Row] = []
    passed: list[str] = []
    if "-dirty" in (result["commit"] or "-dirty"):
        return [], [f"commit {result['commit']}: the code that was measured is not committed"]
    for weights, target in dict.fromkeys((r["weights"], r["target"]) for r in result["rows"] if r["kind"] == "linattn"):
        same = [row for row in result["rows"] if row["weights"] == weights]
        ours = [row for row in same if row["kind"] == "linattn" and row["target"] == target]
        peers = [row for row in same if row["kind"] != "linattn"]
        device = result["devices"][target]
        why = [f"{row['subject']} is wrong" for row in ours if row["status"] != "ok"]
        loads = [row["load"] for row in (*ours, *peers)]
        why += [f"others took {load['cores_of_others']} cores" for load in loads if load["spoiled"]]
        why += ["too short to tell what others took" for load in loads if load["spoiled"] is None]
        why += [f"{device['name']} is no GPU"] if device.get("software") else []
        if why:
            passed.append(f"{target}, {weights}: {why[0]}")
            continue
        machine = device["name"] if target != "cpu" else f"{result['machine']['cores']} cores of {device['name']}"
        rows.append(
            {
                "machine": machine if target == "cpu" else f"{machine}, {target}",
                "weights": _SHORT.get(weights, weights),
                "linattn": _rates(ours),
                "peer": _rates(peers) if peers else None,
                "commit": result["commit"],
                "date": result["started"][:10],
            }
        )
    return rows, passed


def _rates(rows: Sequence[Row]) -> dict[str, float]:
    """Tokens per second of each prompt, and of decode after the longest."""
    longest = max(rows, key=lambda row: row["prompt"])
    found = {f"prefill_{row['prompt']}": round(row["prefill"]["tokens_per_s"], 1) for row in rows}
    return found | {"decode": round(longest["decode"]["tokens_per_s"], 1)}


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown: a prompt of 512 tokens, then one token after another."""
    lines = ["| machine | weights | linattn | ONNX Runtime, CPU | commit, day |", "|---|---|---|---|---|"]
    for row in rows:
        speeds = " | ".join(_text(row[side]) for side in ("linattn", "peer"))
        lines.append(f"| {row['machine']} | {row['weights']} | {speeds} | `{row['commit']}`, {row['date']} |")
    return "\n".join(lines) + "\n"


def _text(rates: dict[str, float] | None) -> str:
    if rates is None:
        return "none"
    values = (rates["prefill_512"], rates["decode"])
    return " / ".join(f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in values)


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """New rows in the place of old ones of the same machine and weights, or at the end."""
    found = {(row["machine"], row["weights"]): row for row in old}
    return list((found | {(row["machine"], row["weights"]): row for row in new}).values())


def write_tables(rows: Sequence[Row]) -> None:
    """Puts the table into both pages."""
    for page in PAGES:
        text, count = _BETWEEN.subn(lambda _: table(rows), page.read_text())
        if count != 1:
            sys.exit(f"{page}: {count} places between <!-- speeds --> and <!-- /speeds -->, expected 1")
        page.write_text(text)


def measure(folder: Path, gpus: str | None) -> tuple[list[Row], list[str]]:
    """Measures the models that this machine can run; half an hour on two cores.

    Args:
        folder: For the models and the results.
        gpus: What to measure beside the CPU, as linattn-bench takes it; None: what is here, compiled for any such.
    """
    from linattn.runtime.discover import devices

    sys.path.insert(0, str(ROOT))
    from samples.benchmark_model import Shape, write

    found = {row.target for row in devices() if row.uri and row.target != "cpu" and not row.is_software}
    gpus = ",".join(sorted(found)) if gpus is None else gpus
    runs = [("cpu", ("fp32", "int4", "bf16")), *([(gpus, ("fp16",))] if gpus else [])]
    rows: list[Row] = []
    passed: list[str] = []
    for targets, dtypes in runs:
        models = [folder / dtype / "model.onnx" for dtype in dtypes]
        for dtype, model in zip(dtypes, models, strict=True):
            if not model.exists():
                write(Shape(dtype=dtype), model)
        file = folder / f"{targets.replace(':', '-')}.json"
        options = ["--targets", targets, "--prefill", ",".join(map(str, PROMPTS)), "--decode", str(STEPS)]
        options += ["--repeats", str(TURNS), "--json", str(file)]
        subprocess.run([sys.executable, "-m", "linattn", "bench", "model", *map(str, models), *options], check=True)
        more, why = rows_of(json.loads(file.read_text()))
        rows, passed = rows + more, passed + why
    return rows, passed


def main() -> None:
    """Measures if that is asked for, and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", metavar="DIR", type=Path, help="for the models, and what linattn-bench finds")
    parser.add_argument("--gpus", metavar="cuda:sm_90,vulkan:hopper", help="default: those that are here, as they are")
    parser.add_argument("--results", metavar="RESULT.json", nargs="+", type=Path, default=[], help="of another machine")
    options = parser.parse_args()
    new, passed = measure(options.measure, options.gpus) if options.measure else ([], [])
    for file in options.results:
        found, why = rows_of(json.loads(file.read_text()))
        new, passed = new + found, passed + why
    rows = merged(read(), new)
    SPEEDS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_tables(rows)
    print(f"{len(new)} rows measured, {len(rows)} in the tables", *(f"no row: {why}" for why in passed), sep="\n")


if __name__ == "__main__":
    main()
