"""Graphs that were written for one token a call: which axis is the tokens', and whether each token is for itself.

Once its recurrences are operators again, such a graph may take many tokens, if everything else treats each by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx
from linattn.dialect_patterns.choose import CHOOSE
from linattn.dialect_patterns.experts.given import CHOSEN_EXPERTS
from linattn.dialect_patterns.gather_columns.op import GATHER_COLUMNS
from linattn.dialect_patterns.op import INTERNAL, MICROSOFT
from linattn.dialect_patterns.selective_scan.op import SELECTIVE_SCAN

from ..schema import attributes_of, domain_of, infer_types
from ..states import STATE_PORTS
from .causal_mask import causal_mask_nodes
from .readers import Readers
from .sizes import Size, product
from .values import Values

_ELEMENTWISE = """
    Add Cast CastLike Clip Div Erf Exp Gelu HardSwish Identity LeakyRelu Log Max Min Mul Neg Pow QuickGelu Reciprocal
    Relu Sigmoid Softplus Sqrt Sub Swish Tanh Where
"""
_ROWS = f"""
    {CHOSEN_EXPERTS} GatedAdd GatedRMSNorm LayerNormalization MatMul MatMulNBits MoE QMoE RMSNormalization
    SimplifiedLayerNormalization SkipLayerNormalization SkipSimplifiedLayerNormalization
