"""Weights that a model transposes are stored the other way round: products read all weights as [K, N], and once.

    MatMul(x, Transpose(w))                 ->  MatMul(x, w')            w' = w transposed, here and not when it runs
    Gather(w, ids)             beside that  ->  GatherColumns(w', ids)   a table that is the head too (mobius)
    Gather(Transpose(w), ids)  beside MatMul(x, w)  ->  GatherColumns(w, ids)                         (genai)

A product with a computed matrix is slow: it is neither packed nor joined, and has no form for the last position. A
table that is looked up in its own order would be a second copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from linattn.dialect_patterns.gather_columns.op import GATHER_COLUMNS
from linattn.dialect_patterns.op import INTERNAL
from onnx import numpy_helper

from ..model import LoadedModel
from .drop_unused import drop_unused
from .internal import import_internal
from .names import Names
from .schema import attributes_of, domain_of, is_weight


def transpose_weights(model: LoadedModel) -> None:
    """Change the model's graph, in place."""
    graph = model.proto.graph
    weights = {tensor.name: tensor for tensor in graph.initializer if is_weight(tensor) and len(tensor.dims) == 2}
    transposed = {node.output[0]: node.input[0] for node in graph.node if _is_transpose(node, weights)}
    if not transposed:
        return
    matrices = dict.fromkeys(name for node in graph.node for name in _matrix(node))  # in the order of the graph
    names = Names(graph)
    turned: dict[str, str] = {}
    for source in dict.fromkeys(transposed[name] for name in matrices if name in transposed):
        if source not in matrices:  # else products read it both ways round
            turned[source] = _add_transposed(model, weights[source], names)
    for node in graph.node:
        if node.op_type == "MatMul" and domain_of(node) == "" and transposed.get(node.input[1]) in turned:
            node.input[1] = turned[transposed[node.input[1]]]
        elif _is_lookup(node):
            source = transposed.get(node.input[0])
            if source in matrices:
                _look_up_columns(node, source)
            elif node.input[0] in turned:
                _look_up_columns(node, turned[node.input[0]])
    if any(domain_of(node) == INTERNAL for node in graph.node):
        import_internal(model.proto)
    drop_unused(graph)


def _is_transpose(node: onnx.NodeProto, weights: dict[str, onnx.TensorProto]) -> bool:
    """Whether it transposes a matrix of weights."""
    is_transpose = node.op_type == "Transpose" and domain_of(node) == ""
    return is_transpose and node.input[0] in weights and attributes_of(node).get("perm", [1, 0]) == [1, 0]


def _matrix(node: onnx.NodeProto) -> Sequence[str]:
    """The right operand of a product."""
    return [node.input[1]] if node.op_type == "MatMul" and domain_of(node) == "" else []


def _is_lookup(node: onnx.NodeProto) -> bool:
    return node.op_type == "Gather" and domain_of(node) == "" and attributes_of(node).get("axis", 0) in (0, -2)


def _look_up_columns(node: onnx.NodeProto, weight: str) -> None:
    node.op_type, node.domain, node.input[0] = GATHER_COLUMNS, INTERNAL, weight
    del node.attribute[:]


def _add_transposed(model: LoadedModel, tensor: onnx.TensorProto, names: Names) -> str:
    """The name of a new weight, which is a view of the file where the old one lies in one."""
    graph = model.proto.graph
    name = names.new(f"{tensor.name}.transposed")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        model.weights[name] = model.weights[tensor.name].T
        model.derived.add(name)
        graph.initializer.add(
            name=name, data_type=tensor.data_type, dims=tensor.dims[::-1], data_location=onnx.TensorProto.EXTERNAL
        )
    else:
        array = np.ascontiguousarray(numpy_helper.to_array(tensor).T)
        graph.initializer.append(numpy_helper.from_array(array, name))
    return name
