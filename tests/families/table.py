"""Makes docs/families.md: every tiny export of a model family on every target, compiled with the defaults and run.

python -m tests.families.table --targets cpu,vulkan --only-compile cuda,vulkan:hopper
python -m tests.families.table --targets cpu,cuda,vulkan --output results/families   # on a machine with a GPU
python -m tests.families.table --merge results/families.jsonl                        # its rows into the table here

A GPU to compile for goes after its target: `cuda:sm_90`. Each compile and each run is a process of its own with a limit
of time; whatever happens to it is a row of the table. Rows are kept as JSON lines beside the table, and a new one
replaces that of the same export, target and device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from linattn.runtime.discover import look_for

from tests.conftest import ROOT
from tests.families.compare import Family, families
from tests.families.document import write_table

Row = dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (None: it was out of time), the last lines of both streams, its seconds."""

    code: int | None
    said: str
    complained: str
    seconds: float


def call(command: Sequence[str], limit: float) -> Ended:
    """Runs a command in a process group of its own, which ends with the limit of time."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=errors, start_new_session=True)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(ProcessLookupError):  # the compiler's own process, if it is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return Ended(code, _last(out), _last(errors), round(time.perf_counter() - start, 1))


def _last(stream: Any) -> str:
    stream.seek(0)
    return ([line.strip() for line in stream.read().splitlines() if line.strip()] or [""])[-1]


def make_row(name: str, machine: str, run: bool, limit: float) -> Row:
    """Compiles an export for one machine and, if asked to, runs it."""
    target, _, gpu = machine.partition(":")
    row: Row = {"folder": name, "machine": machine, "device": look_for(target)[0].name if run else ""}
    with tempfile.TemporaryDirectory() as folder:
        module = f"{folder}/model.vmfb"
        chosen = ["--gpu-target", gpu] if gpu else []
        compiler = [sys.executable, "-m", "linattn.frontend.cli", "--quiet", "--target", target, *chosen]
        compiled = call([*compiler, "-o", module, str(Family(name).model)], limit)
        row["compile_s"] = compiled.seconds
        if compiled.code != 0:
            return row | _failure(compiled, "refused", "linattn-compile: error: ")
        if not run:
            return row | {"verdict": "compiled"}
        ended = call([sys.executable, "-m", "tests.families.one", name, module], limit)
        row["run_s"] = ended.seconds
        return row | (json.loads(ended.said) if ended.code == 0 else _failure(ended, "not run", "run: error: "))


def _failure(ended: Ended, verdict: str, prefix: str) -> Row:
    if ended.code is None:
        return {"verdict": "too slow", "line": f"more than {ended.seconds:.0f} s"}
    verdict = verdict if ended.code == 2 else "died"  # 2: an error of ours, in one line
    return {"verdict": verdict, "line": ended.complained.removeprefix(prefix) or f"exit code {ended.code}"}


def read_rows(path: Path) -> list[Row]:
    """Rows written before."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def merged(rows: Sequence[Row]) -> list[Row]:
    """One row for each export, target and device (none: compiled only), the last."""
    found = {(row["folder"], row["machine"], row["device"]): row for row in rows}
    return [found[key] for key in sorted(found)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="", metavar="T,T:GPU,...", help="compile for these and run")
    parser.add_argument("--only-compile", default="", metavar="T,T:GPU,...", help="compile for these")
    parser.add_argument("--folders", default="*", metavar="GLOB,...", help="which exports (default: all)")
    parser.add_argument("--limit", type=float, default=300, metavar="S", help="seconds of a compile or a run")
    parser.add_argument(
        "--merge", nargs="*", default=[], type=Path, metavar="FILE.jsonl", help="rows of other machines"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "families", help="files without .jsonl, .md")
    arguments = parser.parse_args()
    lines = arguments.output.with_suffix(".jsonl")
    rows = merged([row for path in (lines, *arguments.merge) for row in read_rows(path)])
    machines = [
        (one, run)
        for run in (True, False)
        for one in (arguments.targets if run else arguments.only_compile).split(",")
        if one
    ]
    chosen = [name for name in families() if any(fnmatch(name, glob) for glob in arguments.folders.split(","))]
    lines.parent.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        for machine, run in machines:
            row = make_row(name, machine, run, arguments.limit)
            print(f"{name} {machine}: {row['verdict']} {row.get('line', row.get('error', ''))}", flush=True)
            rows = merged([*rows, row])
            lines.write_text("".join(json.dumps(one) + "\n" for one in rows))
    lines.write_text("".join(json.dumps(one) + "\n" for one in rows))
    write_table(arguments.output.with_suffix(".md"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
