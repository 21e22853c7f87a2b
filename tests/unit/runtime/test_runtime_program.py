from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import iree.runtime as rt
import linattn
import numpy as np
import pytest
from iree.compiler.tools import compile_str
from linattn.runtime import InputError, Program, StateError, TargetError
from linattn.runtime.integrity import seal_file, sealed
from linattn.runtime.manifest import EntryPoint, InputSpec, Manifest, OutputSpec, Parameters, StateSpec
from linattn.runtime.manifest_target import Target
from linattn.runtime.module import Module
from linattn.runtime.opening import open_device
from needed import need_device
from test_runtime_session import some_ids
from tiny_hybrid import ANY_CPU, FLAGS, Hybrid, open_form, reference

Load = Callable[..., Program]


def split_run(program: Program, ids: np.ndarray, splits: tuple[int, ...]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    states: dict[str, np.ndarray] = {}
    logits, start = [], 0
    for size in splits:
        results = program.run({"input_ids": ids[:, start : start + size], **states})
        states = {spec.name: results[spec.output] for spec in program.states}
        logits.append(results["logits"])
        start += size
    return np.concatenate(logits, 1), states


@pytest.mark.parametrize("batch", [1, 2])
def test_stateless_with_capacity(load: Load, batch: int) -> None:
    ids = some_ids(batch, 13)
    logits, states = split_run(load(batch=batch), ids, (8, 3, 1, 1))
    want, want_states = reference(ids)
    np.testing.assert_allclose(logits, want, rtol=1e-6)
    for name, array in states.items():
        assert array.shape == want_states[name].shape
        np.testing.assert_allclose(array, want_states[name], rtol=1e-6)


def test_stateless_open() -> None:
    ids = some_ids(2, 13)
    logits, states = split_run(Program.load(open_form(Hybrid()).compile()), ids, (6, 1, 6))
    want, want_states = reference(ids)
    np.testing.assert_allclose(logits, want, rtol=1e-6)
    for name, array in states.items():
        np.testing.assert_allclose(array, want_states[name], rtol=1e-6)


@pytest.mark.parametrize("form", [Hybrid(), open_form(Hybrid())])
def test_never_changes_what_it_is_given(form: Hybrid) -> None:
    """Table 2 #16: same answer twice from the same arrays, which stay as they are (read-only ones too)."""
    program = Program.load(form.compile())
    before = program.run({"input_ids": some_ids(1, 1)})
    inputs = {"input_ids": some_ids(1, 1, 1), **{s.name: before[s.output] for s in program.states}}
    inputs["attention_mask"] = np.ones((1, 2), np.int64)
    copies = {name: array.copy() for name, array in inputs.items()}
    for array in inputs.values():
        array.setflags(write=False)
    one, two = program.run(inputs), program.run(inputs)
    for name, array in inputs.items():
        np.testing.assert_array_equal(array, copies[name])
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
    one["logits"][:] = 0  # results belong to the caller
    assert two["logits"].any()


def test_outputs_and_description(cpu: Program) -> None:
    results = cpu.run({"input_ids": some_ids(1, 3)})
    assert list(results) == ["logits", "present.0.rec", "present.0.conv", "present.1.kv"]
    assert [spec.name for spec in cpu.inputs] == ["input_ids", "attention_mask", "position_ids"]
    assert [spec.name for spec in cpu.outputs] == ["logits"]
    assert [spec.kind for spec in cpu.states] == ["recurrent", "conv", "kv_cache"]
    assert cpu.manifest.model_name == "tiny-hybrid"


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        (
            {"input_ids": [[1, 2]]},
            InputError,
            "no entry point takes this many tokens, got 2, expected token counts 1, 3, 8",
        ),
        (
            {"input_ids": [[1]], "past.1.kv": np.zeros((1, 2, 24, 4), np.float32)},
            StateError,
            "context full, got 24 + 1",
        ),
        ({"input_ids": [[1]], "past.1.kv": np.zeros((1, 3, 2, 4), np.float32)}, InputError, "past.1.kv: wrong shape"),
        ({"input_ids": [[1]], "past.0.rec": np.zeros((2, 4), np.float32)}, InputError, "past.0.rec: wrong shape"),
        ({"input_ids": [[1]], "past.0.rec": np.zeros((1, 4))}, InputError, "past.0.rec: wrong dtype, got float64"),
        ({"input_ids": [[1]], "present.0.rec": 0}, InputError, "no such input, got present.0.rec"),
        (
            {"input_ids": [[1]], "attention_mask": [[1, 1]]},
            InputError,
            "expected [batch_size=1, total_sequence_length=1]",
        ),
        ({}, InputError, "input_ids: missing input"),
        ([[1]], InputError, "inputs are given by name, got list, expected {'input_ids': ...}"),
        (
            {"input_ids": [[1, 2, 3]], "attention_mask": [[0, 1, 1]]},
            InputError,
            "attention_mask: padding would enter the state, got zeros, expected ones",
        ),
    ],
)
def test_wrong_arguments(cpu: Program, inputs: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        cpu.run(inputs)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pasts_must_agree() -> None:
    program = Program.load(open_form(Hybrid()).compile())
    past = np.zeros((1, 2, 5, 4), np.float32)
    program.run({"input_ids": [[1]], "past.1.kv": past, "attention_mask": np.ones((1, 6), np.int64)})
    with pytest.raises(InputError, match="total_sequence_length=6"):
        program.run({"input_ids": [[1]], "past.1.kv": past, "attention_mask": np.ones((1, 5), np.int64)})


def test_from_file(tmp_path: Path) -> None:
    data, ids = Hybrid().compile(), some_ids(1, 8)
    path = tmp_path / "tiny.vmfb"
    path.write_bytes(data)
    for source in (path, str(path), data, bytearray(data)):
        got = Program.load(source).run({"input_ids": ids})["logits"]  # type: ignore[arg-type]
        np.testing.assert_array_equal(got, Program.load(data).run({"input_ids": ids})["logits"])


@pytest.mark.parametrize("size", [0, 3, 200, 6000, -300])
def test_damaged_file(tmp_path: Path, size: int) -> None:
    path = tmp_path / "bad.vmfb"
    path.write_bytes(Hybrid().compile()[:size] if size else b"")
    for source in (path, path.read_bytes()):
        with pytest.raises(TargetError) as caught:
            Program.load(source)
        assert "\n" not in str(caught.value)


def test_not_ours(tmp_path: Path) -> None:
    hybrid = Hybrid(blocks=(1,))
    with pytest.raises(TargetError, match="an IREE module without a linattn manifest"):
        Program.load(hybrid.compile(""))
    with pytest.raises(TargetError, match="no such file"):
        Program.load(tmp_path / "missing.vmfb")
    with pytest.raises(TargetError, match="not a bundle"):
        Program.load(tmp_path)
    extra = replace(hybrid.manifest(), entry_points=(EntryPoint("prefill_64", "prefill", 64),)).to_json()
    with pytest.raises(TargetError, match=r"missing entry point, got prefill_64, expected .*decode"):
        Program.load(hybrid.compile(extra))
    with pytest.raises(TargetError, match="the manifest is not JSON"):
        Program.load(hybrid.compile("{"))


def test_manifest_that_lies() -> None:
    """A manifest that does not fit its own code ends in one line, not in a crash or in silence."""
    hybrid = Hybrid()
    manifest = hybrid.manifest()
    lies = [
        replace(manifest, inputs=manifest.inputs[:2]),
        replace(manifest, states=manifest.states[1:]),
        replace(manifest, states=(replace(manifest.states[0], shape=("batch_size", 5)), *manifest.states[1:])),
        replace(manifest, outputs=(replace(manifest.outputs[0], dtype="float16"),)),
        replace(manifest, entry_points=(EntryPoint("prefill_3", "prefill", 8),)),
        replace(manifest, max_context=48),
    ]
    for lie in lies:
        module = Module(hybrid.compile())
        module.link(open_device("local-sync"), None)
        session = Program(module, Manifest.from_json(lie.to_json())).session()
        with pytest.raises((TargetError, InputError)) as caught:
            session.run({"input_ids": some_ids(1, 8)})
        assert "\n" not in str(caught.value)
        assert session.position == 0


@pytest.mark.vulkan
def test_wrong_device() -> None:
    need_device("vulkan")
    with pytest.raises(TargetError, match="compiled for cpu, got device vulkan") as caught:
        Program.load(Hybrid().compile(), "vulkan")
    assert "\n" not in str(caught.value)


@pytest.mark.vulkan
def test_wrong_device_on_vulkan() -> None:
    need_device("vulkan")
    data = Hybrid("vulkan").compile()
    with pytest.raises(TargetError, match="compiled for vulkan, got device local-task, expected vulkan"):
        Program.load(data, "cpu")
    lanes = replace(Hybrid("vulkan", blocks=(1,)).manifest(), target=Target("vulkan", "vulkan", "x", 1024)).to_json()
    with pytest.raises(TargetError, match=r"compiled for x, more than .*subgroups of .* threads where 1024 are needed"):
        Program.load(Hybrid("vulkan", blocks=(1,)).compile(lanes))
    lie = replace(Hybrid("vulkan", blocks=(1,)).manifest(), target=ANY_CPU).to_json()
    with pytest.raises(TargetError, match="does not load on local-task") as caught:
        Program.load(Hybrid("vulkan", blocks=(1,)).compile(lie))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def weights_module(tmp_path: Path) -> Path:
    """y = x * w with w in tiny.irpa; all dims fixed, one entry point, no states."""
    manifest = Manifest(
        model_name="scaled",
        model_sha256="",
        target=ANY_CPU,
        batch=None,
        max_context=None,
        context_limit=None,
        inputs=(InputSpec("x", "float32", (2, 3)),),
        outputs=(OutputSpec("y", "float32", (2, 3)),),
        states=(),
        entry_points=(EntryPoint("main", "main", None),),
        dims={},
        parameters=Parameters("model", "tiny.irpa"),
    )
    text = manifest.to_json().replace('"', "\\22")
    source = f"""module @linattn {{
      util.global private @w = #flow.parameter.named<"model"::"w"> : tensor<2x3xf32>
      func.func @main(%x_arg: !torch.vtensor<[2,3],f32>) -> !torch.vtensor<[2,3],f32>
          attributes {{iree.reflection = {{linattn.manifest = "{text}"}}}} {{
        %w = util.global.load @w : tensor<2x3xf32>
        %x = torch_c.to_builtin_tensor %x_arg : !torch.vtensor<[2,3],f32> -> tensor<2x3xf32>
        %y = arith.mulf %x, %w : tensor<2x3xf32>
        %r = torch_c.from_builtin_tensor %y : tensor<2x3xf32> -> !torch.vtensor<[2,3],f32>
        return %r : !torch.vtensor<[2,3],f32>
      }}
    }}"""
    path = tmp_path / "scaled.vmfb"
    path.write_bytes(sealed(compile_str(source, input_type="torch", extra_args=[*FLAGS["cpu"]])))
    return path


def test_parameters(tmp_path: Path) -> None:
    path = weights_module(tmp_path)
    with pytest.raises(TargetError, match=r"tiny\.irpa: no such parameter file"):
        Program.load(path)
    with pytest.raises(TargetError, match="pass parameters=FILE"):
        Program.load(path.read_bytes())
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)
    for key, name in (("w", "tiny.irpa"), ("v", "other.irpa")):
        rt.save_archive_file({key: weights}, tmp_path / name)
        seal_file(tmp_path / name)
    x = np.full((2, 3), 2, np.float32)
    for program in (Program.load(path), Program.load(path.read_bytes(), parameters=tmp_path / "tiny.irpa")):
        np.testing.assert_array_equal(program.run({"x": x})["y"], 2 * weights)
        np.testing.assert_array_equal(program.session().run({"x": x})["y"], 2 * weights)
    for bad in ("other.irpa", "scaled.vmfb"):
        with pytest.raises(TargetError) as caught:
            Program.load(path, parameters=tmp_path / bad)
        assert "\n" not in str(caught.value)
    with pytest.raises(TargetError, match="has its weights inside"):
        Program.load(Hybrid().compile(), parameters=tmp_path / "tiny.irpa")


