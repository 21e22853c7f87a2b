"""Measured tables of docs/: states, draws, operators on this machine's CPU; `make bench-readme` makes them.

    python docs/small_tables.py                     # a minute of an idle machine, and some more to compile
    python docs/small_tables.py states operators    # these only

Each stands between marks in its page, below a line that says when, of what commit and on what machine it was made. None
is made of code that is not committed, nor while other processes take the processor: it is tried a few times.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linattn.dialect_patterns.node import TensorSpec

ROOT = Path(__file__).resolve().parent.parent
STATES, DRAWS = ROOT / "docs" / "state.md", ROOT / "docs" / "explanation" / "sampling.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
BUILD = ROOT / "build" / "bench"
SIZES = 32_000, 248_320
OPERATORS = (
    ("LinearAttention, 16 heads", "--heads 16 --tokens 1,16,64,1024"),
    ("LinearAttention, 32 heads", "--heads 32 --tokens 1"),
    ("LinearAttention, 16 heads, f16 with a state of f32", "--heads 16 --tokens 1024 --dtype f16 --state-dtype f32"),
    ("LinearAttention of `ai.onnx` 27, 16 heads", "--heads 16 --tokens 512 --peers onnxruntime-std"),
    ("CausalConvWithState, 6144 channels of 4 taps", "--op causal_conv --tokens 1,512"),
)
"""What `linattn-bench op` is asked for, and how the table calls it."""
CALLS = 30
TURNS = 4
"""Until nothing else took the processor."""


def sample(folder: Path) -> Path:
    """The sample model's module for this machine's CPU, made in a folder."""
    from linattn.frontend import CompileOptions, compile_model

    model, module = folder / "tiny" / "model.onnx", folder / "tiny" / "model.vmfb"
    subprocess.run([sys.executable, str(ROOT / "samples" / "tiny_hybrid.py"), str(model)], check=True)
    compile_model(model, CompileOptions(max_context=512), output=module)
    return module


def states_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| | wall | CPU time | bytes |", "|---|---|---|---|"]
    for row in rows:
        if "cpu_ratio" in row:
            cells = "", f"{row['cpu_ratio']:.2f} times", f"{row['bytes_ratio']:.2f} times"
        elif "per_s" in row:
            cells = f"{row['per_s']:,.0f}/s", f"{row['cpu_us']:.0f} us", ""
        else:
            nbytes = "" if row["bytes"] is None else f"{row['bytes']:,}"
            cells = f"{row['median_us']:,.0f} us", f"{row['cpu_us']:,.0f} us", nbytes
        lines.append(f"| {row['what']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def measure_draws() -> dict[str, list[tuple[float, float]]]:
    """Microseconds of a token drawn from random logits by the module and by the host, for each of the sizes."""
    import numpy as np
    from iree.runtime import asdevicearray
    from linattn.dialect_patterns.node import TensorSpec
    from linattn.runtime import Sampling
    from linattn.runtime.generation.sampling import Sampler, draw_settings

    ways = {
        "temperature": Sampling(1.0, seed=1),
        "top-k 20, top-p 0.95": Sampling(0.7, top_k=20, top_p=0.95, seed=1),
        "top-p 0.9 alone, thousands of tokens in it": Sampling(1.0, top_p=0.9, seed=1),
    }
    found: dict[str, list[tuple[float, float]]] = {"largest": [], **{name: [] for name in ways}}
    for size in SIZES:
        logits = (np.random.default_rng(0).standard_normal(size) * 3).astype(np.float32)
        row = TensorSpec((1, 1, size), "f32")
        call, device = _compiled("NextToken", [row])
        there = asdevicearray(device, logits[None, None])
        found["largest"].append((_time(call, there), _time(logits.argmax)))
        draw, device = _compiled("DrawToken", [row, TensorSpec((1, 8), "f32")])
        there = asdevicearray(device, logits[None, None])
        for name, way in ways.items():
            settings = asdevicearray(device, draw_settings(way, 0.5, size)[None])
            found[name].append((_time(draw, there, settings), _time(Sampler(way).choose, logits)))
    return found


def draws_table(found: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """The times as Markdown."""
    head = " | ".join(f"{size:,}: module / host, us" for size in SIZES)
    lines = [f"| | {head} |", "|---|" + "---|" * len(SIZES)]
    for name, pairs in found.items():
        lines.append(f"| {name} | {' | '.join(f'{module:,.0f} / {host:,.0f}' for module, host in pairs)} |")
    return "\n".join(lines) + "\n"


def _compiled(op_type: str, inputs: Sequence[TensorSpec]) -> tuple[Callable[..., object], Any]:
    """An operator by itself on this machine's CPU, as the tests compile it, and the device that runs it."""
    sys.path.insert(0, str(ROOT / "tests"))
    import iree.runtime as rt
    from harness import FLAGS, compile_module, device_config, lowered
    from iree.compiler.api import Session

    session = Session()
    session.set_flags(*FLAGS["cpu"], "--iree-input-type=none")
    module = lowered("linattn", op_type, 1, inputs, {}, 1, "cpu", context=session.context)
    context = rt.SystemContext(config=device_config("cpu"))
    context.add_vm_module(rt.VmModule.copy_buffer(context.instance, compile_module(module, session, "cpu")))
    return context.modules.module.main, context.config.device


