"""Pairs every state's input with its output by following the graph, not the names: past -> operator -> present.

Exporters disagree on names (``past.0.recurrent``, ``past_key_values.0.ssm_state``); what stands between is what makes a
pair. Shapes come from the operator too: exporters leave symbols where only one size is possible. Only what the graph
cannot prove is paired by name, see ``state_names.py``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from linattn.dialect_patterns.choose import CHOOSE
from linattn.dialect_patterns.op import INTERNAL, MICROSOFT
from linattn.dialect_patterns.selective_scan.op import SELECTIVE_SCAN
from linattn.runtime.errors import UnsupportedModelError

from .schema import domain_of
from .state_names import Pairing, add_named_pairs, dims_of, same_sizes

# (domain, operator) -> (kind, past input, present output) of each state.
STATE_PORTS: dict[tuple[str, str], tuple[tuple[str, int, int], ...]] = {
    ("", "LinearAttention"): (("recurrent", 3, 1),),
    (MICROSOFT, "LinearAttention"): (("recurrent", 3, 1),),
    ("", "CausalConvWithState"): (("conv", 3, 1),),
    (MICROSOFT, "CausalConvWithState"): (("conv", 3, 1),),
    (INTERNAL, SELECTIVE_SCAN): (("recurrent", 5, 1),),
    ("", "Attention"): (("kv_cache", 4, 1), ("kv_cache", 5, 2)),
    (MICROSOFT, "GroupQueryAttention"): (("kv_cache", 3, 1), ("kv_cache", 4, 2)),
}

KV_LENGTH_AXIS = 2
"""KV caches are [B, Hkv, length, d] in both operators."""

_CASTS = ("Cast", "CastLike", "Identity")
# Between a state and its operator: the value is the first input. Gather is a beam search's choice of rows.
_MOVES = (*_CASTS, "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather")
# After it also Concat: a state of K columns around an operator of K-1.
_MOVES_ON = (*_MOVES, "Concat")


@dataclass(frozen=True)
class StatePair:
    """A state of the model.

    Attributes:
        past: Name of the graph input.
        present: Name of the graph output that becomes the next past.
        kind: ``recurrent``, ``conv`` or ``kv_cache``.
        node: Name of the node between them; empty where the name or the user made the pair.
        between: Operators between the graph's values and the node's.
        present_port: Which output of the node is the present value.
        found_by: ``operator``, ``graph`` (a Concat or TensorScatter), ``name`` or ``--state``.
    """

    past: str
    present: str
    kind: str
    node: str
    between: tuple[str, ...]
    present_port: int
    found_by: str = "operator"

    @property
    def direct(self) -> bool:
        """Whether an operator with a notion of states reads the input and writes the output itself."""
        return self.found_by == "operator" and not self.between

    @property
    def shaped_by_node(self) -> bool:
        """Whether the state has the shape that its operator gives it."""
        return self.found_by == "operator" and all(op in _CASTS for op in self.between)


def find_states(
    graph: onnx.GraphProto, pairing: Pairing | None = None, types: Mapping[str, onnx.TypeProto] | None = None
) -> list[StatePair]:
    """All states of a graph, in the order of its inputs.

    Args:
        graph: The graph.
        pairing: Pairs that the user set or unset.
        types: Inferred types, which say more of outputs than exporters declare.

    Raises:
        UnsupportedModelError: if one input feeds two states, a state that is read is never given back, a pair's types
            differ, or an input looks like a state and has no partner.
    """
    pairing = pairing or Pairing()
    flow = _Flow(graph)
    pairs: dict[str, StatePair] = {}
    found = *_ported(graph, flow, pairing), *_concatenated(graph, flow, pairing), *_scattered(graph, flow, pairing)
    for pair in found:
        if pair.past in pairs and pairs[pair.past].present != pair.present:
            raise UnsupportedModelError(
                f"the input '{pair.past}' is the state of two nodes",
                where=f"node '{pair.node}'",
                got=f"also '{pairs[pair.past].node}'",
                expected="one state a node",
            )
        pairs.setdefault(pair.past, pair)
    known = {pair.past: pair.present for pair in pairs.values()}
    for past, present, found_by in add_named_pairs(graph, known, pairing, types or {}):
        _refuse_fixed_length(graph, flow, past, present)
        pairs[past] = StatePair(past, present, _kind_by_shape(graph, past, present), "", (), 0, found_by)
    return [pairs[v.name] for v in graph.input if v.name in pairs]


class _Flow:
    """Follows values through operators that only move them."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._inputs = {v.name for v in graph.input} - {t.name for t in graph.initializer}
        self._outputs = {v.name for v in graph.output}
        self._graph = graph
        self._producer = {name: node for node in graph.node for name in node.output if name}
        self._movers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            if domain_of(node) == "" and node.op_type in _MOVES_ON:
                for name in node.input[: len(node.input) if node.op_type == "Concat" else 1]:
                    self._movers[name].append(node)
            elif domain_of(node) == INTERNAL and node.op_type == CHOOSE:
                for name in node.input[1:]:
                    self._movers[name].append(node)

    def back(self, name: str) -> tuple[str | None, tuple[str, ...]]:
        """The graph input that a value is, and the operators between."""
        steps: tuple[str, ...] = ()
        while name not in self._inputs:
            node = self._producer.get(name)
            if node is None or domain_of(node) != "" or node.op_type not in _MOVES:
                return None, steps
            name, steps = node.input[0], (node.op_type, *steps)
        return name, steps

    def forward(self, name: str, wanted: Sequence[int | str | None]) -> tuple[str, tuple[str, ...]] | None:
        """The graph output that a value becomes, and the operators between.

        Args:
            name: The value.
            wanted: Dims that the output must have, None for any; asked only where something stands between.
        """
        pending: list[tuple[str, tuple[str, ...]]] = [(name, ())] if name else []
        seen: set[str] = set()
        while pending:
            value, steps = pending.pop(0)
            if value in seen:
                continue
            seen.add(value)
            if value in self._outputs and (not steps or same_sizes(dims_of(self._graph, value), wanted)):
                return value, steps
            pending += [(node.output[0], (*steps, node.op_type)) for node in self._movers[value]]
        return None


