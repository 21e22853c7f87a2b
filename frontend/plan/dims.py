"""Which symbolic dimension means what: batch, tokens of this call, past length, total length.

The roles come from where a symbol stands at the operators that have a notion of tokens; only the three inputs that
every exporter names alike (``input_ids``, ``attention_mask``, ``position_ids``) are found by name.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx
from linattn.dialect_patterns.op import INTERNAL, MICROSOFT

from ..graph.schema import domain_of
from ..graph.states import KV_LENGTH_AXIS, StatePair

# Where (batch, tokens) stand in an operator's first input, by operator and rank.
_TOKEN_AXES = {
    ("LinearAttention", 3): (0, 1),
    ("CausalConvWithState", 3): (0, 2),
    ("SelectiveScan", 3): (0, 1),
    ("GroupQueryAttention", 3): (0, 1),
    ("Attention", 3): (0, 1),
    ("Attention", 4): (0, 2),
}


@dataclass(frozen=True)
class DimRoles:
    """Roles of the symbols in a model's inputs and outputs.

    Attributes:
        roles: Symbol or expression -> ``batch``, ``tokens``, ``past``, ``total`` or ``open``.
    """

    roles: Mapping[str, str] = field(default_factory=dict[str, str])

    def has(self, role: str) -> bool:
        """Whether any symbol has this role."""
        return role in self.roles.values()

    def bind(self, sizes: Mapping[str, int | None]) -> dict[str, int]:
        """Symbol -> size for each role in ``sizes`` that has one; roles that are None stay open."""
        return {name: size for name, role in self.roles.items() if (size := sizes.get(role)) is not None}


def dim_names(value: onnx.ValueInfoProto | onnx.TypeProto) -> list[str | int | None]:
    """The dims of a tensor: sizes, symbols, None where neither is given."""
    proto = value.type if isinstance(value, onnx.ValueInfoProto) else value
    return [d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in proto.tensor_type.shape.dim]


def find_roles(graph: onnx.GraphProto, types: Mapping[str, onnx.TypeProto], states: list[StatePair]) -> DimRoles:
    """Give every symbol in the graph's inputs and outputs a role."""
    roles: dict[str, str] = {}

    def give(symbol: str | int | None, role: str) -> None:
        if isinstance(symbol, str):
            roles.setdefault(symbol, role)

    def give_axis(name: str, axis: int, role: str) -> None:
        dims = dim_names(values[name])
        give(dims[axis] if -len(dims) <= axis < len(dims) else None, role)  # a damaged model may declare fewer

    values = {v.name: v for v in (*graph.output, *graph.input)}
    inputs = {v.name for v in graph.input}
    for name in ("input_ids", "inputs_embeds"):
        if name in inputs:
            give_axis(name, 0, "batch")
            give_axis(name, 1, "tokens")
    for node in graph.node:
        first = types.get(node.input[0]) if node.input else None
        if first is None or domain_of(node) not in ("", MICROSOFT, INTERNAL):
            continue
        dims = dim_names(first)
        axes = _TOKEN_AXES.get((node.op_type, len(dims)))
        if axes is not None:
            give(dims[axes[0]], "batch")
            give(dims[axes[1]], "tokens")
    for state in states:
        give_axis(state.past, 0, "batch")
        if state.kind == "kv_cache":
            give_axis(state.past, KV_LENGTH_AXIS, "past")
    if "attention_mask" in inputs:
        give_axis("attention_mask", -1, "total")
    for state in states:
        if state.kind == "kv_cache":
            give_axis(state.present, KV_LENGTH_AXIS, "total")
    for value in (*graph.input, *graph.output):
        for symbol in dim_names(value):
            give(symbol, "open")
    return DimRoles({s: r for s, r in roles.items() if _in_signature(s, graph)})


def _in_signature(symbol: str, graph: onnx.GraphProto) -> bool:
    return any(symbol in dim_names(value) for value in (*graph.input, *graph.output))


_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
}


def evaluate(expression: str, sizes: Mapping[str, int]) -> int | None:
    """The value of a dim such as ``4*batch*sequence_len``, None if it is no such expression or a symbol is open."""
    if expression in sizes:
        return sizes[expression]
    try:
        tree = ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None

    def value(node: ast.expr) -> int | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            return sizes.get(node.id)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            left, right = value(node.left), value(node.right)
            if left is None or right is None or (isinstance(node.op, ast.FloorDiv) and right == 0):
                return None
            return _OPERATORS[type(node.op)](left, right)
        return None

    result = value(tree)
    return result if result is not None and 0 <= result < 1 << 48 else None
