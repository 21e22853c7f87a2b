"""A value times sigmoid or silu of a gate becomes one node, for prompts on CPUs, that reads the gate where it lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
from linattn.dialect_patterns.gated_columns import GATED_COLUMNS, can_gate
from linattn.dialect_patterns.node import FLOATS
from linattn.dialect_patterns.op import INTERNAL
from linattn.dialect_patterns.target import Target

from .drop_unused import drop_unused
from .places import Places
from .schema import domain_of
from .specialize import SpecializedGraph


def gate_columns(graph: SpecializedGraph, target: Target) -> SpecializedGraph:
    """The graph with such nodes.

    Args:
        graph: An entry point's graph, whose products are joined; not changed.
        target: The machine; on one without such a kernel nothing changes.
    """
    if target.is_gpu:
        return graph
    model = graph.copied()
    finder = _Finder(model.graph, graph.types)
    for node in model.graph.node:
        found = finder.gated(node)
        spec = None if found is None else finder.places.spec(found.x)
        if found is None or spec is None or spec.rank != 3 or spec.dtype not in FLOATS:
            continue
        heads, size = finder.heads(found.gate)
        place = finder.places.columns(found.gate, found.x, heads, size)
        if place is None or not can_gate(spec, size, target):
            continue
        source, start, stride = place
        made = onnx.helper.make_node(
            GATED_COLUMNS, [found.x, source], list(node.output), node.name, domain=INTERNAL,
            size=size, start=start, stride=stride, multiplies=int(found.multiplies),
        )  # fmt: skip
        node.CopyFrom(made)
    drop_unused(model.graph)
    return SpecializedGraph(model, graph.types)


@dataclass(frozen=True)
class _Gated:
    """What a product is of: a value, and the sigmoid of a gate, times the gate where that ``multiplies``."""

    x: str
    gate: str
    multiplies: bool


class _Finder:
    """Looks for such products."""

    def __init__(self, graph: onnx.GraphProto, types: Mapping[str, onnx.TypeProto]) -> None:
        self.places = Places(graph, types)
        self._kept = {value.name for value in graph.output}
        self._readers: dict[str, int] = {}
        for name in (name for node in graph.node for name in node.input):
            self._readers[name] = self._readers.get(name, 0) + 1

    def gated(self, node: onnx.NodeProto) -> _Gated | None:
        """A node as such a product, if nothing else reads what it is of but the gate and the value."""
        if node.op_type != "Mul" or domain_of(node) != "":
            return None
        for x, factor in (node.input, reversed(node.input)):
            gate, silu = self._sigmoid_of(factor), self._silu_of(factor)
            if silu or gate:
                found = _Gated(x, silu or gate, bool(silu))
                same = self.places.spec(found.x) == self.places.spec(found.gate)
                if same and not (x == gate and not silu):  # gate * sigmoid(gate) by itself
                    return found
        return None

    def heads(self, gate: str) -> tuple[int, int]:
        """Into how many runs of columns the gate is cut, and of how many, where it came from."""
        spec, part = self.places.spec(gate), self.places.spec(self.places.reshaped(gate))
        assert spec is not None
        if part is not None and part.rank == 4 and part.shape[:2] == spec.shape[:2]:
            return part.shape[2] or 0, part.shape[3] or 0
        return 1, spec.shape[-1] or 0

    def _alone(self, name: str) -> bool:
        return self._readers.get(name) == 1 and name not in self._kept

    def _sigmoid_of(self, name: str) -> str:
        """What a value is the sigmoid of, if it is read once."""
        node = self.places.maker(name)
        is_one = node is not None and node.op_type == "Sigmoid" and domain_of(node) == "" and self._alone(name)
        return node.input[0] if node is not None and is_one else ""

    def _silu_of(self, name: str) -> str:
        """What a value is silu of, if it is read once."""
        node = self.places.maker(name)
        if node is None or node.op_type != "Mul" or domain_of(node) != "" or not self._alone(name):
            return ""
        for gate, factor in (node.input, reversed(node.input)):
            if self._sigmoid_of(factor) == gate:
                return gate
        return ""