def test_static_state_model() -> None:
    """A single op with all dims fixed: one `main` entry, a state, no tokens in any dim."""
    manifest = Manifest(
        model_name="op",
        model_sha256="",
        target=ANY_CPU,
        batch=None,
        max_context=None,
        context_limit=None,
        inputs=(InputSpec("x", "float32", (1, 4)),),
        outputs=(OutputSpec("y", "float32", (1, 4)),),
        states=(StateSpec("past", "present", "recurrent", "float32", (1, 4)),),
        entry_points=(EntryPoint("main", "main", None),),
        dims={},
    )
    text = manifest.to_json().replace('"', "\\22")
    tensor = "!torch.vtensor<[1,4],f32>"
    source = f"""module @linattn {{
      func.func @main(%x_arg: {tensor}, %s_arg: {tensor}) -> ({tensor}, {tensor})
          attributes {{iree.reflection = {{linattn.manifest = "{text}"}}}} {{
        %x = torch_c.to_builtin_tensor %x_arg : {tensor} -> tensor<1x4xf32>
        %s = torch_c.to_builtin_tensor %s_arg : {tensor} -> tensor<1x4xf32>
        %n = arith.addf %x, %s : tensor<1x4xf32>
        %y = arith.mulf %n, %n : tensor<1x4xf32>
        %n_res = torch_c.from_builtin_tensor %n : tensor<1x4xf32> -> {tensor}
        %y_res = torch_c.from_builtin_tensor %y : tensor<1x4xf32> -> {tensor}
        return %y_res, %n_res : {tensor}, {tensor}
      }}
    }}"""
    program = Program.load(sealed(compile_str(source, input_type="torch", extra_args=[*FLAGS["cpu"]])))
    x = np.ones((1, 4), np.float32)
    got = program.run({"x": x, "past": 2 * x})
    assert list(got) == ["y", "present"]
    np.testing.assert_array_equal(got["y"], 9)
    np.testing.assert_array_equal(program.run({"x": x})["present"], 1)
    session = program.session()
    for step in (1, 4, 9):
        np.testing.assert_array_equal(session.run({"x": x})["y"], step)
    with pytest.raises(InputError, match=r"x: wrong shape, got \[1, 5\], expected \[1, 4\]"):
        session.run({"x": np.ones((1, 5), np.float32)})


