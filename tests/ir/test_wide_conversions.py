"""Unsigned bytes of f32 are whole numbers of 32 bits first: what Vulkan makes of 136 as a signed byte is a driver's."""

from __future__ import annotations

from pathlib import Path

import pytest
from iree.compiler import ir
from linattn.dialect_patterns.wide_conversions import widen_conversions
from linattn.frontend.compile import CompileOptions, compile_model
from onnx import TensorProto, helper

ONE = "func.func @f(%x: f32) -> TYPE { %y = arith.fptosi %x : f32 to TYPE\n return %y : TYPE }"


@pytest.mark.parametrize(("dtype", "count"), [("i8", 1), ("i16", 1), ("i32", 0), ("i64", 0)])
def test_narrow_integers(dtype: str, count: int) -> None:
    with ir.Context() as context, ir.Location.unknown():
        context.load_all_available_dialects()
        module = ir.Module.parse(ONE.replace("TYPE", dtype))
        assert widen_conversions(module) == count
        module.operation.verify()
        text = str(module)
    assert ("arith.fptosi %arg0 : f32 to i32" in text) == (count > 0 or dtype == "i32")
    assert (f"arith.trunci %0 : i32 to {dtype}" in text) == (count > 0)


def test_a_zero_point_beyond_127(tmp_path: Path) -> None:
    """On an H100 it was 127 for 136, and all of the result 9 steps off."""
    element = {"x": TensorProto.FLOAT, "y": TensorProto.UINT8, "scale": TensorProto.FLOAT, "zero": TensorProto.UINT8}
    values = {
        name: helper.make_tensor_value_info(name, kind, [64] if name in "xy" else []) for name, kind in element.items()
    }
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "scale", "zero"])
    graph = helper.make_graph([node], "g", [values.pop("x")], list(values.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    compile_model(model, CompileOptions(target="vulkan", dump_ir=tmp_path, dry_run=True))
    text = next(tmp_path.glob("*-linalg.mlir")).read_text()
    assert "arith.fptosi" in text
    assert "to i8" not in "".join(line for line in text.splitlines() if "arith.fptosi" in line)
