"""What made compiling slow, counted rather than timed."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import linattn.dialect_patterns
import linattn.frontend
import numpy as np
import onnx
import pytest
from iree.compiler import ir
from iree.compiler.api import Invocation, Session
from linattn.dialect_patterns.emit.dialect_modules import DIALECTS
from linattn.frontend.compile import CompileOptions, compile_model
from linattn.frontend.lower import iree
from linattn.frontend.lower.iree import Compiler
from linattn.frontend.lower.kernel_bodies import KernelBodies
from linattn.frontend.plan.report import Progress
from linattn.runtime.errors import LoweringError
from onnx import helper, numpy_helper

from samples.tiny_hybrid import build


class Lowered(BaseException):
    """Everything before code generation is done."""


def stop(*_: object, **__: object) -> None:
    raise Lowered


def small_model() -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "small", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def test_dialects_are_not_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at every value of a dialect without a module, by a search of all folders of the path."""
    searches: list[str] = []

    class Searches:
        """Finds nothing, and keeps what was looked for."""

        def find_spec(
            self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
        ) -> ModuleSpec | None:
            if name.startswith("iree.compiler.dialects."):
                searches.append(name)
            return None

    monkeypatch.setattr(Compiler, "compile", stop)
    monkeypatch.setattr(sys, "meta_path", [Searches(), *sys.meta_path])
    with pytest.raises(Lowered):
        compile_model(build(), CompileOptions(cpu_features="generic"))
    assert len(searches) == len(set(searches))


def test_all_dialects_are_loaded_that_operations_are_built_of() -> None:
    """And no others: most of IREE's passes collect the patterns of every operation of those that are loaded."""
    folder = Path(linattn.dialect_patterns.__path__[0])
    files = [*folder.rglob("*.py"), *(Path(linattn.frontend.__path__[0]) / "lower").glob("*.py")]
    text = "\n".join(file.read_text() for file in files)
    built = set(re.findall(r'[("]([a-z_]+)\.[a-z_]+(?:\.[a-z_]+)*"', text))
    for names in re.findall(r"from iree\.compiler\.dialects import (.*)", text):
        built |= set(names.split(", "))
    session = Session()
    dialects: set[str] = set()
    for name in built:
        with contextlib.suppress(ValueError):
            session.context.get_dialect_descriptor(name)
            dialects.add(name)
    assert {"arith", "flow", "hal", "llvm", "torch", "vector"} < dialects
    # Operations of stream are built where IREE has loaded it: behind its phase of that name.
    assert dialects - {"stream"} == set(DIALECTS)


def test_verified_between_phases_not_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a phase of IREE leaves is verified, and named; after each of 4,000 passes only to find one that is wrong."""
    asked: list[bool] = []
    monkeypatch.setattr(iree, "verify_between_passes", lambda _, wanted: asked.append(wanted))
    compiled: list[Any] = []
    real = Compiler.compile

    def keep(self: Compiler, module: ir.Module, *rest: Any, **more: Any) -> Any:
        compiled.append(module)
        return real(self, module, *rest, **more)

    def breaks(*_: object) -> bool:
        with compiled[-1].context, ir.Location.name("here"), ir.InsertionPoint(compiled[-1].body):
            ir.Operation.create("arith.addi")
        return True

    monkeypatch.setattr(Compiler, "compile", keep)
    monkeypatch.setattr(iree, "execute", breaks)
    for dump in (None, tmp_path):
        with pytest.raises(LoweringError, match=r"node 'here': IREE could not compile the model: 'arith.addi' op"):
            compile_model(build(), CompileOptions(cpu_features="generic", dump_ir=dump))
    assert asked == [False, True]


def test_nothing_is_compiled_to_reshape_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """What depends on weights alone IREE compiles as a module of its own and runs: a convolution's taps as a list."""
    f32 = onnx.TensorProto.FLOAT
    taps = numpy_helper.from_array(np.ones((64, 1, 4), np.float32), "taps")
    shapes = {"x": [1, 64, 8], "past": [1, 64, 3], "y": [1, 64, 8], "present": [1, 64, 3]}
    x, past, y, present = (helper.make_tensor_value_info(name, f32, shape) for name, shape in shapes.items())
    node = helper.make_node("CausalConvWithState", ["x", "taps", "", "past"], ["y", "present"])
    graph = helper.make_graph([node], "convolution", [x, past], [y, present], [taps])
    modules: list[ir.Operation] = []
    texts: list[str] = []
    real_import, real_execute = Invocation.import_module, iree.execute

    def take(self: Invocation, module: Any) -> bool:
        modules.append(module)
        return real_import(self, module)

    def execute(invocation: Invocation, *phases: str) -> bool:
        done = real_execute(invocation, *phases)
        if phases[-1] != "global-optimization":
            return done  # what the target's name means
        texts.append(str(modules[-1]))
        raise Lowered

    monkeypatch.setattr(Invocation, "import_module", take)
    monkeypatch.setattr(iree, "execute", execute)
    with pytest.raises(Lowered):
        compile_model(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 27)]), CompileOptions(cpu_features="znver4")
        )
    assert "causal_conv_fused_simd" in texts[0]
    assert "hoisted" not in texts[0]


