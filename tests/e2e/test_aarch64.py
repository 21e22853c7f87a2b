"""Modules for AArch64, compiled here and run by our runtime on an emulated CPU of that kind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from linattn.frontend import CompileOptions, compile_model
from linattn.runtime import Program, Session, TargetError
from linattn.runtime.cpu import machine_architecture

from tests import bytes_and_pairs
from tests.conftest import MODELS, ROOT
from tests.tolerances import MODEL_LOGITS, relative_norm

pytestmark = pytest.mark.slow
AARCH64 = ROOT / "build" / "aarch64"
# Blocks of 8 tokens and single ones. In int4, where activations are rounded to bytes, two CPUs differ by a hundredth as
# soon as one rounding flips (tolerances.INT4_OWN_NOISE): not in so short a prompt.
LENGTHS = {"genai-fp32-cpu": 65, "genai-int4-cpu": 5}
INT4_MODEL = "genai-int4-cpu"
CPU = "cortex-a76"
"""qemu's CPU and the compiler's: an instruction that this one does not have ends the emulated process."""
STEPS = 8
FORM = {"prefill_blocks": (8,), "max_context": 128}

UNITS = {
    "+dotprod": (b"_dotprod_v128", b"bf16_7x48x256_v128"),
    "+dotprod,+i8mm,+bf16": (b"_i8mm_v128", b"_v128_pairs", b"_v128_squares"),
}

# Runs in there: all products of modules, inputs and outputs in files.
MULTIPLY = """
import sys
import numpy as np
from linattn.runtime import Program
for module in sys.argv[2:]:
    program = Program.load(module, threads=1)
    np.savez(module + ".npz", **program.run(dict(np.load(sys.argv[1]))))
    print("{}")
"""

# Runs in there: a prompt, then greedy steps.
RUN = """
import json, sys
import numpy as np
from linattn.runtime import Program, TargetError, cpu
for module, prompt in zip(sys.argv[3:], json.loads(sys.argv[1]), strict=True):
    try:
        program = Program.load(module, threads=2)
    except TargetError as error:
        print(json.dumps({"features": sorted(cpu.machine_features()), "error": str(error)}))
        continue
    session = program.session()
    logits = session.run({"input_ids": np.array([prompt])})["logits"]
    np.save(module + ".npy", logits)
    tokens = []
    for _ in range(int(sys.argv[2])):
        tokens.append(int(logits[0, -1].argmax()))
        logits = session.run({"input_ids": np.array([tokens[-1:]])})["logits"]
    print(json.dumps({"features": sorted(cpu.machine_features()), "tokens": tokens}))
