"""Nodes and initializers that no output needs go."""

from __future__ import annotations

import onnx


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove, in place, what no output of the graph depends on."""
    wanted = {v.name for v in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    initializers = [t for t in graph.initializer if t.name in wanted]
    del graph.initializer[:]
    graph.initializer.extend(initializers)
