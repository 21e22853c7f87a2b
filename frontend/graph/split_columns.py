"""Split along the last axis becomes a node of our own where the target has one kernel for all of its parts."""

from __future__ import annotations

import onnx
from linattn.dialect_patterns.node import FLOATS
from linattn.dialect_patterns.op import INTERNAL
from linattn.dialect_patterns.split_columns import SPLIT_COLUMNS, is_splittable
from linattn.dialect_patterns.target import Target

from .internal import import_internal
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
    model = onnx.ModelProto()
    model.CopyFrom(graph.proto)
    import_internal(model)
    for node in model.graph.node:
        if sizes := found.get(node.name):
            made = onnx.helper.make_node(
                SPLIT_COLUMNS, node.input[:1], node.output, node.name, domain=INTERNAL, sizes=sizes
            )
            node.CopyFrom(made)
    return SpecializedGraph(model, graph.types)


def _sizes(node: onnx.NodeProto, graph: SpecializedGraph, target: Target) -> list[int]:
    """Columns of each part of a node that is meant, else none."""
    if node.op_type != "Split" or domain_of(node) != "" or not all(node.output):
        return []
    x = spec_of_type(graph.types.get(node.input[0]))
    parts = [spec_of_type(graph.types.get(name)) for name in node.output]
    if x is None or x.dtype not in FLOATS or attributes_of(node).get("axis", 0) not in (-1, x.rank - 1):
        return []
    sizes = [part.shape[-1] or 0 for part in parts if part is not None and part.rank == x.rank]
    return sizes if len(sizes) == len(parts) and is_splittable(x, sizes, target) else []
