"""Masks that exporters compute so that a query sees the keys up to its own: attention that is causal by them.

    counts = CumSum(attention_mask);  own = the last counts, as many as tokens
    mask = Where(attention_mask And own[t] >= counts[s], 0, -3e38)          or the condition itself

A key after a query has a higher count or is masked, so the row of a token is the same in a prompt as alone.
"""

from __future__ import annotations

import onnx

from ..schema import attributes_of, domain_of
from .sizes import Size
from .values import Values

_HIDDEN = -1e4
_MOVES = ("Cast", "Identity", "Unsqueeze")


def causal_mask_nodes(values: Values, mask: str, tokens: Size) -> list[onnx.NodeProto] | None:
    """The nodes that compute a mask from the model's own; None where it is not such a mask.

    Args:
        values: The graph.
        mask: The mask.
        tokens: How many tokens a call has.
    """
    chosen = _moved(values, mask)
    node = values.producers.get(chosen)
    if node is not None and node.op_type == "Where":
        seen, hidden = values.number(node.input[1]), values.number(node.input[2])
        if seen != 0 or hidden is None or hidden > _HIDDEN:
            return None
        node = values.producers.get(node.input[0])
    if node is None or node.op_type != "And":
        return None
    for given, compared in (node.input, node.input[::-1]):
        source, compare = _moved(values, given), values.producers.get(compared)
        if compare is not None and compare.op_type == "GreaterOrEqual" and _counts(values, compare, source, tokens):
            return _before(values, mask)
    return None


def _counts(values: Values, compare: onnx.NodeProto, mask: str, tokens: Size) -> bool:
    """Whether the last counts of a mask [B, total] are compared with all of them, as [B, T, 1] with [B, 1, total]."""
    own, all_of_them = (values.producers.get(name) for name in compare.input)
    if own is None or all_of_them is None or {own.op_type, all_of_them.op_type} != {"Unsqueeze"}:
        return False
    if [_axes(values, own), _axes(values, all_of_them)] != [[2], [1]]:
        return False
    cut, count = values.producers.get(own.input[0]), values.producers.get(all_of_them.input[0])
    if cut is None or cut.op_type != "Slice" or count is None or cut.input[0] != count.output[0] or len(cut.input) != 4:
        return False
    shape, kind = values.shape(mask), attributes_of(count)
    if count.op_type != "CumSum" or count.input[0] != mask or kind.get("exclusive") or kind.get("reverse"):
        return False
    bounds = [values.sizes(name) for name in cut.input[1:]]
    if shape is None or len(shape) != 2 or values.number(count.input[1]) != 1:
        return False
    return bounds == [(shape[1] - tokens,), (shape[1],), (Size.of(1),)]


def _axes(values: Values, node: onnx.NodeProto) -> list[int] | None:
    value = values.constant(node.input[1]) if len(node.input) > 1 else None
    return None if value is None else [int(v) for v in value.reshape(-1)]


def _moved(values: Values, name: str) -> str:
    """What a value is before casts and axes of size 1."""
    while (node := values.producers.get(name)) is not None and domain_of(node) == "" and node.op_type in _MOVES:
        name = node.input[0]
    return name


def _before(values: Values, name: str) -> list[onnx.NodeProto]:
    """All nodes that a value depends on."""
    found, pending = dict[str, onnx.NodeProto](), [name]
    while pending:
        node = values.producers.get(pending.pop())
        if node is not None and node.output[0] not in found:
            found[node.output[0]] = node
            pending += [n for n in node.input if n]
    return list(found.values())