"""


@pytest.fixture(scope="module", autouse=True)
def _emulator(shared_models: Path) -> None:
    missing = [
        what
        for what, there in (
            ("qemu-aarch64 (Debian: qemu-user)", shutil.which("qemu-aarch64")),
            (f"{AARCH64.relative_to(ROOT)} (make aarch64)", (AARCH64 / "site" / "iree").is_dir()),
        )
        if not there
    ]
    if missing and "aarch64" in os.environ.get("LINATTN_REQUIRE", "").split(","):
        pytest.fail(f"LINATTN_REQUIRE names aarch64, but there is no {', no '.join(missing)}")
    if missing:
        pytest.skip(f"no {', no '.join(missing)}")


def prompt(name: str) -> list[int]:
    return [int(token) for token in np.load(MODELS / "transformers_expected.npz")[f"ids_{LENGTHS[name]}"].ravel()]


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("aarch64")
    options = CompileOptions(target_triple="aarch64-linux-gnu", cpu_features=CPU, **FORM)  # type: ignore[arg-type]
    files = {name: folder / f"{name}.vmfb" for name in LENGTHS}
    for name, file in files.items():
        manifest = compile_model(MODELS / name / "model.onnx", options, output=file).manifest
        assert manifest.target.architecture == "aarch64"
        assert {"dotprod", "fullfp16"} <= set(manifest.target.instruction_sets)
    return files


def emulated(cpu: str, folder: Path, prompts: list[list[int]], modules: list[Path]) -> list[dict[str, object]]:
    return in_emulator(cpu, folder, RUN, json.dumps(prompts), str(STEPS), *map(str, modules))


def in_emulator(cpu: str, folder: Path, *arguments: str) -> list[dict[str, object]]:
    """What a program prints there, a line of JSON for each module."""
    (folder / "linattn").mkdir(exist_ok=True)
    if not (folder / "linattn" / "runtime").exists():
        (folder / "linattn" / "runtime").symlink_to(ROOT / "runtime")
        for file in (ROOT / "runtime" / "package").glob("*.py"):
            (folder / "linattn" / file.name).symlink_to(file)
    path = os.pathsep.join([str(folder), str(AARCH64 / "site")])
    python = ["qemu-aarch64", "-cpu", cpu, "-L", str(AARCH64 / "root"), str(AARCH64 / "root/usr/bin/python3"), "-B"]
    environment = {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    command = [*python, "-c", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def greedy(session: Session, logits: np.ndarray) -> list[int]:
    tokens: list[int] = []
    for _ in range(STEPS):
        tokens.append(int(logits[0, -1].argmax()))
        logits = session.run({"input_ids": np.array([tokens[-1:]])})["logits"]
    return tokens


def test_tokens_are_equal(modules: dict[str, Path], tmp_path: Path) -> None:
    """To transformers' and ONNX Runtime's; in int4 to those of the same model here."""
    results = dict(
        zip(modules, emulated(CPU, tmp_path, [prompt(n) for n in modules], [*modules.values()]), strict=True)
    )
    assert {"dotprod", "fullfp16"} <= set(results[INT4_MODEL]["features"])  # type: ignore[call-overload]
    for name, length in LENGTHS.items():
        logits, reference = np.load(f"{modules[name]}.npy"), np.load(MODELS / name / "ort_expected.npz")
        kind = "int4" if name == INT4_MODEL else "f32"
        assert relative_norm(logits, reference[f"logits_{length}"]) < MODEL_LOGITS[kind], name
        if kind == "f32":
            exact = np.load(MODELS / "transformers_expected.npz")
            assert relative_norm(logits, exact[f"logits_{length}"]) < MODEL_LOGITS["f32"], name
            assert results[name]["tokens"] == exact[f"greedy_{length}"].ravel()[:STEPS].tolist(), name
            assert results[name]["tokens"] == reference[f"greedy_{length}"].ravel()[:STEPS].tolist(), name
    options = CompileOptions(cpu_features="generic", **FORM)  # type: ignore[arg-type]
    session = Program.load(compile_model(MODELS / INT4_MODEL / "model.onnx", options).module).session()
    here = greedy(session, session.run({"input_ids": np.array([prompt(INT4_MODEL)])})["logits"])
    assert results[INT4_MODEL]["tokens"] == here


def test_an_older_cpu_is_told(modules: dict[str, Path], tmp_path: Path) -> None:
    """Cortex-A53 has no dot products; the emulated process lives to say so. Here it is another architecture."""
    module = modules["genai-fp32-cpu"]
    (result,) = emulated("cortex-a53", tmp_path, [[1]], [module])
    assert "a CPU without dotprod, fullfp16, lse, rcpc, rdm; compile with" in str(result["error"])
    if machine_architecture() == "x86_64":
        with pytest.raises(TargetError, match="another architecture, got a machine of x86_64, expected aarch64"):
            Program.load(module)


def test_products_by_the_units_that_are_named(tmp_path: Path) -> None:
    """Sums of bytes are exact, so that two instructions for them give the same bits."""
    model = bytes_and_pairs.products()
    feeds = bytes_and_pairs.feeds_of(model)
    np.savez(tmp_path / "in.npz", **feeds)  # type: ignore[arg-type]
    files = {features: tmp_path / f"{i}.vmfb" for i, features in enumerate(UNITS)}
    for features, file in files.items():
        options = CompileOptions(target_triple="aarch64-linux-gnu", cpu_features=features)
        compile_model(model, options, output=file)
        assert all(kernel in file.read_bytes() for kernel in UNITS[features])
    in_emulator("max", tmp_path, MULTIPLY, str(tmp_path / "in.npz"), *map(str, files.values()))
    results = [np.load(f"{file}.npz") for file in files.values()]
    for result in results:
        bytes_and_pairs.check(result, model, feeds)
    for i in range(len(bytes_and_pairs.BYTES)):
        np.testing.assert_array_equal(*(result[f"y{i}"] for result in results), err_msg=f"y{i}")
