"""The bounds of index inputs, from graphs that are not compiled; against ONNX Runtime, which refuses what we refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linattn.frontend.graph.index_bounds import index_bounds
from linattn.frontend.graph.specialize import specialize
from onnx import TensorProto, helper

Node = tuple[str, list[Any], str, dict[str, Any]]


def model(nodes: list[Node], shape: list[int | str], dtype: int = TensorProto.INT64) -> onnx.ModelProto:
    """Nodes with an input ``i`` of this shape and, as operands, names, arrays or shapes of other inputs."""
    inputs = [helper.make_tensor_value_info("i", dtype, shape)]
    constants: list[onnx.TensorProto] = []
    protos: list[onnx.NodeProto] = []
    for op_type, operands, output, attributes in nodes:
        names: list[str] = []
        for operand in operands:
            if isinstance(operand, str):
                names.append(operand)
            elif isinstance(operand, list):
                names.append(f"x{len(inputs)}")
                inputs.append(helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, operand))
            else:
                names.append(f"c{len(constants)}")
                constants.append(onnx.numpy_helper.from_array(np.asarray(operand), names[-1]))
        domain = attributes.get("domain", "")
        others = {key: value for key, value in attributes.items() if key != "domain"}
        protos.append(helper.make_node(op_type, names, output.split(","), domain=domain, **others))
    names = [name for node in protos for name in node.output]
    read = {name for node in protos for name in node.input}
    outputs = [helper.make_empty_tensor_value_info(name) for name in names if name not in read]
    graph = helper.make_graph(protos, "g", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    found = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnx.shape_inference.infer_shapes(found) if not any("domain" in n[3] for n in nodes) else found


def bounds(nodes: list[Node], shape: list[int | str], dtype: int = TensorProto.INT64) -> tuple[int, int] | None:
    return index_bounds([specialize(model(nodes, shape, dtype), {}, {}, ())], ["i"]).get("i")


GATHER: Node = ("Gather", [[7, 5], "j"], "y", {})
TABLE_OPS = [
    ("Gather", [[7, 5], "i"], {}, [3], (-7, 6)),
    ("Gather", [[7, 5], "i"], {"axis": 1}, [3], (-5, 4)),
    ("Gather", [[7, 5], "i"], {"axis": -1}, [3], (-5, 4)),
    ("Gather", [["n", 5], "i"], {}, [3], None),
    ("GatherElements", [[7, 5], "i"], {"axis": 1}, [7, 2], (-5, 4)),
    ("GatherND", [[7, 5], "i"], {}, [3, 1], (-7, 6)),
    ("GatherND", [[7, 5], "i"], {}, [3, 2], (-7, 6)),
    ("GatherND", [[2, 7, 5], "i"], {"batch_dims": 1}, [2, 1], (-7, 6)),
    ("ScatterElements", [[7, 5], "i", [7, 2]], {"axis": 1}, [7, 2], (-5, 4)),
    ("ScatterND", [[7, 5], "i", [3, 5]], {}, [3, 1], (-7, 6)),
    ("OneHot", ["i", np.array(6), np.array([0.0, 1.0], np.float32)], {}, [3], None),
    ("RotaryEmbedding", [[1, 3, 8], [20, 2], [20, 2], "i"], {"num_heads": 2}, [1, 3], (0, 19)),
    ("Attention", [[1, 1, 3, 8], [1, 1, 9, 8], [1, 1, 9, 8], "", "", "", "i"], {}, [1], (0, 9)),
]
MICROSOFT_OPS = [
    ("RotaryEmbedding", [[1, 3, 8], "i", [20, 4], [20, 4]], {}, [1, 3], (0, 19)),
    (
        "MRotaryEmbedding",
        [[1, 3, 8], "i", [20, 4], [20, 4]],
        {"mrope_section": [2, 1, 1], "num_heads": 1},
        [3, 1, 3],
        (0, 19),
    ),
]


@pytest.mark.parametrize(("op_type", "operands", "attributes", "shape", "want"), TABLE_OPS)
def test_operators(
    op_type: str, operands: list[Any], attributes: dict[str, Any], shape: list[int], want: tuple[int, int] | None
) -> None:
    assert bounds([(op_type, operands, "y", attributes)], shape) == want


@pytest.mark.parametrize(("op_type", "operands", "attributes", "shape", "want"), MICROSOFT_OPS)
def test_microsoft_operators(
    op_type: str, operands: list[Any], attributes: dict[str, Any], shape: list[int], want: tuple[int, int]
) -> None:
    assert bounds([(op_type, operands, "y", {**attributes, "domain": "com.microsoft"})], shape) == want


@pytest.mark.parametrize("own", [False, True])
def test_group_query_attention(own: bool) -> None:
    """Positions are ids where there are some, else counted from the lengths."""
    attributes = {"num_heads": 1, "kv_num_heads": 1, "do_rotary": 1, "domain": "com.microsoft"}
    total = np.array(3, np.int32)
    q, cache = [1, 3, 8], [20, 4]
    ids: list[Any] = ["i"] if own else []
    lengths: Any = np.array([2], np.int32) if own else "i"
    operands = [q, q, q, "", "", lengths, total, cache, cache, *ids]
    shape, dtype = ([1, 3], TensorProto.INT64) if own else ([1], TensorProto.INT32)
    assert bounds([("GroupQueryAttention", operands, "y", attributes)], shape, dtype) == (0, 19)
    attributes["do_rotary"] = 0
    assert bounds([("GroupQueryAttention", operands, "y", attributes)], shape, dtype) is None


PATHS: list[tuple[list[Node], list[int], tuple[int, int] | None]] = [
    ([("Cast", ["i"], "j", {"to": TensorProto.INT32})], [3], (-7, 6)),
    ([("Identity", ["i"], "j", {})], [3], (-7, 6)),
    ([("Reshape", ["i", np.array([2, 3])], "j", {})], [6], (-7, 6)),
    ([("Flatten", ["i"], "j", {})], [2, 3], (-7, 6)),
    ([("Unsqueeze", ["i", np.array([0])], "k", {}), ("Squeeze", ["k"], "j", {})], [3], (-7, 6)),
    ([("Transpose", ["i"], "j", {})], [2, 3], (-7, 6)),
    ([("Expand", ["i", np.array([4, 3])], "j", {})], [3], (-7, 6)),
    ([("Tile", ["i", np.array([2])], "j", {})], [3], (-7, 6)),
    ([("Concat", [np.array([1]), "i"], "j", {"axis": 0})], [3], (-7, 6)),
    ([("Add", ["i", np.array(2)], "j", {})], [3], (-9, 4)),
    ([("Add", [np.array([2, 5]), "i"], "j", {})], [2], (-12, 4)),
    ([("Sub", ["i", np.array(2)], "j", {})], [3], (-5, 8)),
    ([("Sub", [np.array(2), "i"], "j", {})], [3], (-4, 9)),
    ([("Add", ["i", np.array(2)], "k", {}), ("Cast", ["k"], "j", {"to": TensorProto.INT32})], [3], (-9, 4)),
    ([("Gather", ["i", np.array(0)], "j", {})], [1, 3], (-7, 6)),
    ([("Gather", ["i", np.array(0)], "j", {})], [2, 3], None),
    ([("Slice", ["i", np.array([0]), np.array([3]), np.array([0])], "j", {})], [3], (-7, 6)),
    ([("Slice", ["i", np.array([0]), np.array([3]), np.array([0])], "j", {})], [5], None),
    ([("Split", ["i", np.array([2, 1])], "j,k", {}), ("Gather", [[4], "k"], "z", {})], [3], (-7, 6)),
    ([("Split", ["i", np.array([2, 1])], "j,k", {})], [3], None),
    ([("Mul", ["i", "i"], "j", {})], [3], None),
    ([("Where", [np.array([True, False, True]), "i", np.array(0)], "j", {})], [3], None),
    ([("Cast", ["i"], "k", {"to": TensorProto.FLOAT}), ("Cast", ["k"], "j", {"to": TensorProto.INT64})], [3], None),
    ([("Clip", ["i", np.array(0), np.array(6)], "j", {})], [3], None),
    ([("Identity", ["i"], "j", {}), ("Gather", [[3], "i"], "z", {})], [3], (-3, 2)),
]


@pytest.mark.parametrize(("nodes", "shape", "want"), PATHS)
def test_paths(nodes: list[Node], shape: list[int], want: tuple[int, int] | None) -> None:
    assert bounds([*nodes, GATHER], shape) == want


STEPS: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("Cast", [], {"to": TensorProto.INT32}),
    ("Reshape", [np.array([3, 2])], {}),
    ("Flatten", [], {}),
    ("Transpose", [], {}),
    ("Unsqueeze", [np.array([0])], {}),
    ("Add", [3], {}),
    ("Add", [-2], {}),
    ("Sub", [4], {}),
    ("Sub", [4], {"swapped": True}),
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(STEPS), max_size=4), st.integers(1, 9), st.integers(-30, 30))
def test_legal_is_what_onnx_runtime_takes(
    steps: list[tuple[str, list[Any], dict[str, Any]]], rows: int, value: int
) -> None:
    """Whatever the path from an input to a table, a value within the bounds runs there, and one outside does not."""
    name, nodes, dtype = "i", list[Node](), np.int64
    for number, (op_type, more, attributes) in enumerate(steps):
        dtype = np.int32 if op_type == "Cast" else dtype
        operands = [name, *[dtype(m) if isinstance(m, int) else m for m in more]]
        if attributes.get("swapped"):
            operands.reverse()
        others = {key: v for key, v in attributes.items() if key != "swapped"}
        nodes.append((op_type, operands, f"v{number}", others))
        name = f"v{number}"
    nodes.append(("Gather", [[rows, 2], name], "y", {}))
    found = bounds(nodes, [2, 3])
    assert found is not None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    proto = model(nodes, [2, 3]).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    table = next(value.name for value in session.get_inputs() if value.name != "i")
    feeds = {"i": np.full((2, 3), value), table: np.zeros((rows, 2), np.float32)}
    if found[0] <= value <= found[1]:
        session.run(None, feeds)
    else:
        with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
            session.run(None, feeds)


def test_the_widest_of_several_entry_points() -> None:
    graphs = [specialize(model([("Gather", [["t"], "i"], "y", {})], [1]), {"t": size}, {}, ()) for size in (1, 4)]
    assert index_bounds(graphs, ["i"]) == {"i": (-4, 3)}
