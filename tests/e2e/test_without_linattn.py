"""Compiled models run without our runtime: by IREE's tool and .npy files, and in C; the tokens are ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import iree.runtime as rt
import numpy as np
import pytest
from linattn.frontend import CompileOptions, compile_model
from linattn.runtime import Program, greedy

from samples.tiny_hybrid import build
from tests.conftest import ROOT

PROMPT = [72, 101, 108, 108, 111, 33, 10, 72]
IREE_SOURCE = os.environ.get("IREE_SOURCE", "")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module of plain functions and the compiler's report, as the sample writes them."""
    folder = tmp_path_factory.mktemp("plain")
    options = CompileOptions(plain_abi=True, max_context=64, prefill_blocks=(8,))
    report = compile_model(build(), options, output=folder / "model.vmfb").report
    (folder / "report.json").write_text(json.dumps(report.to_dict()))
    return folder


def expected(folder: Path) -> str:
    tokens = list(greedy(Program.load(folder / "model.vmfb").session(), PROMPT, 8))
    return " ".join(str(int(np.ravel(token)[0])) for token in tokens)


def environment() -> dict[str, str]:
    """Commands of this virtual environment come first."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_by_iree_run_module(compiled: Path) -> None:
    command = [str(ROOT / "samples/without_linattn.sh"), "unused: compiled", str(compiled), ",".join(map(str, PROMPT))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, expected(compiled)), done.stderr[-2000:]


def test_the_module_is_called_linattn(compiled: Path) -> None:
    assert rt.VmModule.mmap(rt.VmInstance(), str(compiled / "model.vmfb")).name == "linattn"  # C calls linattn.decode


def test_every_result_is_returned(compiled: Path) -> None:
    for function in json.loads((compiled / "report.json").read_text())["abi"].values():
        assert {"memory", "workspace"}.isdisjoint(value["role"] for value in function["arguments"])
        states = [value["type"] for value in function["arguments"] if value["role"] == "state"]
        assert states == [value["type"] for value in function["results"] if value["role"] == "state"]
        assert any(value["role"] == "output" for value in function["results"])


@pytest.mark.skipif(
    not (Path(IREE_SOURCE) / "runtime/src/iree/runtime/api.h").is_file(),
    reason="IREE_SOURCE names no checkout of IREE: its headers are not in the wheels",
)
def test_in_c(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    build_folder = tmp_path_factory.getbasetemp() / "c"
    cmake = shutil.which("cmake") or pytest.skip("cmake is not installed")
    sample = ROOT / "samples/without_linattn_c"
    for command in (
        [cmake, "-S", sample, "-B", build_folder, f"-DIREE_SOURCE={IREE_SOURCE}", "-DCMAKE_BUILD_TYPE=Release"],
        [cmake, "--build", build_folder, "--target", "generate", "--parallel", "2"],
    ):
        subprocess.run(command, check=True, capture_output=True, timeout=3600)
    lines = [
        f"{function} {kind} {value['role']} {value['type']}"
        for function, sides in json.loads((compiled / "report.json").read_text())["abi"].items()
        for kind in sides
        for value in sides[kind]
    ]
    (compiled / "model.abi").write_text("\n".join(lines) + "\n")
    command = [build_folder / "generate", compiled / "model.vmfb", compiled / "model.abi", ",".join(map(str, PROMPT))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, expected(compiled)), done.stderr[-2000:]
