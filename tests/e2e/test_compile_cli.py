"""linattn-compile: every bad input ends in one line that says what to do, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from linattn.frontend.cli import main
from linattn.install import install_hint
from linattn.runtime import Program
from onnx import helper, numpy_helper

from samples.tiny_hybrid import build

Edit = Callable[[onnx.ModelProto], None]


def node(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == op_type)


def attribute(op_type: str, name: str, value: object) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        target = node(model, op_type)
        kept = [a for a in target.attribute if a.name != name]
        del target.attribute[:]
        target.attribute.extend([*kept, helper.make_attribute(name, value)])

    return edit


def rename(op_type: str, new: str) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        node(model, op_type).op_type = new

    return edit


def internal_op(model: onnx.ModelProto) -> None:
    node(model, "Softplus").domain = "linattn"
    node(model, "Softplus").op_type = "JoinedMatMul"
    model.opset_import.append(onnx.helper.make_opsetid("linattn", 1))


def huge_initializer(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = 1 << 45


BAD_MODELS: list[tuple[str, Edit, str]] = [
    ("wrong update rule", attribute("LinearAttention", "update_rule", "gated_beta"), r"update_rule.*gated_beta.*gated"),
    ("forbidden beta", attribute("LinearAttention", "update_rule", "gated"), r"beta.*"),
    ("mismatched heads", attribute("LinearAttention", "q_num_heads", 3), r"q_num_heads|heads"),
    ("2^32 heads", attribute("LinearAttention", "kv_num_heads", 1 << 32), r"kv_num_heads|heads"),
    ("unknown op", rename("Softplus", "SoftFoo"), r"SoftFoo.*not supported"),
    ("an op of the compiler's own", internal_op, r"linattn.JoinedMatMul is not supported"),
    ("unknown activation", attribute("CausalConvWithState", "activation", "gelu"), r"activation.*gelu"),
    ("impossible shape", huge_initializer, r"shape"),
]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and the error line."""
    code = main([str(a) for a in arguments])
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("linattn-compile: error: ")]
    assert "Traceback" not in err
    assert len(lines) == (code != 0)
    return code, lines[0].removeprefix("linattn-compile: error: ") if lines else ""


