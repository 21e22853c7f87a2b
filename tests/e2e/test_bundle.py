"""One folder for many machines: weights once, the same tokens on each, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from linattn.frontend import bundle as bundle_module
from linattn.frontend import cli
from linattn.frontend.cli import main
from linattn.frontend.compile import CompileOptions
from linattn.runtime import LinattnError, Program, greedy
from linattn.runtime.bundle import read_bundle
from linattn.runtime.discover import look_for
from linattn.runtime.outputs import remove_partial
from onnx import helper, numpy_helper

from samples.tiny_hybrid import build
from tests.conftest import NO_GPUS

PROMPT = [72, 101, 108, 108, 111, 32, 119, 111, 114, 108]
SMALL = ["--max-context", "32", "--prefill-blocks", "1", "--quiet"]  # no blocks of prompts: half the time to compile


def save(folder: Path, model: onnx.ModelProto | None = None) -> Path:
    path = folder / "model.onnx"
    onnx.save(model or build(), path)
    return path


def product(factor: float) -> onnx.ModelProto:
    """A model of one product, which compiles in no time."""
    info, weight = helper.make_tensor_value_info, np.full((64, 64), factor, np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [info("x", onnx.TensorProto.FLOAT, [1, 64])],
        [info("y", onnx.TensorProto.FLOAT, [1, 64])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny hybrid for all targets, for Vulkan twice, with its report."""
    root = tmp_path_factory.mktemp("bundle")
    options = ["--target", "vulkan,cpu,cuda", "--gpu-target", "vulkan:ada,vulkan:baseline,cuda:sm_80"]
    output = ["-o", str(root / "tiny.linattn"), "--report", str(root / "report.json")]
    assert main([str(save(root)), *options, *SMALL, *output]) == 0
    return root / "tiny.linattn"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """The tokens of a module of its own, weights inside."""
    root = tmp_path_factory.mktemp("plain")
    assert main([str(save(root)), *SMALL, "-o", str(root / "cpu.vmfb")]) == 0
    return list(greedy(Program.load(root / "cpu.vmfb").session(), PROMPT, 8))


def test_files(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "bundle.json",
        "cpu.vmfb",
        "cuda.vmfb",
        "vulkan-ada.vmfb",
        "vulkan-baseline.vmfb",
        "weights.irpa",
    ]
    assert [path.name for path in folder.parent.iterdir() if "partial" in path.name] == []
    bundle = read_bundle(folder)
    assert [(module.file, module.target.description) for module in bundle.modules if module.target.name != "cpu"] == [
        ("vulkan-ada.vmfb", "ada"),
        ("vulkan-baseline.vmfb", "baseline (Vulkan 1.3)"),
        ("cuda.vmfb", "sm_80"),
    ]
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        (folder / "bundle.json").stat().st_mode & 0o777
    }


def test_weights_are_stored_once(folder: Path) -> None:
    """What the CPU packs for itself comes on top of what the others share; nothing is stored for each module."""
    report = json.loads((folder.parent / "report.json").read_text())
    shared, own = report["shared_bytes"], report["own_bytes"]
    assert report["weight_bytes"] == shared + sum(own.values())
    model_bytes = report["modules"]["cuda.vmfb"]["weight_bytes"]
    assert 0.8 * model_bytes < shared <= model_bytes
    assert own["cuda.vmfb"] + own["vulkan-ada.vmfb"] + own["vulkan-baseline.vmfb"] < 0.1 * model_bytes
    assert 0 < own["cpu.vmfb"] <= model_bytes
    padding = 4096 + 128 * 64
    assert report["weight_bytes"] <= (folder / "weights.irpa").stat().st_size < report["weight_bytes"] + padding


def test_each_module_loads_by_itself(folder: Path, plain: list[int]) -> None:
    assert list(greedy(Program.load(folder / "cpu.vmfb").session(), PROMPT, 8)) == plain


def test_without_a_gpu(folder: Path, plain: list[int]) -> None:
    code = f"""
from linattn.runtime import Program, greedy
program = Program.load({str(folder)!r})
print(program.choice.module, *(passed.what for passed in program.choice.passed))
print(*greedy(program.session(), {PROMPT}, 8))
"""
    environment = os.environ | NO_GPUS
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["cpu.vmfb cuda vulkan", " ".join(map(str, plain))]


@pytest.mark.vulkan
def test_with_software_vulkan(folder: Path, plain: list[int]) -> None:
    """The module for 32 lanes is not taken on a device of 8, the other one is."""
    if not all(row.is_software for row in look_for("vulkan")):
        pytest.skip("for machines with software Vulkan only")
    program = Program.load(folder)
    assert program.choice is not None
    assert program.choice.module == "cpu.vmfb"
    assert program._engine.module._alone is not None  # the calling thread runs its small steps, as of a single module
    asked = Program.load(folder, device="vulkan")
    assert asked.choice is not None
    assert asked.choice.module == "vulkan-baseline.vmfb"
    assert "subgroups of 8 threads where 32 are needed" in asked.choice.passed[0].reason
    assert list(greedy(asked.session(), PROMPT, 8)) == plain


