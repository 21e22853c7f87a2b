"""Weights that a model transposes become weights the other way round, and tables beside them are read as columns."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from linattn.frontend.graph.last_position import keep_last
from linattn.frontend.graph.schema import infer_types
from linattn.frontend.graph.specialize import SpecializedGraph
from linattn.frontend.graph.transpose_weights import transpose_weights
from linattn.frontend.model import LoadedModel
from onnx import TensorProto, helper, numpy_helper

TABLE = np.arange(40 * 16, dtype=np.float32).reshape(40, 16)
GATHER = helper.make_node("Gather", ["w", "ids"], ["e"], "look up")
TURN = helper.make_node("Transpose", ["w"], ["t"], "turn", perm=[1, 0])


def turned(*nodes: onnx.NodeProto, table: np.ndarray = TABLE, outputs: tuple[str, ...] = ("y",)) -> LoadedModel:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("ids", TensorProto.INT64, [1, 2]), value("x", TensorProto.FLOAT, [1, 2, 16])],
        [value(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(table, "w")],
    )
    model = LoadedModel(None, helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    transpose_weights(model)
    return model


def read(model: LoadedModel) -> list[tuple[str, list[str]]]:
    return [(node.op_type, list(node.input)) for node in model.proto.graph.node]


def test_product_with_a_transposed_weight() -> None:
    model = turned(TURN, helper.make_node("MatMul", ["x", "t"], ["y"], "head"))
    assert read(model) == [("MatMul", ["x", "w.transposed"])]
    (weight,) = model.proto.graph.initializer
    assert np.array_equal(numpy_helper.to_array(weight), TABLE.T)


def test_table_that_is_the_transposed_weight() -> None:
    model = turned(GATHER, TURN, helper.make_node("MatMul", ["e", "t"], ["y"], "head"))
    assert read(model) == [("GatherColumns", ["w.transposed", "ids"]), ("MatMul", ["e", "w.transposed"])]
    assert len(model.proto.graph.initializer) == 1


def test_transposed_weight_that_is_the_table() -> None:
    look_up = helper.make_node("Gather", ["t", "ids"], ["e"], "look up")
    model = turned(TURN, look_up, helper.make_node("MatMul", ["e", "w"], ["y"], "head"), table=TABLE.T.copy())
    assert read(model) == [("GatherColumns", ["w", "ids"]), ("MatMul", ["e", "w"])]


@pytest.mark.parametrize(
    "nodes",
    [
        (GATHER, TURN, helper.make_node("Add", ["t", "t"], ["y"], "add")),  # no product
        (helper.make_node("Transpose", ["x"], ["t"]), helper.make_node("MatMul", ["x", "t"], ["y"], "computed")),
        (TURN, helper.make_node("Gather", ["t", "ids"], ["e"]), helper.make_node("Neg", ["e"], ["y"])),  # no product
    ],
)
def test_left_alone(nodes: tuple[onnx.NodeProto, ...]) -> None:
    model = turned(*nodes, outputs=("y", "e") if "e" in [name for node in nodes for name in node.output] else ("y",))
    assert read(model) == [(node.op_type, list(node.input)) for node in nodes]


def test_another_axis_keeps_the_table() -> None:
    """Columns of the table are rows of what products read: a Gather of the table as it is."""
    look_up = helper.make_node("Gather", ["w", "ids"], ["e"], "look up", axis=1)
    model = turned(look_up, TURN, helper.make_node("MatMul", ["x", "t"], ["y"], "head"), outputs=("y", "e"))
    assert read(model) == [("Gather", ["w", "ids"]), ("MatMul", ["x", "w.transposed"])]


def test_a_weight_in_a_file_is_not_copied() -> None:
    model = LoadedModel(None, turned(GATHER, outputs=("e",)).proto, {"w": TABLE})
    graph = model.proto.graph
    graph.initializer[0].ClearField("raw_data")
    graph.initializer[0].data_location = TensorProto.EXTERNAL
    graph.node.extend([TURN, helper.make_node("MatMul", ["e", "t"], ["y"], "head")])
    graph.output.add(name="y")
    before = model.sha256
    transpose_weights(model)
    assert np.shares_memory(model.weights["w.transposed"], TABLE)
    assert model.sha256 == LoadedModel(None, model.proto, {"w": TABLE}).sha256 == before


def test_the_head_has_its_last_position_form() -> None:
    table = np.zeros((1 << 14, 16), np.float32)
    model = turned(TURN, helper.make_node("MatMul", ["x", "t"], ["y"], "head"), table=table)
    short = keep_last(SpecializedGraph(model.proto, infer_types(model.proto)), "y", 2)
    assert short is not None
    assert [node.op_type for node in short.proto.graph.node] == ["Slice", "MatMul"]
