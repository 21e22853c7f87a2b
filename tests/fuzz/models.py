"""Damaged models, those of the shared folder and the sample, up to code generation (which `nodes` does)."""

from __future__ import annotations

import functools
import json
import random
import shutil
from pathlib import Path

import onnx
from campaign import COMMAND
from damage import damage_bytes, damage_graph
from linattn.frontend.compile import CompileOptions, compile_model
from linattn.frontend.lower.iree import Compiler

from samples.tiny_hybrid import build

SHARED = Path(__file__).resolve().parents[3] / "shared"


class Lowered(BaseException):
    """Everything before code generation is done."""


def _stop(*_: object, **__: object) -> None:
    raise Lowered


@functools.cache
def prepare() -> list[tuple[bytes, Path | None]]:
    """Bytes of each model, and its folder where there is one."""
    found: list[tuple[bytes, Path | None]] = [(build().SerializeToString(), None)] * 4
    for path in sorted(SHARED.glob("models/**/model.onnx")):
        found.append((path.read_bytes(), path.parent))
    for path in sorted(SHARED.glob("cases/*.onnx")):
        found.append((path.read_bytes(), None))
    return found


def _command(options: CompileOptions) -> list[str]:
    """The command's options for the same; it has no word for no prefill at all."""
    command = ["--cpu-features=generic", f"--batch={options.batch or 'open'}"]
    if options.max_context != "default":
        command.append(f"--max-context={options.max_context or 'open'}")
    blocks = options.prefill_blocks
    return [*command, f"--prefill-blocks={'open' if blocks is None else ','.join(map(str, blocks or (1,)))}"]


def case(rng: random.Random, folder: Path) -> str:
    """Damage one model and compile it."""
    data, beside = rng.choice(prepare())
    if rng.random() < 0.3:
        data = damage_bytes(rng, data)
    else:
        proto = onnx.ModelProto()
        proto.ParseFromString(data)
        damage_graph(rng, proto)
        data = proto.SerializeToString()
    path = folder / "model.onnx"
    path.write_bytes(data)
    weights = folder / "model.onnx.data"
    weights.unlink(missing_ok=True)
    if beside is not None and (beside / weights.name).exists():
        shutil.copyfile(beside / weights.name, weights)  # ONNX takes no file that has another name elsewhere
    options = CompileOptions(
        cpu_features="generic",
        batch=rng.choice([1, 1, None, 3]),
        max_context=rng.choice([16, "default", None]),
        prefill_blocks=rng.choice([(4,), (), None]),
    )
    (folder / COMMAND).write_text(json.dumps(_command(options)))
    Compiler.compile = _stop  # type: ignore[assignment]
    try:
        compile_model(path, options)
    except Lowered:
        return "lowered"
    return "compiled"
