"""The pass: every Scan that is a recurrence of LinearAttention in other words becomes one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx
from linattn.dialect_patterns.op import MICROSOFT

from ..drop_unused import drop_unused
from ..name_nodes import name_nodes
from ..schema import domain_of, infer_types, opset_versions
from .algebra import NotProvenError
from .convolution import is_candidate, raise_convolution
from .interpret import MOVES
from .moves import Raised
from .readers import Readers, read_by
from .scan import raise_scan
from .values import Values
from .write_recurrence import Outcome

RAISED_OPS = frozenset({"Scan"})
"""Operators that only this pass can take out of a graph."""

_RAISED = "raised: "
_OLDEST = 9
"""The opset from which on Scan has no batch axis of its own, and sums stretch their operands."""


@dataclass
class Raising:
    """What the pass did.

    Attributes:
        notes: For the report, a line an operator.
        misses: Node that was left alone -> what stood in the way.
    """

    notes: list[str] = field(default_factory=list[str])
    misses: dict[str, str] = field(default_factory=dict[str, str])


def raise_operators(model: onnx.ModelProto) -> Raising:
    """Put operators in place of what spells them out, in place.

    Args:
        model: The model, checked; nodes that no output needs go where something was raised.

    Returns:
        What was raised, and what was left alone and why.

    Raises:
        UnsupportedModelError: if the model's shapes contradict each other.
    """
    done = Raising()
    _raise_convolutions(model, done)
    _raise_scans(model, done)
    if any(note.startswith(_RAISED) for note in done.notes):
        drop_unused(model.graph)
        name_nodes(model.graph)
    return done


def _raise_convolutions(model: onnx.ModelProto, done: Raising) -> None:
    graph = model.graph
    structure = Values(graph, {})
    candidates = [node for node in graph.node if is_candidate(node, structure)]
    if not candidates or opset_versions(model).get("", 1) < _OLDEST:
        return
    values, readers = Values(graph, infer_types(model)), Readers(graph)
    found: list[Raised] = []
    for node in candidates:
        try:
            found.append(raise_convolution(node, values, readers))
        except NotProvenError as error:
            done.notes.append(f"not raised: Conv '{node.name}' {error}")
    _put(model, found, done)


def _raise_scans(model: onnx.ModelProto, done: Raising) -> None:
    graph = model.graph
    scans = [node for node in graph.node if node.op_type == "Scan" and domain_of(node) == ""]
    if not scans:
        return
    values, readers = Values(graph, infer_types(model)), Readers(graph)
    found: list[Raised] = []
    outcomes: list[Outcome] = []
    for node in scans:
        try:
            if opset_versions(model).get("", 1) < _OLDEST:
                raise NotProvenError(f"is of an opset before {_OLDEST}")
            raised, outcome = raise_scan(node, values, readers)
        except NotProvenError as error:
            done.misses[node.name] = str(error)
            continue
        found.append(raised)
        outcomes.append(outcome)
    same = {name: outcome.result for outcome in outcomes for name in _results(graph, outcome, values, readers)}
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = same.get(name, name)
    _put(model, found, done)


def _results(graph: onnx.GraphProto, outcome: Outcome, values: Values, readers: Readers) -> list[str]:
    """The values that are the operator's output again, behind moves of the Scan's."""
    outputs = {v.name for v in graph.output}
    found: list[str] = []
    pending = [outcome.output]
    while pending:
        for reader in readers.of(pending.pop()):
            if reader.op_type in MOVES and domain_of(reader) == "":
                name = reader.output[0]
                pending.append(name)
                if name not in outputs and outcome.is_result(values, name):
                    found.append(name)
    return found


def _put(model: onnx.ModelProto, found: Sequence[Raised], done: Raising) -> None:
    """Put new nodes in the place of those that made the same values."""
    if not found:
        return
    graph = model.graph
    if MICROSOFT not in opset_versions(model):
        model.opset_import.add(domain=MICROSOFT, version=1)
    made = {name for raised in found for node in raised.nodes for name in node.output if name}
    nodes = [*(node for node in graph.node if not made & set(node.output)), *(n for r in found for n in r.nodes)]
    nodes = _in_order(nodes)
    del graph.node[:]
    graph.node.extend(nodes)
    for raised in found:
        graph.initializer.extend(raised.initializers)
        done.notes.append(f"{_RAISED}{raised.what}")


def _in_order(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes in an order in which they can run, otherwise as they are."""
    producers = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    ordered: list[onnx.NodeProto] = []
    begun: set[int] = set()
    pending = list(range(len(nodes)))[::-1]
    ready: set[int] = set()
    while pending:
        place = pending[-1]
        if place not in begun:
            begun.add(place)
            pending += sorted({producers[n] for n in read_by(nodes[place]) if n in producers} - begun, reverse=True)
            continue
        pending.pop()
        if place not in ready:
            ready.add(place)
            ordered.append(nodes[place])
    return ordered