"""
"""Operators of rows, which the last axis holds, and of weights that all rows share."""

_SEQUENTIAL: dict[tuple[str, str], tuple[int, tuple[int, ...]]] = {
    ("", "LinearAttention"): (-2, (0, 1, 2, 4, 5)),
    (MICROSOFT, "LinearAttention"): (-2, (0, 1, 2, 4, 5)),
    ("", "CausalConvWithState"): (-1, (0,)),
    (MICROSOFT, "CausalConvWithState"): (-1, (0,)),
    (INTERNAL, SELECTIVE_SCAN): (-2, (0, 1, 3, 4)),
    ("", "Attention"): (-2, (0, 1, 2)),
    (MICROSOFT, "GroupQueryAttention"): (-2, (0, 1, 2)),
}
"""Operators for which a prompt is its tokens one after the other: the axis of the tokens, from the last one, and the
inputs that have it. Each is one if it reads a state and gives it back, Attention if it is causal."""


_ROTATIONS: dict[str, dict[int, int]] = {"": {0: -2, 1: -2, 2: -2, 3: -1}, MICROSOFT: {0: -2, 1: -1}}
"""Domain of RotaryEmbedding -> the axis of the tokens in each input that may have one."""


def dropped_tokens(model: onnx.ModelProto) -> str | None:
    """The symbol of the tokens in a graph that takes one a call: that of an input, whose axis a Squeeze drops."""
    graph = model.graph
    if not any(node.op_type == "Squeeze" and domain_of(node) == "" for node in graph.node):
        return None
    if any(node.op_type == CHOOSE and domain_of(node) == INTERNAL for node in graph.node):
        return None  # where it takes one token is a branch of it
    symbols = {d.dim_param for v in graph.input for d in v.type.tensor_type.shape.dim[1:] if d.HasField("dim_param")}
    values = Values(graph, infer_types(model))
    found = {
        str(size)
        for node in graph.node
        if node.op_type == "Squeeze" and domain_of(node) == "" and len(node.input) > 1
        for size in _squeezed(node, values)
        if str(size) in symbols
    }
    return found.pop() if len(found) == 1 else None


def _squeezed(node: onnx.NodeProto, values: Values) -> list[Size]:
    shape, axes = values.shape(node.input[0]), values.constant(node.input[1])
    if shape is None or axes is None:
        return []
    return [shape[int(axis)] for axis in axes.reshape(-1) if -len(shape) <= axis < len(shape)]


def mixes_tokens(model: onnx.ModelProto, tokens: str) -> str | None:
    """Why a graph is not one that treats each of several tokens by itself; None if it is.

    Args:
        model: The model.
        tokens: Symbol of the number of tokens.
    """
    values = Values(model.graph, infer_types(model))
    places = _Places(values, Size.of(tokens))
    for value in model.graph.input:
        shape = values.shape(value.name) or ()
        found = [i - len(shape) for i, size in enumerate(shape) if any(tokens in s for s, _ in size.terms)]
        if len(found) > 1 or any(shape[i] != Size.of(tokens) for i in found):
            return f"the input '{value.name}' has tokens in other axes than one"
        places.known |= dict.fromkeys([value.name], *found) if found else {}
    masks = _causal_masks(model.graph, values, places.tokens)
    places.masks = {name for name, _ in masks}
    passed = {node.name for _, nodes in masks for node in nodes}
    for node in model.graph.node:
        if node.name not in passed and any(name in places.known for name in node.input):
            place = places.of(node)
            if place is None:
                return f"node '{node.name}' ({node.op_type}) may mix tokens"
            count = 1 if (domain_of(node), node.op_type) in _SEQUENTIAL else len(node.output)
            places.known |= dict.fromkeys(node.output[:count], place)
    return None


def _has(ports: Sequence[str], port: int) -> bool:
    return port < len(ports) and bool(ports[port])


def _causal_masks(graph: onnx.GraphProto, values: Values, tokens: Size) -> list[tuple[str, list[onnx.NodeProto]]]:
    """The causal masks of attention, each with the nodes that compute it, which nothing else reads."""
    readers = Readers(graph)
    found: list[tuple[str, list[onnx.NodeProto]]] = []
    for node in graph.node:
        name = node.input[3] if node.op_type == "Attention" and len(node.input) > 3 else ""
        nodes = causal_mask_nodes(values, name, tokens) if name and name not in dict(found) else None
        if nodes is not None:
            found.append((name, nodes))
    inner = {node.name for _, nodes in found for node in nodes}
    masks = {name for name, _ in found}
    outputs = {v.name for v in graph.output}

    def is_inner(value: str) -> bool:
        return value not in outputs and all(
            reader.name in inner or (value in masks and reader.op_type == "Attention" and reader.input[3] == value)
            for reader in readers.of(value)
        )

    return found if all(is_inner(value) for _, nodes in found for node in nodes for value in node.output) else []


class _Places:
    """Which axis of a value is the tokens', counted from the last one: -1 and so on.

    Args:
        values: The graph.
        tokens: Their number.

    Attributes:
        known: Value -> its axis, for all that have one.
        masks: Causal masks, which attention may read.
        tokens: Their number.
    """

    def __init__(self, values: Values, tokens: Size) -> None:
        self.known: dict[str, int] = {}
        self.masks: set[str] = set()
        self._values, self.tokens = values, tokens

    def of(self, node: onnx.NodeProto) -> int | None:
        """That of a node's outputs, of which some input has one; None if the node may mix tokens."""
        found = {i: self.known[name] for i, name in enumerate(node.input) if name in self.known}
        sequential = _SEQUENTIAL.get((domain_of(node), node.op_type))
        if sequential is not None:
            place, ports = sequential
            masked = len(node.input) > 3 and node.input[3] in self.masks
            causal = node.op_type != "Attention" or masked or attributes_of(node).get("is_causal") == 1
            states = STATE_PORTS[domain_of(node), node.op_type]
            carries = all(_has(node.input, past) and _has(node.output, present) for _, past, present in states)
            fits = set(found) <= {*ports} and set(found.values()) == {place}
            return place if causal and carries and fits else None
        if node.op_type == "RotaryEmbedding" and len(found) > 1:
            return -2 if found.items() <= _ROTATIONS[domain_of(node)].items() else None
        place = found[min(found)]
        if any(other != place for other in found.values()):
            return None
        if node.op_type in _ELEMENTWISE.split():
            return place if all(self._stretches(name, place) for name in node.input if name) else None
        if node.op_type in _ROWS.split():
            shape = self._values.shape(node.input[1]) if node.op_type == "MatMul" else ()
            return place if place != -1 and 0 in found and shape is not None and len(shape) < 3 else None
        if node.op_type in ("Gather", GATHER_COLUMNS, "GatherBlockQuantized"):
            return self._gathered(node, place) if set(found) == {1} else None
        rule = _RULES.get(node.op_type) if domain_of(node) == "" else None
        if rule is None or (set(found) != {0} and node.op_type != "Concat"):
            return None
        return rule(self, node, place)

    def _stretches(self, name: str, place: int) -> bool:
        """Whether a value has the tokens there, or nothing that it would repeat for each."""
        shape = self._values.shape(name)
        return name in self.known or (shape is not None and (len(shape) < -place or shape[place].value == 1))

    def _gathered(self, node: onnx.NodeProto, place: int) -> int | None:
        shape, attributes = self._values.shape(node.input[0]), attributes_of(node)
        axis = attributes.get("axis", attributes.get("gather_axis", 0))
        if shape is None or (axis != 0 and node.op_type != GATHER_COLUMNS):
            return None
        return place - (len(shape) - 1)

    def along(self, node: onnx.NodeProto, place: int) -> int | None:
        """Of a node that works along the axis of its attribute ``axis``."""
        rank, axis = len(self._values.shape(node.input[0]) or ()), int(str(attributes_of(node).get("axis", -1)))
        return place if rank and axis % rank != place + rank else None

    def _axes(self, node: onnx.NodeProto, port: int) -> list[int] | None:
        """Axes from an input."""
        value = self._values.constant(node.input[port]) if port < len(node.input) and node.input[port] else None
        return None if value is None else [int(v) for v in value.reshape(-1)]

    def sliced(self, node: onnx.NodeProto, place: int) -> int | None:
        """Of a Slice."""
        axes, rank = self._axes(node, 3), len(self._values.shape(node.input[0]) or ())
        return place if axes is not None and rank and all(a % rank != place + rank for a in axes) else None

    def reduced(self, node: onnx.NodeProto, place: int) -> int | None:
        """Of a sum and the like, which keeps the axes that it reduces."""
        axes, rank = self._axes(node, 1), len(self._values.shape(node.input[0]) or ())
        kept = attributes_of(node).get("keepdims", 1) == 1
        return place if axes and rank and kept and all(a % rank != place + rank for a in axes) else None

    def transposed(self, node: onnx.NodeProto, place: int) -> int | None:
        """Of a Transpose."""
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        return None if order is None else order.index(place + len(order)) - len(order)

    def unsqueezed(self, node: onnx.NodeProto, place: int) -> int | None:
        """Of an Unsqueeze."""
        axes, rank = self._axes(node, 1), len(self._values.shape(node.input[0]) or ())
        if axes is None or not rank:
            return None
        after = rank + len(axes)
        kept = [i for i in range(after) if i not in {axis % after for axis in axes}]
        return kept[place] - after

    def squeezed(self, node: onnx.NodeProto, place: int) -> int | None:
        """Of a Squeeze."""
        axes, rank = self._axes(node, 1), len(self._values.shape(node.input[0]) or ())
        if axes is None or not rank:
            return None
        kept = [i for i in range(rank) if i not in {axis % rank for axis in axes}]
        return kept.index(place + rank) - len(kept) if place + rank in kept else None

    def reshaped(self, node: onnx.NodeProto, place: int) -> int | None:
        """Of a Reshape: the axis of as many tokens behind as many other elements."""
        before, after = self._values.shape(node.input[0]), self._values.shape(node.output[0])
        if before is None or after is None:
            return None
        lead = product(before[: place + len(before)])
        same = [i for i, size in enumerate(after) if size == self.tokens and product(after[:i]) == lead]
        return same[0] - len(after) if len(same) == 1 else None


_RULES: dict[str, Callable[[_Places, onnx.NodeProto, int], int | None]] = {
    "Concat": _Places.along,
    "Softmax": _Places.along,
    "Split": _Places.along,
    "TopK": _Places.along,
    "Slice": _Places.sliced,
    "ReduceMean": _Places.reduced,
    "ReduceSum": _Places.reduced,
    "Transpose": _Places.transposed,
    "Unsqueeze": _Places.unsqueezed,
    "Squeeze": _Places.squeezed,
    "Reshape": _Places.reshaped,
}
