"""Who reads a value of a graph."""

from __future__ import annotations

from collections import defaultdict

import onnx

from ..schema import domain_of


class Readers:
    """Who reads a value of a graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._nodes: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        inner = (read_by(node) - set(node.input) for node in graph.node if node.attribute)
        self._outside = {v.name for v in graph.output}.union(*inner)
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                self._nodes[name].append(node)

    def of(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that read it."""
        return self._nodes[name]

    def only(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that read its elements, none if it leaves the graph as well."""
        if not name or name in self._outside:
            return []
        return [node for node in self._nodes[name] if node.op_type != "CastLike" or node.input[0] == name]


def is_cast(node: onnx.NodeProto) -> bool:
    """Whether a node gives its first input in another type."""
    return node.op_type in ("Cast", "CastLike") and domain_of(node) == ""


def names_in(body: onnx.GraphProto) -> set[str]:
    """All values that a body reads or gives, and those of the graph around it that its own bodies read."""
    found = {v.name for v in body.output}
    for node in body.node:
        found |= read_by(node)
    return found


def read_by(node: onnx.NodeProto) -> set[str]:
    """All values that a node reads, those that its bodies read from around them too."""
    found = set(node.input)
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            own = {v.name for v in body.input} | {t.name for t in body.initializer}
            found |= names_in(body) - own.union(*(inner.output for inner in body.node))
    return found
