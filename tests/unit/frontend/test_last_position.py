"""The variant of an entry point whose last product sees the last position only."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from linattn.frontend.graph import last_position
from linattn.frontend.graph.last_position import keep_last
from linattn.frontend.graph.schema import infer_types
from linattn.frontend.graph.specialize import SpecializedGraph
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

TOKENS = 5


@pytest.fixture(autouse=True)
def small_products_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_position, "LEAST_BYTES", 1)


def graph_of(nodes: list[onnx.NodeProto], outputs: tuple[str, ...] = ("logits",)) -> SpecializedGraph:
    """x [1, T, 3] to ``outputs``; w [3, 7], s a scalar, row [7], table [T, 7]."""
    random = np.random.default_rng(0)
    shapes = {"w": (3, 7), "s": (), "row": (7,), "table": (TOKENS, 7)}
    weights = [
        numpy_helper.from_array(np.asarray(random.random(shape), np.float32), name) for name, shape in shapes.items()
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, TOKENS, 3])
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    for i, node in enumerate(nodes):
        node.name = f"n{i}"
    graph = helper.make_graph(nodes, "g", [x], results, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return SpecializedGraph(model, infer_types(model))


def product(source: str = "x", result: str = "logits") -> onnx.NodeProto:
    return helper.make_node("MatMul", [source, "w"], [result])


KEPT = [
    [product()],
    [helper.make_node("Relu", ["x"], ["y"]), product("y")],
    [product(result="a"), helper.make_node("Add", ["a", "row"], ["logits"])],
    [
        product(result="a"),
        helper.make_node("Div", ["a", "s"], ["b"]),
        helper.make_node("Tanh", ["b"], ["c"]),
        helper.make_node("Mul", ["c", "s"], ["logits"]),
    ],
]


@pytest.mark.parametrize("nodes", KEPT)
def test_last_position(nodes: list[onnx.NodeProto]) -> None:
    whole = graph_of(nodes)
    before = whole.proto.SerializeToString()
    short = keep_last(whole, "logits", TOKENS)
    assert short is not None
    assert whole.proto.SerializeToString() == before
    feeds = {"x": np.random.default_rng(1).random((1, TOKENS, 3)).astype(np.float32)}
    (want,) = ReferenceEvaluator(whole.proto).run(None, feeds)
    (got,) = ReferenceEvaluator(short.proto).run(None, feeds)
    np.testing.assert_allclose(got, want[:, -1:], rtol=1e-6)
    assert [d.dim_value for d in short.types["logits"].tensor_type.shape.dim] == [1, 1, 7]
    assert sum(node.op_type == "Slice" for node in short.proto.graph.node) == 1


LEFT = [
    [helper.make_node("Relu", ["x"], ["logits"])],  # no product at its end
    [product(result="a"), helper.make_node("Add", ["a", "table"], ["logits"])],  # differs by position
    [product(result="a"), helper.make_node("Softmax", ["a"], ["logits"], axis=1)],  # mixes positions
    [product(result="a"), helper.make_node("Identity", ["a"], ["logits"]), helper.make_node("Abs", ["a"], ["other"])],
]


@pytest.mark.parametrize("nodes", LEFT)
def test_left_as_it_is(nodes: list[onnx.NodeProto]) -> None:
    outputs = ("logits", "other") if any("other" in node.output for node in nodes) else ("logits",)
    assert keep_last(graph_of(nodes, outputs), "logits", TOKENS) is None


def test_a_small_product_is_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_position, "LEAST_BYTES", 3 * 7 * 4 + 1)
    assert keep_last(graph_of([product()]), "logits", TOKENS) is None
    monkeypatch.setattr(last_position, "LEAST_BYTES", 3 * 7 * 4)
    assert keep_last(graph_of([product()]), "logits", TOKENS) is not None
