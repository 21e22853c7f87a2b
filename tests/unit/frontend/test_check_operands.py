"""Nodes that break the rules of their operator are refused by name: IREE's conversions die of them, or never end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from linattn.dialect_patterns.registry import find_op
from linattn.frontend import compile as compiler
from linattn.frontend.compile import CompileOptions, compile_model
from linattn.frontend.graph.check_operands import check_operands
from linattn.frontend.graph.schema import IMPORTER_OPS
from linattn.frontend.graph.specialize import SpecializedGraph
from linattn.runtime.errors import UnsupportedModelError
from onnx import TensorProto, helper, numpy_helper

OPSET = 21
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
Shape = Sequence[int | str]


def model(op: str, shape: Shape, result: Shape, constants: Sequence[Any] = (), *, elem: int = FLOAT,
          outputs: Sequence[str] = ("y",), opset: int = OPSET, **attributes: Any) -> onnx.ModelProto:  # fmt: skip
    """A model of one node 'n' of an input and constants."""
    names = [f"c{i}" for i in range(len(constants))]
    nodes = [helper.make_node(op, ["x", *names], outputs, name="n", **attributes)]
    values = [numpy_helper.from_array(np.array(c), name) for c, name in zip(constants, names, strict=True)]
    x, y = helper.make_tensor_value_info("x", elem, shape), helper.make_tensor_value_info("y", FLOAT, result)
    graph = helper.make_graph(nodes, "g", [x], [y], values)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", opset)])


ABC = ("a", "b", 4)
IMAGE = ("a", 4, 5, 5)
FILTERS = np.ones((4, 4, 2, 2), np.float32)
ONES = np.ones(4, np.float32)
CASES = {
    "a list of axes that is a float": (model("Unsqueeze", ABC, ("a", 1, "b", 4), [ONES]), "ParseData type mismatch"),
    "axes of a reduction that are a number": (model("ReduceSum", ABC, ABC, [1]), "input 'c0' must be a list, got i64"),
    "a list of two axes": (model("Reshape", ABC, ("n",), [[[-1]]]), "input 'c0' must be a list, got 1x1xi64"),
    "an axis far out": (model("Unsqueeze", ABC, ("a", 1, "b", 4), [[1 << 31]]), "Unexpected axis value: 2147483648"),
    "an order of axes far out": (model("Transpose", ABC, ABC, perm=[0, 2, 1 << 40]), "Invalid attribute perm"),
    "normalised over no axis": (model("LayerNormalization", ABC, ABC, [ONES], axis=99), "attribute 'axis', got 99"),
    "scattered over no axis": (
        model("ScatterElements", ABC, ABC, [[[[0]]], np.ones((1, 1, 1), np.float32)], axis=-4),
        "attribute 'axis', got -4",
    ),
    "no groups of a convolution": (model("Conv", IMAGE, IMAGE, [FILTERS], group=0), "attribute 'group', got 0"),
    "groups that do not divide": (model("Conv", IMAGE, IMAGE, [FILTERS], group=3), "attribute 'group', got 3"),
    "no groups of channels": (
        model("GroupNormalization", IMAGE, IMAGE, [ONES, ONES], num_groups=0),
        "attribute 'num_groups', got 0",
    ),
    "a slice that stands still": (model("Slice", ABC, ABC, [[0], [1], [1], [0]]), "a step of 0"),
    "two numbers for one": (model("CumSum", ABC, ABC, [[1, 1]]), "input 'c0' must be a number, got 2xi64"),
    "a softmax of integers": (model("Softmax", ABC, ABC, elem=INT64, axis=1), "has an unsupported type, got i64"),
    "a function of integers": (
        model("MeanVarianceNormalization", IMAGE, IMAGE, elem=INT64),
        "unsupported type: tensor(int64)",
    ),
    "more outputs than it says": (
        model("Split", ("a", 4), ("a", 2), outputs=["y", "z", "new"], axis=1, num_outputs=2),
        "attribute 'num_outputs', got 2, expected 3",
    ),
}  # fmt: skip


class Planned(BaseException):
    """The model was found good and would be compiled now."""


def stop(*_: object) -> None:
    raise Planned


@pytest.mark.parametrize(("proto", "message"), CASES.values(), ids=CASES)
def test_refused_by_name(proto: onnx.ModelProto, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "Compiler", stop)
    with pytest.raises(UnsupportedModelError) as caught:
        compile_model(proto, CompileOptions(batch=None))
    assert str(caught.value).startswith(f"node 'n' ({proto.graph.node[0].op_type}): ")
    assert message in str(caught.value)
    if proto.graph.node[0].op_type == "Split":
        return  # ONNX Runtime's process ends, in the same place of ONNX
    shape = [d.dim_value or 3 for d in proto.graph.input[0].type.tensor_type.shape.dim]
    x = np.zeros(shape, helper.tensor_dtype_to_np_dtype(proto.graph.input[0].type.tensor_type.elem_type))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(Exception, match=r"ONNXRuntimeError|Load model"):  # ONNX Runtime refuses it too, or fails
        onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, {"x": x})


def test_a_function_whose_rank_is_wrong() -> None:
    """What IREE writes out itself has rules of its own, which only its import finds broken."""
    with pytest.raises(UnsupportedModelError, match=r"^node 'n' \(MeanVarianceNormalization\): its inputs do not fit"):
        compile_model(model("MeanVarianceNormalization", (), ()))


def test_element_types() -> None:
    """An element type that an operator does not take, in each input of each operator of ONNX that IREE converts."""
    names = {helper.tensor_dtype_to_string(t).split(".")[1].lower(): t for t in (FLOAT, INT64, TensorProto.BOOL)}
    found = 0
    for op in sorted(IMPORTER_OPS):
        if not onnx.defs.has(op, OPSET) or find_op("", op, OPSET) is not None:
            continue  # not one of this opset, or an operator of ours
        schema = onnx.defs.get_schema(op, OPSET)
        constraints = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
        allowed = [
            {t for name, t in names.items() if f"tensor({name})" in constraints.get(p.type_str, {p.type_str})}
            for p in schema.inputs
        ]
        inputs = [f"i{i}" for i in range(len(allowed))]
        graph = onnx.ModelProto(graph=onnx.GraphProto(node=[helper.make_node(op, inputs, ["y"], name="n")]))
        for port, types in enumerate(allowed):
            for wrong in set(names.values()) - types:
                chosen = [wrong if i == port else min(own, default=FLOAT) for i, own in enumerate(allowed)]
                declared = [helper.make_tensor_type_proto(t, [1] * 4) for t in chosen]
                with pytest.raises(UnsupportedModelError, match=rf"^node 'n' \({op}\)"):
                    check_operands(SpecializedGraph(graph, dict(zip(inputs, declared, strict=True))), {"": OPSET})
                found += 1
    assert found > 300