def fail(*_: object, **__: object) -> None:
    raise LinattnError("it did not work")


def stop(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, where it can be made to fail."""
    monkeypatch.setattr(cli, "compile_bundle", bundle_module.compile_bundle)


def fill_the_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.usefixtures("compiled_here")
@pytest.mark.parametrize(("how", "code"), [(fail, 2), (stop, 130), (fill_the_disk, 2)])
def test_a_failure_leaves_nothing(
    how: Callable[..., None],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After the modules, before the weights: what was there stays, and nothing else is left."""
    monkeypatch.setattr(bundle_module, "write_parameters", how)
    output = tmp_path / "tiny.linattn"
    assert main([str(save(tmp_path, product(1))), "-o", str(output), "--quiet"]) == code
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.usefixtures("compiled_here")
def test_an_option_that_is_wrong_for_the_last_target_is_found_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bundle_module, "compile_model", fail)
    options = ["--target", "cpu,cuda", "--gpu-target", "sm_13"]
    assert main([str(save(tmp_path)), *options, "-o", str(tmp_path / "tiny.linattn")]) == 2
    assert "--gpu-target: unknown GPU" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_only_a_bundle_is_replaced(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled again it takes the old one's place; a folder or file with anything else in it is left alone."""
    monkeypatch.setattr(bundle_module, "compile_model", fail)
    model, output = save(tmp_path), tmp_path / "out.linattn"

    def refused() -> str:
        with pytest.raises(LinattnError) as caught:
            bundle_module.compile_bundle(model, [CompileOptions()], output)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "out.linattn"]
        return str(caught.value)

    output.write_text("a file")
    assert "not a folder to put a bundle in the place of" in refused()
    output.unlink()
    output.symlink_to(folder)
    assert "not a folder to put a bundle in the place of" in refused()
    output.unlink()
    output.mkdir()
    assert "a folder that is not a bundle is not replaced" in refused()
    for file in folder.iterdir():
        (output / file.name).hardlink_to(file)
    assert "it did not work" in refused()
    (output / "tokenizer.json").write_text("mine")
    assert "only a bundle is replaced, got tokenizer.json beside it" in refused()
    (output / "tokenizer.json").unlink()
    (output / "cpu.vmfb").unlink()
    assert "a damaged bundle is not replaced" in refused()


def test_the_old_bundle_outlives_a_death_between_two_renames(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tidies up after the process that wrote takes the new one away, never the old one."""
    output, rename, calls = tmp_path / "old.linattn", os.rename, list[str]()
    shutil.copytree(folder, output)

    def die(old: Path, new: Path) -> None:
        calls.append(f"{old} {new}")
        if len(calls) == 2:
            remove_partial(tmp_path, os.getpid())
            raise KeyboardInterrupt
        rename(old, new)

    monkeypatch.setattr(os, "rename", die)
    with pytest.raises(KeyboardInterrupt), bundle_module._new_folder(output):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["old.linattn"]
    assert read_bundle(output) == read_bundle(folder)


def test_a_bundle_of_one_target_replaces_the_last(tmp_path: Path) -> None:
    """Its program goes on with the files that it has mapped."""
    output, x, programs = tmp_path / "tiny.linattn", np.ones((1, 64), np.float32), list[Program]()
    for factor in (1, 2):
        assert main([str(save(tmp_path, product(factor))), "-o", str(output), "--quiet"]) == 0
        programs.append(Program.load(output))
    assert [program.run({"x": x})["y"][0, 0] for program in programs] == [64, 128]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "tiny.linattn"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "cpu,tpu"], "--target: unknown target, got 'tpu', expected cpu | cuda | vulkan"),
        (["--target", "cpu,"], "--target: unknown target, got ''"),
        (["--target", "cpu,cpu"], "--target: given twice, got cpu"),
        (["--target", "cuda,vulkan", "--gpu-target", "sm_80"], "--gpu-target: which target is it for, got 'sm_80'"),
        (["--target", "cuda,cpu", "--gpu-target", "vulkan:ada"], "--gpu-target: not among the targets, got vulkan"),
        (["--target", "cuda,vulkan", "--gpu-target", "cuda:sm_80,ada"], "expected cuda:NAME,vulkan:NAME"),
        (["--target", "cuda,vulkan", "--cpu-features", "host"], "--cpu-features: a CPU option for a GPU target"),
        (
            ["--target", "cuda,cpu", "--parameters", "w.irpa"],
            "--target: does not go with a bundle, got --parameters w.irpa",
        ),
        (["--parameters", "w.irpa", "-o", "out.linattn"], "-o: does not go with a bundle, got --parameters w.irpa"),
        (["--target", "cuda,cpu", "-o", "out.vmfb"], "--target: does not go with a bundle, got out.vmfb"),
    ],
)
def test_bad_option(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(save(tmp_path)), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
