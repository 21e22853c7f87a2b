"""A norm goes into the products that read it: of one row on GPUs, and only where nothing else reads it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from linattn.dialect_patterns.op import MICROSOFT, LoweringOptions
from linattn.dialect_patterns.target import Limits, Target
from linattn.frontend.graph.join_norms import join_norms
from linattn.frontend.graph.join_products import join_products
from linattn.frontend.graph.schema import infer_types
from linattn.frontend.graph.specialize import SpecializedGraph
from onnx import TensorProto, helper, numpy_helper

GPU = Target("vulkan", is_gpu=True, subgroup_size=32)
DEPTH = 64
SKIP = ("SkipSimplifiedLayerNormalization", MICROSOFT)
PLAIN = [("SimplifiedLayerNormalization", ""), ("RMSNormalization", "")]


def graph(
    kind: tuple[str, str] = SKIP,
    products: int = 2,
    rows: int = 1,
    outputs: tuple[str, ...] = ("y0", "sum"),
    **more: Any,
) -> SpecializedGraph:
    """A norm, and products of it."""
    skips, bias = kind == SKIP, more.pop("bias", False)
    given = ["x", "skip", "gamma", *(["bias"] if bias else [])] if skips else ["x", "gamma"]
    made = ["norm", "", "", "sum"] if skips else ["norm"]
    nodes = [helper.make_node(kind[0], given, made, "norm", domain=kind[1], epsilon=0.5, **more)]
    nodes += [helper.make_node("MatMul", ["norm", f"w{i}"], [f"y{i}"], f"product{i}") for i in range(products)]
    weights = {f"w{i}": np.ones((DEPTH, 16), np.float32) for i in range(products)}
    weights |= {"gamma": np.ones(DEPTH, np.float32), "bias": np.ones(DEPTH, np.float32)}
    lists = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, rows, DEPTH]) for name in ("x", "skip")]
    wanted = [f"y{i}" for i in range(products)] + [
        name for name in outputs if name != "y0" and (skips or name != "sum")
    ]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in wanted]
    imports = [helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", values, results, lists), opset_imports=imports)
    return SpecializedGraph(model, infer_types(model))


def joined(source: SpecializedGraph, target: Target = GPU) -> list[onnx.NodeProto]:
    versions = {"": 23, MICROSOFT: 1}
    between = join_products(source, versions, target, LoweringOptions())
    before = between.proto.SerializeToString()
    result = join_norms(between, versions, target, LoweringOptions()).proto.graph
    assert between.proto.SerializeToString() == before
    return list(result.node)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {one.name: helper.get_attribute_value(one) for one in node.attribute}


def test_a_residual_its_norm_and_two_products() -> None:
    (node,) = joined(graph())
    assert (node.op_type, list(node.input)) == ("NormedMatMul", ["x", "gamma", "skip", "w0", "w1"])
    assert list(node.output) == ["y0", "y1", "sum"]
    assert attributes(node) == {"epsilon": 0.5, "gated": 0, "with_skip": 1, "with_sum": 1}


def test_the_sum_is_not_wanted() -> None:
    (node,) = joined(graph(outputs=("y0",), products=1))
    assert list(node.output) == ["y0"]
    assert attributes(node)["with_sum"] == 0


@pytest.mark.parametrize("kind", PLAIN, ids=str)
def test_a_norm_without_a_residual(kind: tuple[str, str]) -> None:
    (node,) = joined(graph(kind, products=1))
    assert (node.op_type, list(node.input), list(node.output)) == ("NormedMatMul", ["x", "gamma", "w0"], ["y0"])


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (graph(rows=2), GPU),
        (graph(), Target("cpu", vector_bits=256)),
        (graph(), Target("vulkan", is_gpu=True)),
        (graph(), Target("vulkan", is_gpu=True, subgroup_size=32, limits=Limits(bindings=7))),
        (graph(outputs=("y0", "norm")), GPU),  # somebody else reads it
        (graph(products=20), GPU),  # which are several kernels
        (graph(bias=True), GPU),
        (graph(PLAIN[1], axis=1), GPU),
    ],
    ids=lambda value: value.name if isinstance(value, Target) else "",
)
def test_left_alone(source: SpecializedGraph, target: Target) -> None:
    nodes = joined(source, target)
    assert nodes[0].op_type == source.proto.graph.node[0].op_type
    assert "NormedMatMul" not in [node.op_type for node in nodes]


def after_heads(outputs: tuple[str, ...] = ("y",), heads: int = 4, size: int = 128) -> SpecializedGraph:
    """What follows LinearAttention: a gated norm by heads and a product."""
    nodes = [
        helper.make_node("GatedRMSNorm", ["x", "scale", "z"], ["norm"], "norm", domain=MICROSOFT, epsilon=0.5),
        helper.make_node("MatMul", ["norm", "w"], ["y"], "out"),
    ]
    lists = [numpy_helper.from_array(np.ones(size, np.float32), "scale")]
    lists.append(numpy_helper.from_array(np.ones((heads * size, 64), np.float32), "w"))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, heads * size]) for name in "xz"]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    imports = [helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", values, results, lists), opset_imports=imports)
    return SpecializedGraph(model, infer_types(model))


def test_a_gated_norm_by_heads() -> None:
    (node,) = joined(after_heads())
    assert (node.op_type, list(node.input), list(node.output)) == ("HeadNormedMatMul", ["x", "scale", "z", "w"], ["y"])
    assert attributes(node) == {"epsilon": 0.5, "multiplies_gate": 1}


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (after_heads(("y", "norm")), GPU),
        (after_heads(heads=16, size=12), GPU),  # no power of two
        (after_heads(heads=64, size=4), GPU),  # several heads a subgroup
        (after_heads(), Target("vulkan", is_gpu=True)),
        (after_heads(), Target("cpu", vector_bits=256)),
    ],
    ids=lambda value: value.name if isinstance(value, Target) else "",
)
def test_a_gated_norm_is_left_alone(source: SpecializedGraph, target: Target) -> None:
    assert [node.op_type for node in joined(source, target)] == ["GatedRMSNorm", "MatMul"]


@pytest.mark.parametrize(("columns", "made"), [(16_384, "NormedMatMul"), (16_388, "MatMul")])
def test_the_logits_of_a_large_vocabulary_leave_their_norm_alone(columns: int, made: str) -> None:
    source = graph(PLAIN[0], products=1)
    (weight,) = [tensor for tensor in source.proto.graph.initializer if tensor.name == "w0"]
    weight.CopyFrom(numpy_helper.from_array(np.ones((DEPTH, columns), np.float32), "w0"))
    assert joined(SpecializedGraph(source.proto, infer_types(source.proto)))[-1].op_type == made
