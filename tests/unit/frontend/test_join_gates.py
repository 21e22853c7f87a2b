"""Norms and gates go into the kernel of LinearAttention, for one token on a GPU that sums by subgroups."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from linattn.dialect_patterns.op import MICROSOFT, LoweringOptions
from linattn.dialect_patterns.target import Limits, Target
from linattn.frontend.graph.join_gates import join_gates
from linattn.frontend.graph.schema import infer_types
from linattn.frontend.graph.specialize import SpecializedGraph
from onnx import TensorProto, helper, numpy_helper

GPU = Target("vulkan", is_gpu=True, subgroup_size=32)
HEADS, SIZE = 2, 16
WIDTH = HEADS * SIZE


def graph(
    tokens: int = 1, *, axis: int = -1, power: int = 2, factor: float = 0.5, gate: bool = True
) -> SpecializedGraph:
    """A layer's heart, as onnxruntime-genai writes it."""
    nodes: list[onnx.NodeProto] = []
    weights = {"flat": np.array([0, 0, WIDTH]), "apart": np.array([0, 0, HEADS, SIZE])}
    weights |= {"factor": np.array(factor, np.float32), "bias": np.zeros(HEADS, np.float32)}
    weights["rate"] = -np.ones(HEADS, np.float32)
    for name in "qk":
        nodes.append(helper.make_node("Reshape", [name, "apart"], [f"{name}.apart"], f"{name}.apart"))
        norm = helper.make_node(
            "LpNormalization", [f"{name}.apart"], [f"{name}.norm"], f"{name}.norm", axis=axis, p=power
        )
        nodes += [norm, helper.make_node("Reshape", [f"{name}.norm", "flat"], [f"{name}.unit"], f"{name}.unit")]
    nodes.append(helper.make_node("Mul", ["q.unit", "factor"], ["q.scaled"], "q.scaled"))
    gates = ["decay", "beta"]
    if gate:
        nodes.append(
            helper.make_node("LinearAttentionGate", ["a", "bias", "rate", "b"], gates, "gate", domain=MICROSOFT)
        )
    else:
        nodes += [helper.make_node("Neg", ["a"], ["decay"], "neg"), helper.make_node("Abs", ["b"], ["beta"], "abs")]
    rule = {"q_num_heads": HEADS, "kv_num_heads": HEADS, "scale": 3.0}
    inputs = ["q.scaled", "k.unit", "v", "past", *gates]
    outputs = ["y", "present"]
    nodes.append(helper.make_node("LinearAttention", inputs, outputs, "heart", domain=MICROSOFT, **rule))
    shapes = {name: [1, tokens, WIDTH] for name in "qkv"} | {name: [1, tokens, HEADS] for name in "ab"}
    shapes["past"] = [1, HEADS, SIZE, SIZE]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    proto = helper.make_graph(
        nodes, "g", values, results, [numpy_helper.from_array(array, name) for name, array in weights.items()]
    )
    imports = [helper.make_opsetid("", 22), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(proto, opset_imports=imports)
    return SpecializedGraph(model, infer_types(model))


def joined(source: SpecializedGraph, target: Target = GPU) -> list[onnx.NodeProto]:
    before = source.proto.SerializeToString()
    result = join_gates(source, {"": 22, MICROSOFT: 1}, target, LoweringOptions()).proto.graph
    assert source.proto.SerializeToString() == before
    return list(result.node)


def test_all_of_it_is_one_node() -> None:
    (node,) = joined(graph())
    assert (node.op_type, node.name) == ("GatedLinearAttention", "heart")
    assert list(node.input) == ["q", "k", "v", "past", "a", "b", "bias", "rate"]
    assert list(node.output) == ["y", "present"]
    attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    assert (attributes["query_norm"], attributes["key_norm"], attributes["scale"]) == (1, 1, 1.5)


@pytest.mark.parametrize("changes", [{"axis": 2}, {"power": 1}], ids=str)
def test_another_norm_stays(changes: dict[str, int]) -> None:
    kinds = [node.op_type for node in joined(graph(**changes))]  # type: ignore[arg-type]
    assert kinds.count("LpNormalization") == 2
    assert kinds[-1] == "GatedLinearAttention"
    assert "Mul" in kinds  # which is part of the norm's kernel


def test_other_gates_stay() -> None:
    nodes = joined(graph(gate=False))
    assert [node.op_type for node in nodes] == ["Neg", "Abs", "GatedLinearAttention"]
    assert list(nodes[-1].input) == ["q", "k", "v", "past", "decay", "beta"]


def test_a_factor_of_zero_is_no_scale() -> None:
    """Which would mean the default one."""
    nodes = joined(graph(factor=0.0))
    assert "Mul" in [node.op_type for node in nodes]


@pytest.mark.parametrize("output", ["decay", "q.norm"])
def test_what_others_read_is_computed_for_them(output: str) -> None:
    source = graph()
    source.proto.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    nodes = joined(SpecializedGraph(source.proto, infer_types(source.proto)))
    assert nodes[-1].op_type == "GatedLinearAttention"
    assert any(output in node.output for node in nodes[:-1])


@pytest.mark.parametrize(
    ("tokens", "target"),
    [
        (2, GPU),
        (1, Target("cpu", vector_bits=256)),
        (1, Target("vulkan", is_gpu=True)),
        (1, Target("vulkan", is_gpu=True, subgroup_size=32, limits=Limits(bindings=9))),
    ],
    ids=str,
)
def test_left_alone(tokens: int, target: Target) -> None:
    assert [node.op_type for node in joined(graph(tokens), target)] == [
        node.op_type for node in graph().proto.graph.node
    ]
