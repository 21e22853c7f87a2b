"""llama.cpp beside us: what llama-bench is asked, what its answer becomes, and what is said where it cannot run."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from linattn.runtime.bench.cli import main
from linattn.runtime.bench.llama_runner import LlamaCpp
from linattn.runtime.bench.table import to_text
from linattn.runtime.errors import LinattnError

# Prompts take 2 ms a token, 3 and 4 in the later runs; steps 7 ms.
FAKE = f"""#!{sys.executable}
import json, pathlib, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(pathlib.Path(__file__).with_name("asked.jsonl"), "a") as file:
    file.write(json.dumps(given) + chr(10))
prompt, steps, times = (int(given[key]) for key in ("-p", "-n", "-r"))
samples = [(prompt * (2 + i) + steps * 7) * 1_000_000 for i in range(times)]
is_it = {{"build_commit": "abc123", "backends": "Vulkan", "model_type": "qwen35 ?B Q4_0"}}
print(json.dumps([is_it | {{"samples_ns": samples}}]))
"""
BROKEN = f"#!{sys.executable}\nimport sys\nprint('loading', file=sys.stderr)\nsys.exit('error: no such architecture')\n"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a llama-bench on the PATH; returns its folder."""

    def put(text: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        program = folder / "llama-bench"
        program.write_text(text)
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return folder

    return put


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


def asked_of(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "asked.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("target", "where"), [("cpu", {"-ngl": "0", "-dev": "none"}), ("vulkan", {"-ngl": "99"})], ids=["cpu", "gpu"]
)
def test_a_turn(target: str, where: dict[str, str], install: Callable[[str], Path], gguf: Path) -> None:
    """A prompt, the median of three, and steps at that depth; on the CPU nothing of it runs on a GPU."""
    folder = install(FAKE)
    runner = LlamaCpp(str(gguf), target, threads=2)
    found = runner.repeat([7] * 512, 64)
    assert (found["prefill_s"], found["steps_s"]) == (512 * 0.003, [0.007])
    assert found["tokens"] == found["overheads_s"] == found["generated_s"] == []
    assert runner.describe()["strategy"] == "abc123, Q4_0"
    always = {"-m": str(gguf), "-t": "2", "-o": "json", **where}
    runs = [("1", "0", "0", "1"), ("512", "0", "0", "3"), ("0", "64", "512", "1")]
    assert asked_of(folder) == [always | dict(zip(("-p", "-n", "-d", "-r"), run, strict=True)) for run in runs]


def test_work_of_its_own_is_not_that_of_others(install: Callable[[str], Path], gguf: Path) -> None:
    """A child that ends in the turn worked for it."""
    install(FAKE.replace("samples =", "import time\nwhile time.process_time() < 0.15: pass\nsamples ="))
    runner = LlamaCpp(str(gguf), "cpu")
    runner.repeat([7], 1)
    assert runner._watches[1]._own >= 0.25  # CPU seconds of two runs, 0.15 or more each


@pytest.mark.parametrize(
    ("text", "target", "made", "words"),
    [
        (None, "cpu", True, ("no llama-bench", "PATH")),
        (FAKE, "cpu", False, ("no such file", "model.gguf", "benchmark_gguf.py")),
        (FAKE, "cuda", True, ("built without it", "Vulkan", "CUDA")),
        (BROKEN, "cpu", True, ("llama-bench failed", "status 1", "it said: error: no such architecture")),
        (FAKE.replace("samples_ns", "samples"), "cpu", True, ("llama-bench failed", "status 0")),
    ],
    ids=["not installed", "no file", "no such backend", "fails", "another version"],
)
def test_errors(
    text: str | None,
    target: str,
    made: bool,
    words: tuple[str, ...],
    install: Callable[[str], Path],
    gguf: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    if text is not None:
        install(text)
    if not made:
        gguf.unlink()
    with pytest.raises(LinattnError) as error:
        LlamaCpp(str(gguf), target)
    said = str(error.value)
    assert "\n" not in said
    assert all(word in said for word in words), said


def test_beside_a_model(tiny_model: Path, tmp_path: Path, install: Callable[[str], Path]) -> None:
    """It takes turns with the others, has times and no errors, and is nobody's reference."""
    folder = install(FAKE)
    model, file = tmp_path / "tiny.onnx", tmp_path / "m.json"
    shutil.copy(tiny_model, model)
    model.with_suffix(".gguf").write_bytes(b"GGUF")
    options = ["--prefill", "5", "--decode", "3", "--repeats", "2", "--no-ceilings", "--quiet", "--threads", "1"]
    peers = ["--peers", "onnxruntime,llama.cpp"]
    assert main(["model", str(model), *options, *peers, "--json", str(file)]) == 0
    result: dict[str, Any] = json.loads(file.read_text())
    rows = {row["kind"]: row for row in result["rows"]}
    assert list(rows) == ["linattn", "onnxruntime", "llama.cpp"]
    row = rows["llama.cpp"]
    assert (row["subject"], row["target"], row["strategy"]) == ("cpu:llama.cpp", "cpu", "abc123, Q4_0")
    assert row["prefill"]["tokens_per_s"] == pytest.approx(1 / 0.003)
    assert (row["decode"]["tokens_per_s"], row["decode"]["step"]["n"]) == (pytest.approx(1 / 0.007), 2)
    assert (row["status"], row["error"], row["greedy"], row["reference"]) == ("ok", None, None, None)
    assert (row["weights"], rows["linattn"]["reference"]) == ("float32", "onnxruntime")
    assert result["order"] == ["cpu:default", "onnxruntime", "cpu:llama.cpp"] * 2
    assert len(asked_of(folder)) == 5
    assert "cpu:llama.cpp" in to_text(result)
