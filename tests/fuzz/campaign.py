"""Runs a fuzzer in child processes for a while and keeps what it finds: the case's number and its input.

A case is good if it ends within a minute in a result or in one line of linattn's own errors. A signal, a hang, another
exception or an error of several lines is a finding. Models are compiled in the fuzzer's own process, which is faster;
where that dies, the command decides, as a user has it: it must say so in one line. Each case follows from kind, seed
and number alone (and the models there are in ../shared):
`python tests/fuzz/campaign.py KIND --seed S --first N --count 1` runs it again.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import itertools
import json
import random
import resource
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CASE_SECONDS = 60
LEAST_CASES = 10
"""However little time there is: with seed 0 these reach what each fuzzer is for."""

MEMORY = 8 << 30
"""Address space of a child: what would take the machine's memory ends in an error, or is a finding."""
COMMAND = "command.json"
"""In a case's folder: options of `linattn-compile` that compile its model as the fuzzer does."""

COMPILER_DIED = "compiler died"
"""Outcome of a case in which the compiler ended the process, and of which the command says so in one line."""


@dataclass
class Outcome:
    """What a campaign saw.

    Attributes:
        cases: How many cases ended.
        words: First word of each outcome -> count.
        findings: A line a finding.
    """

    cases: int = 0
    words: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


def run(kind: str, seconds: float, seed: int, folder: Path) -> Outcome:
    """Fuzz one kind for some seconds; findings are kept in `folder`."""
    outcome, first, end = Outcome(), 0, time.monotonic() + seconds
    while time.monotonic() < end:
        work = folder / f"{kind}-work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        left = end - time.monotonic()
        command = [sys.executable, __file__, kind, f"--seed={seed}", f"--first={first}", f"--seconds={left}"]
        errors = work / "stderr"
        with errors.open("wb") as file:
            child = subprocess.run(
                [*command, f"--folder={work}"], stdout=subprocess.PIPE, stderr=file, check=False, timeout=left + 600
            )
        last: int | None = None
        for line in child.stdout.decode(errors="replace").splitlines():
            if not line.startswith("{"):
                continue  # what a library printed
            row = json.loads(line)
            last = row["case"]
            if "outcome" in row:
                outcome.cases += 1
                outcome.words[row["outcome"].split(":")[0]] += 1
        if child.returncode == 0:
            break
        first = (last if last is not None else first) + 1
        verdict = _command_fails(work) if child.returncode < 0 else None
        if verdict == "":
            outcome.words[COMPILER_DIED] += 1
            continue
        kept = folder / f"{kind}-{seed}-{last}"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(work, kept)
        text = verdict or " ".join(errors.read_text(errors="replace").split()[-40:])
        outcome.findings.append(
            f"{kind} seed {seed} case {last}: exit code {child.returncode}, kept in {kept}: ...{text}"
        )
    return outcome


def _command_fails(work: Path) -> str | None:
    """What is wrong with how `linattn-compile` ends where a case killed its process; None where it has no command."""
    if not (work / COMMAND).exists():
        return None
    command = [sys.executable, "-P", "-m", "linattn.frontend.cli", str(work / "model.onnx"), "--quiet"]
    command += [f"-o{work / 'out.vmfb'}", *json.loads((work / COMMAND).read_text())]
    try:
        ended = subprocess.run(command, capture_output=True, check=False, timeout=2 * CASE_SECONDS, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return f"linattn-compile took more than {2 * CASE_SECONDS} s"
    said = ended.stderr.decode(errors="replace")
    is_good = ended.returncode == 2 and said.count("\n") == 1 and "bug in linattn" not in said
    return "" if is_good or (ended.returncode, said) == (0, "") else f"linattn-compile: {ended.returncode}, {said}"


def child(kind: str, seed: int, first: int, count: int | None, seconds: float, folder: Path) -> int:
    """Run cases one after the other until the time is up; the exit code tells of the first finding."""
    from linattn.runtime.errors import LinattnError

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    fuzzer = importlib.import_module(kind)
    fuzzer.prepare()
    end = time.monotonic() + seconds
    for number in itertools.count(first) if count is None else range(first, first + count):
        if time.monotonic() > end and number >= LEAST_CASES:
            break
        print(json.dumps({"case": number}), flush=True)
        faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
        try:
            text = fuzzer.case(random.Random(f"{kind}-{seed}-{number}"), folder)
        except LinattnError as error:
            text = f"{type(error).__name__}: {error}"
            if "\n" in str(error) or not str(error).isprintable() or "bug in linattn" in str(error):
                traceback.print_exc()
                return 3
        except BaseException:
            traceback.print_exc()
            return 3
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps({"case": number, "outcome": text}), flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["models", "nodes", "manifests", "flips", "sessions"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "fuzz")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    faulthandler.enable()
    return child(options.kind, options.seed, options.first, options.count, options.seconds, options.folder)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit" / "runtime")]
    sys.exit(main())
