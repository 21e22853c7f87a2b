"""Which operands of which operators are indices, and of how many rows: the tables that a model looks things up in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import onnx
from linattn.dialect_patterns.gather_columns.op import GATHER_COLUMNS
from linattn.dialect_patterns.op import INTERNAL, MICROSOFT

from .schema import CAPACITY, attributes_of, domain_of, spec_of_type

Interval = tuple[int, int]
"""Least and greatest legal value."""

_INTEGERS = frozenset({"i8", "i16", "i32", "i64"})


class Shapes:
    """Shapes and element types of a graph's values."""

    def __init__(self, types: Mapping[str, onnx.TypeProto]) -> None:
        self._types = types

    def of(self, name: str) -> tuple[int | None, ...] | None:
        """The sizes of a value, None if they are not known."""
        spec = spec_of_type(self._types.get(name))
        return spec.shape if spec is not None else None

    def size(self, name: str, axis: int) -> int | None:
        """One size of a value, None if it is open or not known."""
        shape = self.of(name)
        return shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None

    def is_integer(self, name: str) -> bool:
        """Whether a value's elements are integers."""
        spec = spec_of_type(self._types.get(name))
        return spec is not None and spec.dtype in _INTEGERS


def operand(node: onnx.NodeProto, port: int) -> str:
    """The name of an operand, empty where it is left out."""
    return node.input[port] if port < len(node.input) else ""


def whole(node: onnx.NodeProto, attribute: str, default: int) -> int:
    """The value of an integer attribute."""
    value = attributes_of(node).get(attribute, default)
    return value if isinstance(value, int) else default


def lookups(node: onnx.NodeProto, shapes: Shapes) -> Iterator[tuple[str, Interval]]:
    """The operands of a node that are indices of tables whose size is known, with the bounds of their elements."""
    rule = _RULES.get((domain_of(node), node.op_type))
    if rule is None:
        return
    name, interval = rule(node, shapes)
    if name and interval is not None:
        yield name, interval


Lookup = tuple[str, Interval | None]
_Rule = Callable[[onnx.NodeProto, Shapes], Lookup]


def _from_the_end_too(size: int | None) -> Interval | None:
    """ONNX counts indices -n..-1 from the end."""
    return (-size, size - 1) if size else None


def _from_zero(size: int | None) -> Interval | None:
    return (0, size - 1) if size else None


def _along_axis(attribute: str) -> _Rule:
    def rule(node: onnx.NodeProto, shapes: Shapes) -> Lookup:
        size = shapes.size(operand(node, 0), whole(node, attribute, 0))
        return operand(node, 1), _from_the_end_too(size)

    return rule


def _of_columns(node: onnx.NodeProto, shapes: Shapes) -> Lookup:
    return operand(node, 1), _from_the_end_too(shapes.size(operand(node, 0), 1))


def _several_axes(node: onnx.NodeProto, shapes: Shapes) -> Lookup:
    """GatherND, ScatterND: a row of the indices has one index for each of some axes, bounded by the longest."""
    name, data = operand(node, 1), shapes.of(operand(node, 0)) or ()
    depth, first = shapes.size(name, -1), whole(node, "batch_dims", 0)
    sizes = data[first : first + (depth or 0)]
    known = [size for size in sizes if size is not None]
    return name, _from_the_end_too(max(known)) if known and len(known) == len(sizes) else None


def _rotary(ids: int, cache: int) -> _Rule:
    """Position ids are rows of the cosine cache, which is a table of positions wherever there are ids."""

    def rule(node: onnx.NodeProto, shapes: Shapes) -> Lookup:
        return operand(node, ids), _from_zero(shapes.size(operand(node, cache), 0))

    return rule


def _group_query_attention(node: onnx.NodeProto, shapes: Shapes) -> Lookup:
    """Its position ids; where there are none, it counts positions back from the last one of each row."""
    counted = "" if whole(node, CAPACITY, 0) else operand(node, 5)
    rows = shapes.size(operand(node, 7), 0) if whole(node, "do_rotary", 0) else None
    return operand(node, 9) or counted, _from_zero(rows)


def _attention(node: onnx.NodeProto, shapes: Shapes) -> Lookup:
    """No more keys can be valid than there are."""
    count = shapes.size(operand(node, 1), -2)
    return operand(node, 6), None if count is None else (0, count)


_RULES: dict[tuple[str, str], _Rule] = {
    ("", "Gather"): _along_axis("axis"),
    ("", "GatherElements"): _along_axis("axis"),
    ("", "ScatterElements"): _along_axis("axis"),
    ("", "GatherND"): _several_axes,
    ("", "ScatterND"): _several_axes,
    ("", "RotaryEmbedding"): _rotary(3, 1),
    ("", "Attention"): _attention,
    (INTERNAL, GATHER_COLUMNS): _of_columns,
    (MICROSOFT, "GatherBlockQuantized"): _along_axis("gather_axis"),
    (MICROSOFT, "RotaryEmbedding"): _rotary(1, 2),
    (MICROSOFT, "MRotaryEmbedding"): _rotary(1, 2),
    (MICROSOFT, "GroupQueryAttention"): _group_query_attention,
}
