"""Products of one value become one node, for few rows only, and never where a part is read elsewhere."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from linattn.dialect_patterns.op import LoweringOptions
from linattn.dialect_patterns.target import Limits, Target
from linattn.frontend.graph.join_products import join_products
from linattn.frontend.graph.schema import infer_types
from linattn.frontend.graph.specialize import SpecializedGraph
from onnx import TensorProto, helper, numpy_helper

GPU = Target("vulkan", is_gpu=True, subgroup_size=32)
CPU = Target("cpu", vector_bits=256)
DEPTH = 64


def graph(rows: int = 1, outputs: tuple[str, ...] = ("q", "k", "y")) -> SpecializedGraph:
    """q and k from x; y = silu(x gate) * (x up) of another value of the same size."""
    sizes = {"wq": 96, "wk": 40, "wgate": 48, "wup": 48}  # not so few columns that rows do not matter
    nodes = [
        helper.make_node("MatMul", ["x", "wq"], ["q"], "q"),
        helper.make_node("Neg", ["x"], ["z"], "neg"),
        helper.make_node("MatMul", ["z", "wup"], ["up"], "up"),
        helper.make_node("MatMul", ["z", "wgate"], ["gate"], "gate"),
        helper.make_node("Sigmoid", ["gate"], ["s"], "sigmoid"),
        helper.make_node("Mul", ["gate", "s"], ["silu"], "silu"),
        helper.make_node("Mul", ["silu", "up"], ["y"], "last"),
        helper.make_node("MatMul", ["x", "wk"], ["k"], "k"),
    ]
    weights = [numpy_helper.from_array(np.ones((DEPTH, n), np.float32), name) for name, n in sizes.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, rows, DEPTH])
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], results, weights))
    return SpecializedGraph(model, infer_types(model))


def joined(source: SpecializedGraph, target: Target = GPU) -> onnx.GraphProto:
    before = source.proto.SerializeToString()
    result = join_products(source, {"": 21}, target, LoweringOptions()).proto.graph
    assert source.proto.SerializeToString() == before
    return result


@pytest.mark.parametrize(("target", "rows"), [(GPU, 1), (GPU, 8), (CPU, 1), (CPU, 6)])
def test_products_of_one_value_and_a_gated_pair(target: Target, rows: int) -> None:
    nodes = joined(graph(rows), target).node
    assert [node.op_type for node in nodes] == ["JoinedMatMul", "Neg", "GatedMatMul"]
    assert (list(nodes[0].input), list(nodes[0].output)) == (["x", "wq", "wk"], ["q", "k"])
    assert (list(nodes[2].input), list(nodes[2].output)) == (["z", "wgate", "wup"], ["y"])


def test_one_that_cannot_does_not_keep_the_others_apart() -> None:
    """A product of an odd number of columns, which a GPU's kernel does not take, beside two that it takes."""
    source = graph()
    source.proto.graph.node.append(helper.make_node("MatMul", ["x", "odd"], ["o"], "odd"))
    source.proto.graph.initializer.append(numpy_helper.from_array(np.ones((DEPTH, 3), np.float32), "odd"))
    source.proto.graph.output.append(helper.make_tensor_value_info("o", TensorProto.FLOAT, None))
    nodes = joined(SpecializedGraph(source.proto, infer_types(source.proto))).node
    assert Counter(node.op_type for node in nodes)["MatMul"] == 1
    assert list(nodes[0].input) == ["x", "wq", "wk"]
    every = joined(SpecializedGraph(source.proto, infer_types(source.proto)), CPU).node
    assert list(every[0].input) == [
        "x",
        "wq",
        "wk",
        "odd",
    ]  # however small the weight is


def test_the_gate_is_read_elsewhere() -> None:
    for outputs in (("q", "k", "y", "gate"), ("q", "k", "y", "silu")):
        kinds = Counter(node.op_type for node in joined(graph(outputs=outputs)).node)
        assert (kinds["JoinedMatMul"], kinds["GatedMatMul"], kinds["Mul"]) == (2, 0, 2)


@pytest.mark.parametrize("part", ["gate", "up", "s", "silu"])
def test_another_node_reads_a_part(part: str) -> None:
    source = graph()
    source.proto.graph.node.append(helper.make_node("Neg", [part], ["other"], "other"))
    source.proto.graph.output.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, None))
    kinds = Counter(node.op_type for node in joined(SpecializedGraph(source.proto, infer_types(source.proto))).node)
    assert (kinds["JoinedMatMul"], kinds["GatedMatMul"], kinds["Mul"]) == (2, 0, 2)


def test_left_alone() -> None:
    for source, target in ((graph(rows=7), CPU), (graph(rows=9), GPU), (graph(), Target("cpu"))):
        assert Counter(node.op_type for node in joined(source, target).node)["MatMul"] == 4


@pytest.mark.parametrize(
    ("bindings", "sizes"),
    [(16, [5, 6, 6]), (17, [5, 6, 6]), (30, [5, 6, 6]), (5, [1, 2, 2, 2, 2, 2, 2, 2, 2])],
    ids=str,
)
def test_many_products_are_joined_in_groups_that_fit(bindings: int, sizes: list[int]) -> None:
    """Of `a`, a weight and a result each; groups of equal size share a kernel."""
    products = 17
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"], f"m{i}") for i in range(products)]
    weights = [numpy_helper.from_array(np.ones((DEPTH, 16), np.float32), f"w{i}") for i in range(products)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, DEPTH])
    results = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(products)]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], results, weights))
    target = Target("vulkan", is_gpu=True, subgroup_size=32, limits=Limits(bindings=bindings))
    found = joined(SpecializedGraph(model, infer_types(model)), target).node
    assert [name for node in found for name in node.output] == [f"y{i}" for i in range(products)]
    assert all(len(node.input) + len(node.output) <= bindings for node in found)
    assert [len(node.output) for node in found] == sizes
