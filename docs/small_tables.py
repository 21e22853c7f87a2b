"""The measured tables of docs/state.md and docs/explanation/sampling.md: `make bench-readme` makes them.

    python docs/small_tables.py build/bench    # ten seconds of an idle machine, and some more to compile

Each stands between marks in its page, below a line that says when, of what commit and on what machine it was made. None
is made of code that is not committed, nor while other processes take the processor: it is tried a few times.
"""

from __future__ import annotations

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
SIZES = 32_000, 248_320
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


def put(page: Path, name: str, text: str) -> None:
    """Puts a text between a page's marks of a name."""
    between = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.S)
    changed, count = between.subn(lambda _: text, page.read_text())
    if count != 1:
        sys.exit(f"{page}: {count} places between <!-- {name} --> and <!-- /{name} -->, expected 1")
    page.write_text(changed)


def main() -> None:
    """Measures both and writes them."""
    sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
    from linattn.runtime.bench import machine
    from linattn.runtime.bench.load import Watch
    from linattn.runtime.bench.state_bench import measure_states
    from speeds import cpu_name

    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/bench")
    commit = machine.commit()
    if commit is None or "-dirty" in commit:
        sys.exit(f"commit {commit}: the code that was measured is not committed")
    about = machine.describe_machine()
    where = f"{about['cores']} cores of {cpu_name(about['cpu'])}"
    made = f"Made on {datetime.now(UTC):%Y-%m-%d} at `{commit}` on {where}:\n\n"
    module = sample(folder)
    for page, name, measure, table in (
        (STATES, "states", lambda: measure_states(module, None, 200, 50, 16), states_table),
        (DRAWS, "draws", measure_draws, draws_table),
    ):
        for _ in range(TURNS):
            watch = Watch()
            with watch.watching():
                found = measure()
            if not watch.summary()["spoiled"]:
                put(page, name, made + table(found))
                break
        else:
            print(f"no table of {name}: others took {watch.summary()['cores_of_others']} cores, {TURNS} times")


if __name__ == "__main__":
    main()
