"""Constants of a graph: Constant nodes become initializers, and passes read the small ones."""

from __future__ import annotations

import onnx
from onnx import numpy_helper

from .evaluate import evaluate_node
from .schema import domain_of


def constant_ints(graph: onnx.GraphProto, name: str) -> list[int] | None:
    """The values of a constant such as axes or sizes; None if it is computed or outside the graph."""
    tensor = next((t for t in graph.initializer if t.name == name), None)
    if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL:
        return None
    return [int(value) for value in numpy_helper.to_array(tensor).reshape(-1)]


def constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Replace the graph's Constant nodes by initializers, in place."""
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Constant" and domain_of(node) == "":
            (value,) = evaluate_node(node, [])
            graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
