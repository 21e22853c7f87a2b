"""DequantizeLinear of weights (QDQ) becomes the kernels of packed weights, right as ONNX Runtime; or is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from linattn.frontend import CompileOptions
from linattn.frontend.compile import compile_model
from linattn.runtime import Program
from linattn.runtime.errors import UnsupportedModelError
from onnx import TensorProto, helper
from tolerances import BENIGN, INT4_OWN_NOISE, error

from tests.families.compare import LENGTHS, Family, compare

K, N, BLOCK = 64, 48, 32
IDS = np.array([[0, 47, 5, -1]])


def quantised(name: str, kind: int, rows: int, columns: int, axis: int, zeros: bool, granularity: str) -> Any:
    """The initializers of a matrix whose K is its ``axis``, and the DequantizeLinear of it."""
    random = np.random.default_rng(rows + axis)
    bits, low = {TensorProto.INT4: (4, -8), TensorProto.UINT4: (4, 0), TensorProto.INT8: (8, -128)}.get(kind, (8, 0))
    shape = {"block": [rows // BLOCK, columns] if axis == 0 else [rows, columns // BLOCK],
             "column": [columns if axis == 0 else rows], "tensor": []}[granularity]  # fmt: skip

    def whole(suffix: str, shape: list[int]) -> onnx.TensorProto:
        values = random.integers(low, low + (1 << bits), shape)
        return helper.make_tensor(f"{name}{suffix}", kind, shape, values.reshape(-1).tolist())

    scales = 0.1 + random.random(shape, np.float32)
    tensors = [
        whole("", [rows, columns]),
        helper.make_tensor(f"{name}.s", TensorProto.FLOAT, shape, np.ravel(scales).tolist()),
    ]
    if zeros:
        tensors.append(whole(".z", shape))
    attributes = {"axis": axis, "block_size": BLOCK} if granularity == "block" else {"axis": 1 - axis}
    inputs = [tensor.name for tensor in tensors]
    return tensors, helper.make_node("DequantizeLinear", inputs, [f"{name}.d"], f"{name}.dequantise", **attributes)


def model(kind: int, zeros: bool, granularity: str) -> onnx.ModelProto:
    """A table that is the head too, both ways round, and a product that ONNX Runtime rounds activations for."""
    value = helper.make_tensor_value_info
    rows, first = quantised("rows", kind, N, K, 1, zeros, granularity)
    columns, second = quantised("columns", kind, K, N, 0, zeros, granularity)
    alone, third = quantised("alone", kind, K, N, 0, zeros, granularity)
    nodes = [
        first,
        second,
        third,
        helper.make_node("Gather", ["rows.d", "ids"], ["looked up"], "look up"),
        helper.make_node("Transpose", ["rows.d"], ["rows.t"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["looked up", "rows.t"], ["head"], "head"),
        helper.make_node("MatMul", ["looked up", "columns.d"], ["product"], "product"),
        helper.make_node("Transpose", ["columns.d"], ["columns.t"], "turn back", perm=[1, 0]),
        helper.make_node("Gather", ["columns.t", "ids"], ["columns looked up"], "look up columns"),
        helper.make_node("MatMul", ["looked up", "alone.d"], ["rounded"], "rounded"),
    ]
    outputs = {"looked up": K, "head": N, "product": N, "columns looked up": K, "rounded": N}
    graph = helper.make_graph(
        nodes,
        "g",
        [value("ids", TensorProto.INT64, [1, 4])],
        [value(name, TensorProto.FLOAT, [1, 4, size]) for name, size in outputs.items()],
        [*rows, *columns, *alone],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize(
    ("kind", "zeros", "granularity"),
    [
        (TensorProto.INT4, False, "block"),
        (TensorProto.INT4, True, "block"),
        (TensorProto.UINT4, False, "block"),
        (TensorProto.UINT4, True, "column"),
        (TensorProto.INT4, False, "tensor"),
        (TensorProto.INT8, True, "block"),
        (TensorProto.UINT8, False, "block"),
    ],
)
def test_every_form(kind: int, zeros: bool, granularity: str) -> None:
    proto = model(kind, zeros, granularity)
    compiled = compile_model(proto)
    counts = sorted(line.partition(":")[0] for line in compiled.report.others)
    products = ["3 x MatMulNBits"] if granularity == "tensor" else ["1 x MatMulNBits", "2 x MatMulNBits"]
    assert counts == sorted(["2 x GatherBlockQuantized", *products])
    got = Program.load(compiled.module).run({"ids": IDS})
    runtime = onnxruntime.InferenceSession(proto.SerializeToString())
    for output, want in zip(runtime.get_outputs(), runtime.run(None, {"ids": IDS}), strict=True):
        assert error(got[output.name], want) < BENIGN["float32"], output.name


@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.UINT4])
@pytest.mark.parametrize("zeros", [False, True])
def test_table_of_4_bits(kind: int, zeros: bool) -> None:
    """GatherBlockQuantized with ONNX's own types, whose default zero point is 0."""
    value = helper.make_tensor_value_info
    tensors, _ = quantised("w", kind, N, K, 1, zeros, "block")
    inputs = ["w", "ids", "w.s", *(["w.z"] if zeros else [])]
    look_up = helper.make_node(
        "GatherBlockQuantized", inputs, ["y"], domain="com.microsoft", block_size=BLOCK, quantize_axis=1
    )
    ids, y = value("ids", TensorProto.INT64, [1, 4]), value("y", TensorProto.FLOAT, [1, 4, K])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(
        helper.make_graph([look_up], "g", [ids], [y], tensors), opset_imports=opsets, ir_version=10
    )
    got = Program.load(compile_model(proto).module).run({"ids": IDS})["y"]
    want = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"ids": IDS})[0]
    assert error(got, want) < BENIGN["float32"]