def test_the_face(cpu: Program) -> None:
    """`import linattn` has the names of the runtime and the compiler, each loaded when it is asked for."""
    assert linattn.Program is Program
    assert all(getattr(linattn, name) is not None for name in linattn.__all__)
    assert linattn.__version__ == metadata.version("linattn")
    with pytest.raises(AttributeError, match="module 'linattn' has no attribute 'Programm'"):
        linattn.Programm  # noqa: B018
    code = "import sys, linattn; print(sorted(name for name in sys.modules if name.startswith(('linattn.', 'iree'))))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    assert repr(cpu) == "<Program tiny-hybrid on local-sync: decode, prefill_3, prefill_8>"


def test_runs_without_the_compiler(tmp_path: Path) -> None:
    """The runtime imports the standard library, numpy, iree.runtime (and what that brings), nothing else."""
    path = tmp_path / "tiny.vmfb"
    path.write_bytes(Hybrid().compile())
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("onnx", "onnxruntime", "onnx_ir", "torch", "hypothesis") or (
            name.startswith(("iree.compiler", "linattn."))
            and not name.startswith(("linattn.runtime", "linattn.install"))
        ):
            raise ImportError("refused: " + name)
sys.meta_path.insert(0, Refuse())
import linattn.runtime, linattn.runtime.cli
program = linattn.runtime.Program.load({str(path)!r})
print(list(linattn.runtime.greedy(program.session(), [1, 2, 3], 4)))
third = {{name.split(".")[0] for name in sys.modules}} - set(sys.stdlib_module_names)
print(sorted(name for name in third if not name.startswith("_") and getattr(sys.modules.get(name), "__file__", None)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    tokens, modules = done.stdout.splitlines()
    assert tokens.startswith("[")
    assert set(eval(modules)) <= {"linattn", "numpy", "ml_dtypes", "iree", "sitecustomize"}