def save(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(("title", "edit", "message"), BAD_MODELS, ids=[title for title, _, _ in BAD_MODELS])
def test_bad_model(title: str, edit: Edit, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build()
    edit(model)
    code, line = run(capsys, save(model, tmp_path), "-o", tmp_path / "out.vmfb")
    assert code == 2, title
    assert re.search(message, line), line
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_node_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build()
    attribute("LinearAttention", "update_rule", "nonsense")(model)
    _, line = run(capsys, save(model, tmp_path), "-o", tmp_path / "out.vmfb")
    assert "layers.0.linear_attention" in line
    assert "nonsense" in line


@pytest.mark.parametrize("keep", [0, 10, 1000, -1])
def test_truncated_file(keep: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(build(), tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    code, line = run(capsys, path, "-o", tmp_path / "out.vmfb")
    assert code == 2
    assert "truncated" in line or "does not fit" in line or "not an ONNX model" in line


def external(folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(build(), path, save_as_external_data=True, location="weights.bin", size_threshold=1024)
    return path


def test_external_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = external(tmp_path)
    weights = tmp_path / "weights.bin"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1000])
    code, line = run(capsys, path, "-o", tmp_path / "out.vmfb")
    assert (code, "too short" in line) == (2, True)
    weights.unlink()
    code, line = run(capsys, path, "-o", tmp_path / "out.vmfb")
    assert code == 2
    assert "weights.bin' is missing" in line
    assert str(tmp_path) in line


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd", "a/../../weights.bin", ""])
def test_external_data_stays_inside(location: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = external(folder)
    (tmp_path / "weights.bin").write_bytes((folder / "weights.bin").read_bytes())
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save(model, path)
    code, line = run(capsys, path, "-o", tmp_path / "out.vmfb")
    assert code == 2
    assert "outside the model's folder" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "tpu"], "--target: unknown target, got 'tpu', expected cpu | cuda | vulkan"),
        (["--target", "cuda", "--gpu-target", "sm_13"], "--gpu-target: unknown GPU"),
        (["--target", "vulkan", "--gpu-target", "voodoo2"], "baseline"),
        (["--gpu-target", "ada"], "use --cpu-features"),
        (["--cpu-features", "+avx2;rm"], "no feature of"),
        (["--batch", "0"], "--batch"),
        (["--max-context", "600"], "longer than the model supports, got 600, expected up to 512"),
        (["--prefill-blocks", "8,x"], "--prefill-blocks"),
        (["--dim", "nope=3"], "--dim nope: the model has no such dim"),
        (["--strategy", "magic"], "unknown strategy"),
        (["--chunk-size", "48"], "chunk size"),
        (["--parameters", "/nowhere/at/all.irpa"], "no such folder"),
    ],
)
def test_bad_option(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = run(capsys, save(build(), tmp_path), *arguments, "-o", tmp_path / "out.vmfb")
    assert code == 2
    assert message in line
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_without_the_compiler_packages(tmp_path: Path) -> None:
    """A device that has the runtime only is told what to install."""
    (tmp_path / "onnx.py").write_text("raise ModuleNotFoundError(name='onnx')")
    command = [sys.executable, "-m", "linattn.frontend.cli", "m.onnx"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        f"linattn-compile: error: the compiler needs the package onnx; {install_hint('compile')}"
    ]


def test_functions_of_the_model_are_inlined(tmp_path: Path) -> None:
    """A function that no pattern of ours lowers is compiled by its body."""
    body = [helper.make_node("Mul", ["x", "x"], ["xx"]), helper.make_node("Add", ["xx", "x"], ["y"])]
    function = helper.make_function("my.own", "Curve", ["x"], ["y"], body, [helper.make_opsetid("", 21)])
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Curve", ["a"], ["b"], domain="my.own")],
        "curves",
        [info("a", onnx.TensorProto.FLOAT, [3])],
        [info("b", onnx.TensorProto.FLOAT, [3])],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("my.own", 1)]
    path = save(helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10), tmp_path)
    assert main([str(path), "-o", str(tmp_path / "out.vmfb"), "--quiet"]) == 0
    a = np.array([1, 2, 3], np.float32)
    np.testing.assert_allclose(Program.load(tmp_path / "out.vmfb").run({"a": a})["b"], a * a + a)


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "no.onnx"), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model compiled by the command line, weights beside it, with report and IR dump."""
    folder = tmp_path_factory.mktemp("cli")
    arguments = [save(build(), folder), "-o", folder / "out.vmfb", "--parameters", folder / "weights.irpa"]
    arguments += ["--report", folder / "report.json", "--dump-ir", folder / "ir", "--max-context", "64"]
    assert main([*map(str, arguments), "--prefill-blocks", "8", "--quiet"]) == 0
    return folder


def test_files(compiled: Path) -> None:
    report = json.loads((compiled / "report.json").read_text())
    assert [row["rule"] for row in report["nodes"]] == ["silu", "gated_delta", "softmax", "silu", "gated_delta"]
    for kind in (" MatMul", " JoinedMatMul"):
        chosen = [line for line in report["others"] if f"{kind}: fused_simd" in line]
        assert [line.rpartition("(")[2] for line in chosen] == ["decode)", "prefill_8)"]
    assert b"mat_mul_fused_simd_f32_8x" in (compiled / "out.vmfb").read_bytes()  # the report says what was compiled
    assert report["states"]["kv_cache"] == {"count": 2, "bytes": 2 * 2 * 64 * 32 * 4, "token_bytes": 0}
    assert report["entry_points"] == ["decode", "prefill_8"]
    assert sorted(p.name for p in (compiled / "ir").iterdir())[0] == "01-import.mlir"
    assert (compiled / "weights.irpa").stat().st_size > (compiled / "out.vmfb").stat().st_size / 2
    assert not list(compiled.glob("*.partial"))


def test_parameters_beside_the_module(compiled: Path) -> None:
    ids = np.arange(12, dtype=np.int64)[None]
    logits = Program.load(compiled / "out.vmfb").session().run({"input_ids": ids})["logits"]
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1


def test_a_model_without_the_operators_is_compiled_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "plain",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 4])],
        [numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(3, 4), "w")],
    )
    path = save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path)
    output = tmp_path / "out.vmfb"
    assert main([str(path), "-o", str(output)]) == 0
    assert "no LinearAttention or CausalConvWithState" in capsys.readouterr().out
    x = np.ones((2, 3), np.float32)
    np.testing.assert_allclose(Program.load(output).run({"x": x})["y"], x @ np.arange(12).reshape(3, 4))
