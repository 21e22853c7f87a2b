"""Prefill without the logits nobody asks for: the product with the vocabulary for the last position only.

Whoever generates needs the last position's logits. The others cost a fourth of a prompt of a small model, so that every
larger block gets a second function, in which the rows are cut off before the last product. Its kernels are those of the
first, but for that product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from .schema import domain_of, spec_of_type
from .specialize import SpecializedGraph

LEAST_TOKENS = 16
"""Blocks of fewer tokens wait for the weights of the last product anyway."""

LEAST_BYTES = 1 << 20
"""A smaller product takes less time than its function takes to compile."""

_PRODUCTS = ("MatMul", "MatMulNBits")
_BY_ROW = (*_PRODUCTS, "Cast", "Identity", "Tanh", "Mul", "Div", "Add", "Sub")
"""Operators that treat each position by itself, where all inputs but the first are weights or scalars."""


def keep_last(graph: SpecializedGraph, output: str, tokens: int) -> SpecializedGraph | None:
    """The graph with one position in an output instead of all.

    Args:
        graph: An entry point's graph; not changed.
        output: The output with the logits, [B, T, V].
        tokens: T.

    Returns:
        The graph, or None where the output is not the end of a product with weights, or that is small.
    """
    model = graph.copied()
    chain = _chain(model.graph, output)
    weights = {name for node in chain if node.op_type in _PRODUCTS for name in node.input[1:]}
    if sum(_bytes(graph.types[name]) for name in weights if name) < LEAST_BYTES:
        return None
    source = chain[-1].input[0]
    names = [source, *(node.output[0] for node in chain)]
    specs = [spec_of_type(graph.types.get(name)) for name in names]
    if any(spec is None or spec.rank != 3 or spec.shape[1] != tokens for spec in specs):
        return None
    types = dict(graph.types)
    last = f"{source}.last"
    bounds = [(f"{last}.{word}", value) for word, value in (("from", tokens - 1), ("to", tokens), ("axis", 1))]
    for name, value in bounds:
        array = np.array([value], np.int64)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
        types[name] = onnx.helper.make_tensor_type_proto(onnx.TensorProto.INT64, [1])
    cut = onnx.helper.make_node("Slice", [source, *(name for name, _ in bounds)], [last], f"{chain[-1].name}.last")
    position = next(i for i, node in enumerate(model.graph.node) if node.name == chain[-1].name)
    model.graph.node.insert(position, cut)
    chain[-1].input[0] = last
    for name in (last, *names[1:]):
        proto = onnx.TypeProto()
        proto.CopyFrom(graph.types[source if name == last else name])
        proto.tensor_type.shape.dim[1].dim_value = 1
        types[name] = proto
    return SpecializedGraph(model, types)


def _bytes(proto: onnx.TypeProto) -> int:
    spec = spec_of_type(proto)
    assert spec is not None
    item = onnx.helper.tensor_dtype_to_np_dtype(proto.tensor_type.elem_type).itemsize
    return math.prod(size or 0 for size in spec.shape) * item


def _chain(graph: onnx.GraphProto, output: str) -> Sequence[onnx.NodeProto]:
    """The nodes that end in an output and treat each position by itself, the last one first."""
    producers = {name: node for node in graph.node for name in node.output}
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    readers: dict[str, int] = {}
    for name in (*(name for node in graph.node for name in node.input), *(value.name for value in graph.output)):
        readers[name] = readers.get(name, 0) + 1
    chain: list[onnx.NodeProto] = []
    name = output
    while (node := producers.get(name)) is not None and readers[name] == 1 and _is_by_row(node, ranks):
        chain.append(node)
        name = node.input[0]
    return chain


def _is_by_row(node: onnx.NodeProto, ranks: Mapping[str, int]) -> bool:
    """Whether its other inputs are weights, for elementwise operators such that are the same at each position."""
    if node.op_type not in _BY_ROW or domain_of(node) not in ("", "com.microsoft"):
        return False
    others = [name for name in node.input[1:] if name]
    return all(name in ranks and (node.op_type in _PRODUCTS or ranks[name] <= 1) for name in others)