@pytest.mark.parametrize(
    ("readers", "change", "message"),
    [
        ([helper.make_node("Add", ["w.d", "w.d"], ["y"], "add")], {}, r"node 'add' \(Add\): it reads what 'w.dequant"),
        ([helper.make_node("MatMul", ["w.d", "x"], ["y"], "left")], {}, "node 'left' .*: it reads what"),
        ([helper.make_node("MatMul", ["x", "w.d"], ["y"], "m")], {"axis": 1}, "its blocks, 32 along axis 1, are not"),
        ([helper.make_node("MatMul", ["x", "w.d"], ["y"], "m")], {"block_size": 8}, "its blocks, 8 along axis 0, are"),
        (
            [helper.make_node("MatMul", ["x", "w.d"], ["y"], "m")],
            {"block_size": 16},
            "scales or zero points do not fit",
        ),
        ([helper.make_node("Identity", ["w"], ["y"], "copy")], {}, "node 'copy' .* has elements of less than 8 bits"),
    ],
)
def test_anything_else_is_refused_by_name(readers: list[onnx.NodeProto], change: dict[str, int], message: str) -> None:
    tensors, dequantise = quantised("w", TensorProto.INT4, K, N, 0, False, "block")
    for attribute in dequantise.attribute:
        attribute.i = change.get(attribute.name, attribute.i)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [N, K])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b"])
    graph = helper.make_graph([dequantise, *readers], "g", [x], [y], tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with pytest.raises(UnsupportedModelError, match=message):
        compile_model(proto)


@pytest.mark.usefixtures("shared_models")
def test_an_export_with_use_qdq() -> None:
    family = Family("qwen35_vl--genai-cpu-int4-use_qdq_true")
    program = Program.load(compile_model(family.model, CompileOptions(prefill_blocks=(8,))).module)
    for length in LENGTHS:
        assert (found := compare(program, family, length)).is_right(family, INT4_OWN_NOISE), found