def _time(call: Callable[..., object], *inputs: object) -> float:
    call(*inputs)
    times: list[float] = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call(*inputs)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def measure_operators() -> list[tuple[str, float, float]] | str:
    """Case, median seconds of a call of ours and of ONNX Runtime's; or why there is no table."""
    found: list[tuple[str, float, float]] = []
    for name, options in OPERATORS:
        command = [sys.executable, "-m", "linattn", "bench", "op", *options.split(), "--targets", "cpu"]
        command += ["--rounds", "3", "--seconds", "0.3", "--no-ceilings", "--quiet", "--json", "-"]
        for _ in range(TURNS):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                return done.stderr.strip()
            rows = json.loads(done.stdout)["rows"]
            spoiled = [row["load"]["cores_of_others"] for row in rows if row["load"]["spoiled"]]
            if not spoiled:
                break
        else:
            return f"others took {max(spoiled)} cores, {TURNS} times"
        for tokens in dict.fromkeys(row["tokens"] for row in rows):
            ours, peer = (
                next(row["call"]["median"] for row in rows if row["tokens"] == tokens and row["kind"] == kind)
                for kind in ("linattn", "onnxruntime")
            )
            found.append((f"{name}, T={tokens}", ours, peer))
    return found


def operators_table(rows: Sequence[tuple[str, float, float]]) -> str:
    """The rows as Markdown."""
    from linattn.runtime.bench.table import time_text

    lines = ["| case | linattn | ONNX Runtime | |", "|---|---|---|---|"]
    lines += [f"| {name} | {time_text(ours)} | {time_text(peer)} | {peer / ours:.2f}x |" for name, ours, peer in rows]
    return "\n".join(lines) + "\n"


def put(page: Path, name: str, text: str) -> None:
    """Puts a text between a page's marks of a name."""
    between = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.S)
    changed, count = between.subn(lambda _: text, page.read_text())
    if count != 1:
        sys.exit(f"{page}: {count} places between <!-- {name} --> and <!-- /{name} -->, expected 1")
    page.write_text(changed)


def undisturbed(measure: Callable[[], Any]) -> Any:
    """What is measured while nothing else takes the processor; a text that says why not."""
    from linattn.runtime.bench.load import Watch

    why = ""
    for _ in range(TURNS):
        watch = Watch()
        with watch.watching():
            found = measure()
        if not watch.summary()["spoiled"]:
            return found
        why = f"others took {watch.summary()['cores_of_others']} cores, {TURNS} times"
    return why


def main() -> None:
    """Measures what is asked for, or all, and writes it."""
    sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
    from linattn.runtime.bench import machine
    from linattn.runtime.bench.state_bench import measure_states
    from speeds import cpu_name

    commit = machine.commit()
    if commit is None or "-dirty" in commit:
        sys.exit(f"commit {commit}: the code that was measured is not committed")
    about = machine.describe_machine()
    where = f"{about['cores']} cores of {cpu_name(about['cpu'])}"
    made = f"Made on {datetime.now(UTC):%Y-%m-%d} at `{commit}` on {where}:\n\n"
    asked = sys.argv[1:] or ["states", "draws", "operators"]
    if "states" in asked:
        module = sample(BUILD)
        write(STATES, "states", undisturbed(lambda: measure_states(module, None, 200, 50, 16)), made, states_table)
    if "draws" in asked:
        write(DRAWS, "draws", undisturbed(measure_draws), made, draws_table)
    if "operators" in asked:  # linattn-bench looks for others by itself
        write(BENCHMARKS, "operators", measure_operators(), made, operators_table)


def write(page: Path, name: str, found: Any, made: str, table: Callable[[Any], str]) -> None:
    """Puts what was measured into a page, or says why there is nothing."""
    if isinstance(found, str):
        print(f"no table of {name}: {found}")
    else:
        put(page, name, made + table(found))


if __name__ == "__main__":
    main()
