"""Split along the last axis becomes a node of our own where the target has one kernel for all of its parts.

Parts that only their heads' Euclidean norm is read of (and a factor) are divided by it there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
from linattn.dialect_patterns.node import FLOATS
from linattn.dialect_patterns.op import INTERNAL
from linattn.dialect_patterns.split_columns import SPLIT_COLUMNS, can_divide, is_splittable
from linattn.dialect_patterns.target import Target

from .schema import attributes_of, domain_of, spec_of_type
from .specialize import SpecializedGraph


def split_columns(graph: SpecializedGraph, target: Target) -> SpecializedGraph:
    """The graph with such nodes.

    Args:
        graph: An entry point's graph; not changed.
        target: The machine; on one without such kernels nothing changes.
    """
    found = {node.name: sizes for node in graph.proto.graph.node if (sizes := _sizes(node, graph, target))}
    if not found:
        return graph
    model = graph.copied()
    chains = Chains(model.graph, graph.types)
    gone: set[str] = set()
    for node in model.graph.node:
        if sizes := found.get(node.name):
            x, norms = spec_of_type(graph.types[node.input[0]]), [chains.norm(name) for name in node.output]
            heads = [norm.head if norm is not None else 0 for norm in norms]
            if x is None or not any(heads) or not can_divide(x, sizes, heads, target):
                norms, heads = [None] * len(norms), [0] * len(norms)
            outputs = [name if norm is None else norm.result for name, norm in zip(node.output, norms, strict=True)]
            factors = [1.0 if norm is None else norm.factor for norm in norms]
            gone.update(name for norm in norms if norm is not None for name in norm.nodes)
            made = onnx.helper.make_node(
                SPLIT_COLUMNS, node.input[:1], outputs, node.name, domain=INTERNAL, sizes=sizes, heads=heads,
                factors=factors,
            )  # fmt: skip
            node.CopyFrom(made)
    kept = [node for node in model.graph.node if node.name not in gone]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return SpecializedGraph(model, graph.types)


@dataclass(frozen=True)
class PartNorm:
    """What becomes of a part of a value.

    Attributes:
        head: Columns that are divided by their norm together.
        factor: What they are multiplied by then.
        result: Name of the value.
        nodes: Names of the nodes that make it.
    """

    head: int
    factor: float
    result: str
    nodes: tuple[str, ...]


class Chains:
    """Finds the nodes behind a value.

    Args:
        graph: The graph.
        types: Types of its values.
    """

    def __init__(self, graph: onnx.GraphProto, types: Mapping[str, onnx.TypeProto]) -> None:
        self._types, self._outputs = types, {value.name for value in graph.output}
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def norm(self, name: str) -> PartNorm | None:
        """The norm that is all that is read of a part, if it is one of its heads."""
        apart = self.reader(name, "Reshape")
        norm = None if apart is None else self.reader(apart.output[0], "LpNormalization")
        flat = None if norm is None else self.reader(norm.output[0], "Reshape")
        if apart is None or norm is None or flat is None:
            return None
        shape, given = spec_of_type(self._types.get(apart.output[0])), attributes_of(norm)
        same = spec_of_type(self._types.get(name)) == spec_of_type(self._types.get(flat.output[0]))
        if shape is None or given.get("axis", -1) not in (-1, shape.rank - 1) or given.get("p", 2) != 2 or not same:
            return None
        nodes, result, factor = [apart, norm, flat], flat.output[0], 1.0
        times = self.reader(result, "Mul")
        for other in () if times is None else times.input:
            tensor = self._constants.get(other)
            if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL or len(tensor.dims) > shape.rank - 1:
                continue
            values = onnx.numpy_helper.to_array(tensor)
            if values.size == 1:
                factor = float(values.item())
        if times is not None and factor != 1.0:
            nodes, result = [*nodes, times], times.output[0]
        return PartNorm(shape.shape[-1] or 0, factor, result, tuple(node.name for node in nodes))

    def reader(self, name: str, op_type: str) -> onnx.NodeProto | None:
        """The only node that reads a value, if it is of that kind."""
        readers = self._readers.get(name, [])
        if len(readers) != 1 or name in self._outputs or readers[0].op_type != op_type or domain_of(readers[0]) != "":
            return None
        return readers[0]


def _sizes(node: onnx.NodeProto, graph: SpecializedGraph, target: Target) -> list[int]:
    """Columns of each part of a node that is meant, else none."""
    x, sizes = spec_of_type(graph.types.get(node.input[0])), columns_of(node, graph.types)
    return sizes if x is not None and sizes and is_splittable(x, sizes, target) else []


def columns_of(node: onnx.NodeProto, types: Mapping[str, onnx.TypeProto]) -> list[int]:
    """Columns of each part of a Split of floats along the last axis; none of another node.

    Args:
        node: Any node.
        types: Types of the graph's values.
    """
    if node.op_type != "Split" or domain_of(node) != "" or not all(node.output):
        return []
    x = spec_of_type(types.get(node.input[0]))
    parts = [spec_of_type(types.get(name)) for name in node.output]
    if x is None or x.dtype not in FLOATS or attributes_of(node).get("axis", 0) not in (-1, x.rank - 1):
        return []
    sizes = [part.shape[-1] or 0 for part in parts if part is not None and part.rank == x.rank]
    return sizes if len(sizes) == len(parts) else []
