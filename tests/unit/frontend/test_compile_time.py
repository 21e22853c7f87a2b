"""What made compiling slow, counted rather than timed."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
from iree.compiler import ir
from linattn.frontend.compile import CompileOptions, compile_model
from linattn.frontend.lower import iree
from linattn.frontend.lower.iree import Compiler
from linattn.frontend.plan.report import Progress
from linattn.runtime.errors import LoweringError
from onnx import helper

from samples.tiny_hybrid import build


class Lowered(BaseException):
    """Everything before code generation is done."""


def stop(*_: object) -> None:
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


def test_verified_between_phases_not_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a phase of IREE leaves is verified, and named; after each of 4,000 passes only to find one that is wrong."""
    asked: list[bool] = []
    monkeypatch.setattr(iree, "verify_between_passes", lambda _, wanted: asked.append(wanted))
    compiled: list[Any] = []
    real = Compiler.compile

    def keep(self: Compiler, module: ir.Module, *rest: Any) -> Any:
        compiled.append(module)
        return real(self, module, *rest)

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


def test_the_long_stage_says_how_far_it_is() -> None:
    stream = io.StringIO()
    compile_model(small_model(), CompileOptions(cpu_features="generic"), progress=Progress(6, stream))
    line = next(line for line in stream.getvalue().splitlines() if "generate code" in line)
    assert re.search(r"\) \.\.\. 1 kernels \.\.\. scheduled \.\.\. lowered \.\.\. assembled \.\.\. [\d.]+ s$", line)
