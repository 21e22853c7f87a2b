"""Pairs every state's input with its output by following the graph, not the names: past -> operator -> present.

Exporters disagree on names (``past.0.recurrent``, ``past_key_values.0.ssm_state``); the operator between is what makes
a pair. Shapes come from the operator too: exporters leave symbols where only one size is possible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
from linattn.dialect_patterns.op import MICROSOFT
from linattn.runtime.errors import UnsupportedModelError

from .schema import domain_of

# (domain, operator) -> (kind, past input, present output) of each state.
STATE_PORTS: dict[tuple[str, str], tuple[tuple[str, int, int], ...]] = {
    ("", "LinearAttention"): (("recurrent", 3, 1),),
    (MICROSOFT, "LinearAttention"): (("recurrent", 3, 1),),
    ("", "CausalConvWithState"): (("conv", 3, 1),),
    (MICROSOFT, "CausalConvWithState"): (("conv", 3, 1),),
    ("", "Attention"): (("kv_cache", 4, 1), ("kv_cache", 5, 2)),
    (MICROSOFT, "GroupQueryAttention"): (("kv_cache", 3, 1), ("kv_cache", 4, 2)),
}

KV_LENGTH_AXIS = 2
"""KV caches are [B, Hkv, length, d] in both operators."""

_PASS_THROUGH = ("Cast", "Identity")


@dataclass(frozen=True)
class StatePair:
    """A state of the model.

    Attributes:
        past: Name of the graph input.
        present: Name of the graph output that becomes the next past.
        kind: ``recurrent``, ``conv`` or ``kv_cache``.
        node: Name of the node between them.
        direct: Whether the operator reads the input and writes the output itself, with no cast between.
        present_port: Which output of the node is the present value.
    """

    past: str
    present: str
    kind: str
    node: str
    direct: bool
    present_port: int


def find_states(graph: onnx.GraphProto) -> list[StatePair]:
    """All states of a graph, in the order of its inputs.

    Raises:
        UnsupportedModelError: if one input feeds two states, or a state that is read is never given back.
    """
    inputs = {v.name for v in graph.input} - {t.name for t in graph.initializer}
    outputs = {v.name for v in graph.output}
    producer = {name: node for node in graph.node for name in node.output if name}
    pairs: dict[str, StatePair] = {}
    for node in graph.node:
        for kind, port, present_port in STATE_PORTS.get((domain_of(node), node.op_type), ()):
            if port >= len(node.input) or not node.input[port]:
                continue
            past, steps_back = _back(node.input[port], inputs, producer)
            if past is None:
                continue
            value = node.output[present_port] if present_port < len(node.output) else ""
            present, steps_on = _forward(value, outputs, graph)
            if present is None:
                raise UnsupportedModelError(
                    f"the state '{past}' goes in but its new value is not an output of the model",
                    where=f"node '{node.name}' ({node.op_type})",
                    hint="export the model with its present states as outputs",
                )
            if past in pairs:
                raise UnsupportedModelError(
                    f"the input '{past}' is the state of two nodes",
                    where=f"node '{node.name}'",
                    got=f"also '{pairs[past].node}'",
                    expected="one state a node",
                )
            pairs[past] = StatePair(past, present, kind, node.name, steps_back + steps_on == 0, present_port)
    return [pairs[v.name] for v in graph.input if v.name in pairs]


def _back(name: str, inputs: set[str], producer: Mapping[str, onnx.NodeProto]) -> tuple[str | None, int]:
    steps = 0
    while name not in inputs:
        node = producer.get(name)
        if node is None or node.op_type not in _PASS_THROUGH:
            return None, steps
        name, steps = node.input[0], steps + 1
    return name, steps


def _forward(name: str, outputs: set[str], graph: onnx.GraphProto) -> tuple[str | None, int]:
    steps = 0
    while name and name not in outputs:
        users = [n for n in graph.node if name in n.input and n.op_type in _PASS_THROUGH]
        if not users:
            return None, steps
        name, steps = users[0].output[0], steps + 1
    return (name or None), steps