def _ported(graph: onnx.GraphProto, flow: _Flow, pairing: Pairing) -> list[StatePair]:
    """Pairs around the operators that have ports for states."""
    pairs: list[StatePair] = []
    for node in graph.node:
        for kind, port, present_port in STATE_PORTS.get((domain_of(node), node.op_type), ()):
            if port >= len(node.input) or not node.input[port]:
                continue
            past, before = flow.back(node.input[port])
            if past is None or pairing.is_set(past):
                continue
            if kind == "kv_cache" and len(dims_of(graph, past)) == 4 and not _grows(graph, past):
                raise _fixed_length(graph, node, past)
            value = node.output[present_port] if present_port < len(node.output) else ""
            found = flow.forward(value, _wanted_dims(graph, past, kind))
            if found is None:
                raise UnsupportedModelError(
                    f"the state '{past}' goes in but its new value is not an output of the model",
                    where=f"node '{node.name}' ({node.op_type})",
                    hint="export the model with its present states as outputs, or take it as an ordinary input with "
                    f"--no-state {past}",
                )
            present, after = found
            pairs.append(StatePair(past, present, kind, node.name, before + after, present_port))
    return pairs


def _concatenated(graph: onnx.GraphProto, flow: _Flow, pairing: Pairing) -> list[StatePair]:
    """Pairs around a Concat of what was before and what is new: caches that grow, windows that Slice cuts again."""
    pairs: list[StatePair] = []
    for node in graph.node:
        if node.op_type != "Concat" or domain_of(node) != "" or len(node.input) != 2:
            continue
        past, before = flow.back(node.input[0])
        if past is None or pairing.is_set(past):
            continue
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        rank = len(dims_of(graph, past))
        kind = "kv_cache" if rank == 4 and axis % 4 == KV_LENGTH_AXIS and _grows(graph, past) else "conv"
        found = flow.forward(node.output[0], _wanted_dims(graph, past, kind))
        if found is not None and (kind == "kv_cache" or "Slice" in found[1]):
            pairs.append(StatePair(past, found[0], kind, node.name, before + found[1], 0, "graph"))
    return pairs


def _refuse_fixed_length(graph: onnx.GraphProto, flow: _Flow, past: str, present: str) -> None:
    """Refuse a pair by name whose present value is all rows of the past, of which there is a fixed number, and more.

    Raises:
        UnsupportedModelError: if it is one.
    """
    if len(dims_of(graph, past)) != 4 or _grows(graph, past):
        return
    for node in graph.node:
        if node.op_type == "Concat" and domain_of(node) == "" and flow.back(node.input[0])[0] == past:
            found = flow.forward(node.output[0], _wanted_dims(graph, past, "kv_cache"))
            if found is not None and found[0] == present and "Slice" not in found[1]:
                raise _fixed_length(graph, node, past)


def _fixed_length(graph: onnx.GraphProto, node: onnx.NodeProto, past: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the cache '{past}' has a fixed number of rows, but every call adds some",
        where=f"node '{node.name}' ({node.op_type})",
        got=dims_of(graph, past),
        expected="a symbol for its length",
        hint=f"export it with an open length, or take it as an ordinary input with --no-state {past}",
    )


def _scattered(graph: onnx.GraphProto, flow: _Flow, pairing: Pairing) -> list[StatePair]:
    """Pairs around a TensorScatter: caches of fixed size, whose rows the caller counts."""
    pairs: list[StatePair] = []
    for node in graph.node:
        if node.op_type != "TensorScatter" or domain_of(node) != "":
            continue
        past, before = flow.back(node.input[0])
        if past is None or pairing.is_set(past):
            continue
        found = flow.forward(node.output[0], dims_of(graph, past))
        if found is not None:
            pairs.append(StatePair(past, found[0], "recurrent", node.name, before + found[1], 0, "graph"))
    return pairs


def _wanted_dims(graph: onnx.GraphProto, past: str, kind: str) -> list[int | str | None]:
    """The past's dims, None where the present's may differ: a cache's length."""
    dims = dims_of(graph, past)
    return [None if kind == "kv_cache" and axis == KV_LENGTH_AXIS else dim for axis, dim in enumerate(dims)]


def _grows(graph: onnx.GraphProto, past: str) -> bool:
    return not isinstance(dims_of(graph, past)[KV_LENGTH_AXIS], int)


def _kind_by_shape(graph: onnx.GraphProto, past: str, present: str) -> str:
    """What a pair is that no operator tells: a cache where its length is open and another one after the call."""
    before, after = dims_of(graph, past), dims_of(graph, present)
    if len(before) == 4 and len(after) == 4 and _grows(graph, past) and before[2] != after[2]:
        return "kv_cache"
    return "recurrent"
