"""A value times sigmoid or silu of a gate that Splits cut out of a product, as one kernel on CPUs, against float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from harness import CPUS, WIDTHS, skip_unless_it_runs
from linattn.dialect_patterns.target import Target
from linattn.frontend import CompileOptions, compile_model
from linattn.frontend.graph.gate_columns import gate_columns
from linattn.frontend.graph.schema import infer_types
from linattn.frontend.graph.specialize import SpecializedGraph
from linattn.runtime import Program
from onnx import helper, numpy_helper
from tolerances import BENIGN, error

B, T, HEADS, SIZE = 2, 19, 3, 48
WIDTH = HEADS * SIZE
CPU = Target("cpu", vector_bits=256)


def build(dtype: Any, tokens: int = T, kept: str = "") -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Attention's output times the sigmoid of a gate beside each query, and silu(gate) * up."""
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def value(name: str, *shape: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, element, shape)

    def node(kind: str, inputs: list[str], *outputs: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, outputs, outputs[0], **attributes)

    lists = {"widths": [2 * WIDTH, 16], "apart": [0, 0, HEADS, 2 * SIZE], "halves": [SIZE, SIZE], "flat": [0, 0, WIDTH]}
    nodes = [
        node("Split", ["wide", "widths"], "pairs", "rest", axis=-1),
        node("Reshape", ["pairs", "apart"], "pairs.apart"),
        node("Split", ["pairs.apart", "halves"], "queries", "gates", axis=-1),
        node("Reshape", ["gates", "flat"], "gate"),
        node("Sigmoid", ["gate"], "opened"),
        node("Mul", ["x", "opened"], "y"),
        node("Sigmoid", ["z"], "z.sigmoid"),
        node("Mul", ["z", "z.sigmoid"], "z.silu"),
        node("Mul", ["z.silu", "x"], "w"),
    ]
    inputs = [value("x", B, tokens, WIDTH), value("z", B, tokens, WIDTH), value("wide", B, tokens, 2 * WIDTH + 16)]
    outputs = [value("y", B, tokens, WIDTH), value("w", B, tokens, WIDTH), value("queries", B, tokens, HEADS, SIZE)]
    outputs += [value(kept, B, tokens, WIDTH)] if kept else []
    weights = [numpy_helper.from_array(np.array(numbers), name) for name, numbers in lists.items()]
    graph = helper.make_graph(nodes, "gates", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    generator = np.random.default_rng(5)
    shapes = {one.name: [dim.dim_value for dim in one.type.tensor_type.shape.dim] for one in inputs}
    return model, {name: (4 * generator.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("target", "dtype"),
    [*((width, np.float32) for width in WIDTHS), ("cpu256", ml_dtypes.bfloat16), ("cpu512", np.float16)],
)
def test_gated_columns(target: str, dtype: Any) -> None:
    model, feeds = build(dtype)
    feeds["z"][0, 0, :2] = (-1e4, 1e4)  # e^-z has no number in f32
    module = compile_model(model, CompileOptions(cpu_features=CPUS[target])).module
    assert b"gated_columns_" in module
    assert b"_elementwise_" not in module
    skip_unless_it_runs(target)
    results = Program.load(module).run(feeds)
    x, z, wide = (feeds[name].astype(np.float64) for name in ("x", "z", "wide"))
    gate = wide[..., : 2 * WIDTH].reshape(B, T, HEADS, -1)[..., SIZE:].reshape(B, T, WIDTH)
    with np.errstate(over="ignore"):
        wants = {"y": x / (1 + np.exp(-gate)), "w": x * z / (1 + np.exp(-z))}
    limit = BENIGN[np.dtype(dtype).name]
    assert error(results["y"], wants["y"]) <= limit
    assert error(results["w"][:, 1:], wants["w"][:, 1:]) <= limit
    assert error(results["w"], wants["w"]) <= limit


def kinds(target: Target = CPU, tokens: int = T, kept: str = "") -> list[str]:
    model, _ = build(np.float16, tokens, kept)
    before = model.SerializeToString()
    found = gate_columns(SpecializedGraph(model, infer_types(model)), target).proto.graph.node
    assert model.SerializeToString() == before
    return [node.op_type for node in found]


def test_gates_are_read_where_they_lie() -> None:
    model, _ = build(np.float16)
    found = gate_columns(SpecializedGraph(model, infer_types(model)), CPU).proto.graph.node
    made = [node for node in found if node.op_type == "GatedColumns"]
    given = [{one.name: helper.get_attribute_value(one) for one in node.attribute} for node in made]
    assert [list(node.input) for node in made] == [["x", "wide"], ["x", "z"]]
    assert given == [
        {"size": SIZE, "start": SIZE, "stride": 2 * SIZE, "multiplies": 0},
        {"size": WIDTH, "start": 0, "stride": WIDTH, "multiplies": 1},
    ]
    assert not {"Sigmoid", "Mul"} & {node.op_type for node in found}


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"target": Target("vulkan", is_gpu=True)}, 2),
        ({"tokens": 1}, 2),
        ({"kept": "opened"}, 1),  # what is read elsewhere is computed anyway
        ({"kept": "z.sigmoid"}, 1),
        ({"kept": "z.silu"}, 1),
    ],
)
def test_left_alone(options: dict[str, Any], left: int) -> None:
    assert kinds(**options).count("GatedColumns") == 2 - left
