"""Graphs that were exported for one token a call: they drop the axis of the tokens, which a prompt cannot."""

from __future__ import annotations

from .constants import constant_ints
from .schema import domain_of, spec_of_type
from .specialize import SpecializedGraph


def squeezes_tokens(graph: SpecializedGraph) -> str | None:
    """A node that drops an axis of more than one element, as reports name it; None where there is none.

    Args:
        graph: The graph of an entry point for more than one token.
    """
    for node in graph.proto.graph.node:
        if node.op_type != "Squeeze" or domain_of(node) != "" or len(node.input) < 2:
            continue
        spec, axes = spec_of_type(graph.types.get(node.input[0])), constant_ints(graph.proto.graph, node.input[1])
        if spec is None or axes is None:
            continue
        sizes = [spec.shape[axis] for axis in axes if -spec.rank <= axis < spec.rank]
        if any(size is not None and size != 1 for size in sizes):
            return f"node '{node.name}'"
    return None
