"""Which values of an integer graph input are legal: those that point into every table it is an index of.

The graph is read from its end: an operator that looks something up bounds its index by the size of its table
(``index_tables``); operators that only move elements (Reshape, Concat, ...) or add a constant hand the bounds of their
result on to their operand. What is found holds for every element of an input, so that nothing legal is refused: an
input of which only a part is an index, or whose elements are combined in another way first, has no bounds. The kernels
clamp what comes of those (``linattn.dialect_patterns.guarded_reads``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from .index_tables import Interval, Shapes, lookups, operand, whole
from .schema import domain_of
from .specialize import SpecializedGraph

_MOVES = frozenset({"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Tile"})
"""Operators whose result has every element of their first operand, and no others."""


def index_bounds(graphs: Sequence[SpecializedGraph], names: Collection[str]) -> dict[str, Interval]:
    """The bounds of graph inputs, as far as they have any.

    Args:
        graphs: The entry points' graphs. Where a table's size is another in each, the widest bounds count.
        names: Graph inputs.
    """
    found = [_Bounds(graph).of_inputs() for graph in graphs]
    result: dict[str, Interval] = {}
    for name in names:
        known = [bounds[name] for bounds in found if name in bounds]
        if known and len(known) == len(graphs):
            result[name] = _hull(known)
    return result


@dataclass
class _Legal:
    """What is known of one value.

    Attributes:
        whole: Bounds of all elements.
        parts: Axis -> index on it -> bounds of the elements there.
    """

    whole: Interval | None = None
    parts: dict[int, dict[int, Interval]] = field(default_factory=dict[int, dict[int, Interval]])

    def bounds(self, shape: Sequence[int | None]) -> Interval | None:
        """The bounds that every element has to keep, whichever part it is in."""
        result = self.whole
        for axis, found in self.parts.items():
            if len(found) == shape[axis]:
                result = _meet(result, _hull(list(found.values())))
        return result


class _Bounds:
    """Bounds of the values of one graph, found from its end to its inputs."""

    def __init__(self, graph: SpecializedGraph) -> None:
        self._graph = graph.proto.graph
        self._shapes = Shapes(graph.types)
        self._legal: dict[str, _Legal] = {}
        self._constants: Mapping[str, onnx.TensorProto] = {
            t.name: t for t in self._graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL
        }

    def of_inputs(self) -> dict[str, Interval]:
        for node in reversed(self._graph.node):
            for name, interval in lookups(node, self._shapes):
                self._add(name, interval)
            if domain_of(node) == "":
                self._hand_on(node)
        found = {value.name: self._of(value.name) for value in self._graph.input}
        return {name: interval for name, interval in found.items() if interval is not None}

    def _of(self, name: str) -> Interval | None:
        """What is known once every node that reads the value has been seen."""
        known = self._legal.get(name)
        if known is None or not self._shapes.is_integer(name):
            return None
        return known.bounds(self._shapes.of(name) or ())

    def _add(self, name: str, interval: Interval | None) -> None:
        legal = self._legal.setdefault(name, _Legal())
        legal.whole = _meet(legal.whole, interval)

    def _add_part(self, name: str, axis: int, indices: Collection[int], interval: Interval) -> None:
        found = self._legal.setdefault(name, _Legal()).parts.setdefault(axis, {})
        found.update({index: _meet(found.get(index), interval) or interval for index in indices})

    def _hand_on(self, node: onnx.NodeProto) -> None:
        """From the results of a node to the operands whose elements they are made of."""
        results = [self._of(name) for name in node.output]
        if node.op_type == "Split":
            self._split(node, results)
        elif not results or results[0] is None:
            return
        elif node.op_type in (*_MOVES, "Cast", "CastLike"):
            self._add(operand(node, 0), results[0])
        elif node.op_type == "Concat":
            for name in node.input:
                self._add(name, results[0])
        elif node.op_type in ("Add", "Sub"):
            self._term(node, results[0])
        elif node.op_type in ("Gather", "Slice"):
            self._part(node, results[0])

    def _term(self, node: onnx.NodeProto, bounds: Interval) -> None:
        """Of x + c, c + x, x - c and c - x: the bounds of x that some element of c leaves."""
        first, second = operand(node, 0), operand(node, 1)
        is_first = second in self._constants
        constants = self._values(second if is_first else first)
        if constants is None:
            return
        least, greatest = min(constants), max(constants)
        if node.op_type == "Add":
            interval = bounds[0] - greatest, bounds[1] - least
        elif is_first:
            interval = bounds[0] + least, bounds[1] + greatest
        else:
            interval = least - bounds[1], greatest - bounds[0]
        self._add(first if is_first else second, interval)

    def _part(self, node: onnx.NodeProto, bounds: Interval) -> None:
        """Gather and Slice of one axis, by constants: the bounds of the part that they take."""
        data, shape = operand(node, 0), self._shapes.of(operand(node, 0)) or ()
        chosen: Collection[int] | None
        if node.op_type == "Gather":
            axis, chosen = whole(node, "axis", 0), self._values(operand(node, 1))
            size = self._shapes.size(data, axis)
        else:
            starts, stops, axes, steps = (self._values(operand(node, port)) for port in range(1, 5))
            axis = axes[0] if axes else 0
            size = self._shapes.size(data, axis)
            one = starts is not None and stops is not None and len(starts) == len(stops) == 1 and steps in (None, [1])
            chosen = range(size)[starts[0] : stops[0]] if one and size is not None else None  # pyright: ignore
        if chosen is not None and size is not None:
            indices = {index % size for index in chosen if -size <= index < size}
            self._add_part(data, axis % len(shape), indices, bounds)

    def _split(self, node: onnx.NodeProto, results: Sequence[Interval | None]) -> None:
        data, start = operand(node, 0), 0
        axis = whole(node, "axis", 0)
        rank = len(self._shapes.of(data) or ())
        for name, bounds in zip(node.output, results, strict=True):
            size = self._shapes.size(name, axis)
            if size is None:
                return
            if bounds is not None:
                self._add_part(data, axis % rank, range(start, start + size), bounds)
            start += size

    def _values(self, name: str) -> list[int] | None:
        """The elements of an integer constant, None for anything else or an empty one."""
        if name not in self._constants:
            return None
        array: np.ndarray[Any, Any] = numpy_helper.to_array(self._constants[name])
        return [int(value) for value in array.flat] if array.size and array.dtype.kind in "iu" else None


def _meet(a: Interval | None, b: Interval | None) -> Interval | None:
    """The values in both intervals; None stands for all. Where there are none in both, the first stays."""
    if a is None or b is None:
        return b if a is None else a
    low, high = max(a[0], b[0]), min(a[1], b[1])
    return (low, high) if low <= high else a


def _hull(intervals: Sequence[Interval]) -> Interval:
    return min(low for low, _ in intervals), max(high for _, high in intervals)
