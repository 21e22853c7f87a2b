"""How the commands end: quietly where nobody reads on, `stopped` after Ctrl-C, one line for what they would destroy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import linattn
import numpy as np
import onnx
import pytest
from linattn.frontend import CompileOptions, compile_model
from linattn.runtime import cli as run_cli
from linattn.runtime.bench import cli as bench_cli
from linattn.runtime.command import run_command
from onnx import helper
from test_integrity import X, model

from samples.tiny_hybrid import build

NAMES = {"run": "linattn.runtime.cli", "compile": "linattn.frontend.cli", "bench": "linattn.runtime.bench.cli"}


BENCH = ["op", "--tokens", "1", "--targets", "cpu", "--peers", "none", "--no-ceilings"]  # a GPU's driver takes seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.onnx with weights.bin, m.vmfb with w.irpa, x.npy, and tiny.vmfb, which generates."""
    folder = tmp_path_factory.mktemp("commands")
    onnx.save(model(0), folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    compile_model(folder / "model.onnx", CompileOptions(parameters=folder / "w.irpa"), output=folder / "m.vmfb")
    compile_model(build(), CompileOptions(prefill_blocks=(), max_context=512), output=folder / "tiny.vmfb")
    np.save(folder / "x.npy", X)
    return folder


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("run", ["m.vmfb", "--input", "x=x.npy"]),
        ("run", ["tiny.vmfb", "--ids", "1,2,3", "--generate", "400"]),
        ("run", ["--list-devices"]),
        ("run", ["--print-completion", "bash"]),
        ("compile", ["model.onnx", "-o", "unread.vmfb"]),
        ("bench", [*BENCH, "--seconds", "0.01", "--rounds", "1"]),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else value,
)
def test_nobody_reads_on(name: str, arguments: list[str], folder: Path) -> None:
    """As before `| head`: the exit code is a shell's for SIGPIPE, and nothing is said."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", NAMES[name], *arguments]
    result = subprocess.run(command, cwd=folder, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert result.returncode == 141, result.stderr
    assert not [word for word in ("Errno", "Traceback", "Broken", "error:", "Exception") if word in result.stderr]


@pytest.mark.parametrize("name", NAMES)
def test_version(name: str) -> None:
    """Of the command itself, and of `python -m linattn`, which is the same."""
    commands = ([sys.executable, "-m", NAMES[name]], [sys.executable, "-m", "linattn", name])
    found = [subprocess.run([*command, "--version"], capture_output=True, text=True).stdout for command in commands]
    assert found[0] == found[1]
    assert found[0].startswith(f"linattn {linattn.__version__} (iree-base-")


def test_python_m_linattn_names_its_commands() -> None:
    done = subprocess.run([sys.executable, "-m", "linattn", "compute"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "usage: python -m linattn {compile,run,bench} ...\n"


def test_another_pipe_that_breaks_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        raise BrokenPipeError(32, "Broken pipe")

    assert run_command("linattn-run", body, []) == 2
    assert capfd.readouterr().err == "linattn-run: error: [Errno 32] Broken pipe\n"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("run", ["tiny.vmfb", "--ids", "1,2,3", "--generate", "500"]),
        ("bench", [*BENCH, "--seconds", "60"]),
    ],
)
def test_ctrl_c(name: str, arguments: list[str], folder: Path) -> None:
    """A terminal sends it to all processes of a command: none of them shows a traceback."""
    command = [sys.executable, "-m", NAMES[name], *arguments]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        (process.stdout.read(2) if name == "run" else process.stderr.readline())
        time.sleep(3 if name == "bench" else 0)
        os.killpg(process.pid, signal.SIGINT)
        rest = process.communicate(timeout=60)[1]
        assert (process.returncode, rest.splitlines()[-1]) == (130, f"linattn-{name}: stopped")
    assert "Traceback" not in rest


def refused(code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    last = capsys.readouterr().err.splitlines()[-1]
    assert (code, message in last) == (2, True), last


def test_outputs_of_run_are_no_inputs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "y.npy").write_bytes((folder / "x.npy").read_bytes())
    arguments = [str(folder / "m.vmfb"), "--input", f"x={folder / 'y.npy'}", "--output-dir", str(folder)]
    refused(run_cli.main(arguments), "('y') would overwrite an input", capsys)
    np.testing.assert_array_equal(np.load(folder / "y.npy"), X)
    refused(run_cli.main([*arguments[:-1], str(folder / "x.npy")]), "x.npy: file exists", capsys)


def test_outputs_of_like_names_get_files_of_their_own(tmp_path: Path) -> None:
    names = ["a/b", "a_b", "a:b"]
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Add", ["x", *(["x"] if i == 0 else [names[i - 1]])], [name]) for i, name in enumerate(names)
    ]
    outputs = [value(name, onnx.TensorProto.FLOAT, [2]) for name in names]
    graph = helper.make_graph(nodes, "alike", [value("x", onnx.TensorProto.FLOAT, [2])], outputs)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    compile_model(proto, output=tmp_path / "m.vmfb")
    x = np.array([1, 2], np.float32)
    np.save(tmp_path / "x.npy", x)
    out = tmp_path / "out"
    assert run_cli.main([str(tmp_path / "m.vmfb"), "--input", f"x={tmp_path / 'x.npy'}", "--output-dir", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["a_b.npy", "a_b_2.npy", "a_b_3.npy"]
    assert sorted(np.load(path)[0] for path in out.iterdir()) == [2, 3, 4]


@pytest.mark.parametrize("option", ["--json", "--plot"])
@pytest.mark.parametrize(
    ("subject", "victim"),
    [("model.onnx", "model.onnx"), ("model.onnx", "weights.bin"), ("m.vmfb", "m.vmfb"), ("m.vmfb", "w.irpa")],
)
def test_outputs_of_bench_are_no_inputs(
    option: str, subject: str, victim: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / victim).read_bytes()
    link = tmp_path / "link.png"
    link.symlink_to(folder / victim)
    code = bench_cli.main(["model", str(folder / subject), option, str(link)])
    refused(code, f"{option} would overwrite an input", capsys)
    assert (folder / victim).read_bytes() == before


def test_a_picture_is_not_one_of_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "result.png"
    result.write_text(json.dumps({"kind": "op", "method": {}, "rows": []}))
    refused(bench_cli.main(["plot", str(result), "-o", str(result)]), "-o would overwrite an input", capsys)
    code = bench_cli.main(["op", "--json", str(tmp_path / "one.png"), "--plot", str(tmp_path / "one.png")])
    refused(code, "--plot would overwrite what --json writes", capsys)
