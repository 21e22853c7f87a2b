"""The tables of speeds in README.md and docs/benchmarks.md, from docs/speeds.jsonl; `make bench-readme` measures.

    python docs/speeds.py --measure build/bench    # the benchmark models on what this machine has, then the tables
    python docs/speeds.py --results cuda.json cpu.json --machine H100 --commit abc1234    # measured elsewhere
    python docs/speeds.py                          # the tables only

A row is a machine with one kind of weights. Measuring replaces the rows of this machine and leaves those of others; a
line of a machine that is gone is deleted from speeds.jsonl by hand. `--machine` names the machine as its rows do: the
rows of `--machine H100` are `H100, CUDA` and `16 cores of H100`. `--commit` says what a tree without git was made of.

No row is made of what other processes disturbed, of what is wrong, of a Vulkan driver in software, of code that is not
committed, of weights that a module hides (measure the .onnx) and without a prompt of 512 tokens.
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
SHOWN = 512
"""The prompt of the tables, and after which they show the steps."""
_BETWEEN = re.compile(r"(?<=<!-- speeds -->\n).*?(?=<!-- /speeds -->)", re.S)
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_TARGETS = {"cuda": "CUDA", "vulkan": "Vulkan"}

Row = dict[str, Any]


def read() -> list[Row]:
    """The rows that were kept."""
    return [json.loads(line) for line in SPEEDS.read_text().splitlines()]


def rows_of(result: Row, name: str | None = None, commit: str | None = None) -> tuple[list[Row], list[str]]:
    """What a result of `linattn-bench model --json` is worth.

    Args:
        result: Of models.
        name: What the machine is called; None: what its devices call themselves.
        commit: What was measured, where the result does not say so.

    Returns:
        Its rows, and why there are no others.
    """
    rows: list[Row] = []
    passed: list[str] = []
    commit = result["commit"] or commit or "unknown"
    if "-dirty" in commit or commit == "unknown":
        hint = "" if "-dirty" in commit else "; --commit names that of a tree without git"
        return [], [f"commit {commit}: the code that was measured is not committed{hint}"]
    for weights, target in dict.fromkeys((r["weights"], r["target"]) for r in result["rows"] if r["kind"] == "linattn"):
        same = [row for row in result["rows"] if row["weights"] == weights]
        ours = [row for row in same if row["kind"] == "linattn" and row["target"] == target]
        peers = [row for row in same if row["kind"] == "onnxruntime"]
        device = result["devices"][target]
        why = [] if weights else ["a module does not say of what kind its weights are: measure the .onnx"]
        why += [] if any(row["prompt"] == SHOWN for row in ours) else [f"no prompt of {SHOWN} tokens"]
        why += [f"{row['subject']} is wrong" for row in ours if row["status"] != "ok"]
        loads = [row["load"] for row in (*ours, *peers)]
        why += [f"others took {load['cores_of_others']} cores" for load in loads if load["spoiled"]]
        # Subjects take turns: where one's own are too short, those between them tell.
        told = any(row["load"]["spoiled"] is False for row in result["rows"])
        why += ["too short to tell what others took" for load in loads if load["spoiled"] is None and not told]
        why += [f"{device['name']} is no GPU"] if device.get("software") else []
        if why:
            passed.append(f"{target}, {weights}: {why[0]}")
            continue
        called = name or re.sub(r" \(NVIDIA [\d.]+\)$", "", device["name"])  # Vulkan's has the driver in it
        cores = f"{result['machine']['cores']} cores of {called}"
        rows.append(
            {
                "machine": f"{called}, {_TARGETS[target]}" if target in _TARGETS else cores,
                "weights": _SHORT.get(weights, weights),
                "linattn": _rates(ours),
                "peer": _rates(peers) if peers else None,
                "commit": commit,
                "date": result["started"][:10],
            }
        )
    return rows, passed


def _rates(rows: Sequence[Row]) -> dict[str, float]:
    """Tokens per second of each prompt, and of the steps after the one that is shown."""
    found = {f"prefill_{row['prompt']}": round(row["prefill"]["tokens_per_s"], 1) for row in rows}
    (shown,) = (row for row in rows if row["prompt"] == SHOWN)
    return found | {"decode": round(shown["decode"]["tokens_per_s"], 1)}


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
    values = (rates[f"prefill_{SHOWN}"], rates["decode"])
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


def measure(folder: Path, gpus: str | None, name: str | None) -> tuple[list[Row], list[str]]:
    """Measures the models that this machine can run; half an hour on two cores.

    Args:
        folder: For the models and the results.
        gpus: What to measure beside the CPU, as linattn-bench takes it; None: what is here, compiled for any such.
        name: What the machine is called; None: what its devices call themselves, the CPU with its kind.
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
        command = [sys.executable, "-m", "linattn", "bench", "model", *map(str, models), *options]
        if subprocess.run(command, check=False).returncode not in (0, 1):  # 1: a row is wrong, the others are not
            sys.exit(f"{' '.join(command)}: failed")
        result = json.loads(file.read_text())
        called = name or (cpu_name(result["machine"]["cpu"]) if targets == "cpu" else None)
        more, why = rows_of(result, called)
        rows, passed = rows + more, passed + why
    return rows, passed


def cpu_name(name: str) -> str:
    """This machine's CPU by its own name and LLVM's, since there are several kinds of `AMD EPYC`."""
    from linattn.frontend.targets import TargetOptions, resolve_target

    return f"{name} ({resolve_target('cpu', TargetOptions()).description.rpartition('(')[2].rstrip(')')})"


def main() -> None:
    """Measures if that is asked for, and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", metavar="DIR", type=Path, help="for the models, and what linattn-bench finds")
    parser.add_argument("--gpus", metavar="cuda:sm_90,vulkan:hopper", help="default: those that are here, as they are")
    parser.add_argument("--results", metavar="RESULT.json", nargs="+", type=Path, default=[], help="of another machine")
    parser.add_argument("--machine", metavar="NAME", help="what it is called in the tables")
    parser.add_argument("--commit", metavar="SHA", help="of results that do not say what was measured")
    options = parser.parse_args()
    new, passed = measure(options.measure, options.gpus, options.machine) if options.measure else ([], [])
    for file in options.results:
        found, why = rows_of(json.loads(file.read_text()), options.machine, options.commit)
        new, passed = new + found, passed + [f"{file}: {one}" for one in why]
    rows = merged(read(), new)
    SPEEDS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_tables(rows)
    print(f"{len(new)} rows measured, {len(rows)} in the tables", *(f"no row: {why}" for why in passed), sep="\n")


if __name__ == "__main__":
    main()