def test_no_copy_of_a_graph_holds_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those inside the file too: shape inference wrote and read all of them some ten times."""
    written: list[int] = []
    real = onnx.shape_inference.infer_shapes

    def infer(model: onnx.ModelProto, *args: Any, **options: Any) -> onnx.ModelProto:
        written.append(model.ByteSize())
        return real(model, *args, **options)

    monkeypatch.setattr(Compiler, "compile", stop)
    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", infer)
    for dtype in ("f32", "f16"):
        model = build(dtype)
        written.clear()
        with pytest.raises(Lowered):
            compile_model(model, CompileOptions(cpu_features="generic"))
        assert len(written) > 2
        assert max(written[2:]) < model.ByteSize() / 8  # raising looks at the graph as it came, twice


def two_products() -> onnx.ModelProto:
    """Two different kernels of one strategy, then one of IREE's own."""
    random = np.random.default_rng(0)
    names = ("a", "b")
    weights = [
        numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)
        for name, shape in zip(names, [(64, 96), (96, 32)], strict=True)
    ]
    nodes = [helper.make_node("MatMul", [x, w], [y]) for x, w, y in [("x", "a", "h"), ("h", "b", "p")]]
    values = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in [("x", [3, 64]), ("y", [3, 32])]]
    graph = helper.make_graph([*nodes, helper.make_node("Tanh", ["p"], ["y"])], "two", values[:1], values[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


@pytest.mark.parametrize(
    "options", [CompileOptions(cpu_features="portable"), CompileOptions(target="vulkan")], ids=["cpu", "vulkan"]
)
def test_kernels_are_out_of_the_module_while_it_is_scheduled(
    options: CompileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """IREE's passes over the host code do not go through them, and the code is the same byte for byte."""
    inside: dict[str, int] = {}
    modules: list[ir.Operation] = []
    real_import, real_execute = Invocation.import_module, iree.execute

    def take(self: Invocation, module: Any) -> bool:
        modules.append(module)
        return real_import(self, module)

    def count(invocation: Invocation, *phases: str) -> bool:
        done = real_execute(invocation, *phases)
        texts = [str(op) for op in modules[-1].regions[0].blocks[0] if op.operation.name.startswith("hal.executable")]
        inside[phases[-1]] = len([text for text in texts if "no_pipeline" in text])
        return done

    monkeypatch.setattr(Invocation, "import_module", take)
    monkeypatch.setattr(iree, "execute", count)
    apart = compile_model(two_products(), options).module
    assert inside["global-optimization"] == 2
    assert inside["flow"] == inside["executable-sources"] == 0
    monkeypatch.setattr(KernelBodies, "__init__", lambda *_: None)
    monkeypatch.setattr(KernelBodies, "put_back", lambda *_: None)
    assert compile_model(two_products(), options).module == apart
    assert inside["flow"] == inside["executable-sources"] == 2


def test_the_long_stage_says_how_far_it_is() -> None:
    stream = io.StringIO()
    compile_model(small_model(), CompileOptions(cpu_features="generic"), progress=Progress(6, stream))
    line = next(line for line in stream.getvalue().splitlines() if "generate code" in line)
    assert re.search(r"\) \.\.\. 1 kernels \.\.\. scheduled \.\.\. lowered \.\.\. assembled \.\.\. [\d.]+ s$", line)
