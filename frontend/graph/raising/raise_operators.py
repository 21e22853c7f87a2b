"""The pass: every Scan that is a recurrence of LinearAttention in other words becomes one."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx
from linattn.dialect_patterns.op import MICROSOFT

from ..drop_unused import drop_unused
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
    return done


def _raise_convolutions(model: onnx.ModelProto, done: Raising) -> None:
    graph = model.graph
    structure = Values(graph, {})
    names = [node.name for node in graph.node if is_candidate(node, structure)]
    if not names or opset_versions(model).get("", 1) < _OLDEST:
        return
    values = Values(graph, infer_types(model))
    for name in names:
        node = next(n for n in graph.node if n.name == name)
        try:
            raised = raise_convolution(node, values, Readers(graph))
        except NotProvenError as error:
            done.notes.append(f"not raised: Conv '{name}' {error}")
            continue
        _put(model, raised, done)


def _raise_scans(model: onnx.ModelProto, done: Raising) -> None:
    graph = model.graph
    scans = [node for node in graph.node if node.op_type == "Scan" and domain_of(node) == ""]
    if not scans:
        return
    values = Values(graph, infer_types(model))
    for node in scans:
        try:
            if opset_versions(model).get("", 1) < _OLDEST:
                raise NotProvenError(f"is of an opset before {_OLDEST}")
            raised, outcome = raise_scan(node, values, Readers(graph))
        except NotProvenError as error:
            done.misses[node.name] = str(error)
            continue
        _forward(graph, outcome, values)
        _put(model, raised, done)


def _forward(graph: onnx.GraphProto, outcome: Outcome, values: Values) -> None:
    """Read the operator's output wherever moves of the Scan's lead to it again."""
    readers, outputs = Readers(graph), {v.name for v in graph.output}
    pending = [outcome.output]
    while pending:
        for reader in readers.of(pending.pop()):
            if reader.op_type not in MOVES or domain_of(reader) != "":
                continue
            name = reader.output[0]
            pending.append(name)
            if name not in outputs and outcome.is_result(values, name):
                for last in readers.of(name):
                    for i, operand in enumerate(last.input):
                        if operand == name:
                            last.input[i] = outcome.result


def _put(model: onnx.ModelProto, raised: Raised, done: Raising) -> None:
    """Put the new nodes in the place of those that made the same values, in an order in which they can run."""
    graph = model.graph
    if MICROSOFT not in opset_versions(model):
        model.opset_import.add(domain=MICROSOFT, version=1)
    made = {name for node in raised.nodes for name in node.output if name}
    waiting = [*(node for node in graph.node if not made & set(node.output)), *raised.nodes]
    coming = {name for node in waiting for name in node.output if name}
    ordered: list[onnx.NodeProto] = []
    while waiting:
        later: list[onnx.NodeProto] = []
        for node in waiting:
            if coming & read_by(node):
                later.append(node)
            else:
                ordered.append(node)
                coming -= set(node.output)
        assert len(later) < len(waiting)  # the new values depend on what the old ones did
        waiting = later
    del graph.node[:]
    graph.node.extend(ordered)
    graph.initializer.extend(raised.initializers)
    done.notes.append(f"{_RAISED}{raised.what}")
