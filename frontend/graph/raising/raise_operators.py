"""The pass: recurrences and convolutions that are spelled out become the operators that they are in other words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx
from linattn.dialect_patterns.op import MICROSOFT

from ...plan.dims import evaluate
from ..drop_unused import drop_unused
from ..internal import import_internal
from ..name_nodes import name_nodes
from ..schema import domain_of, infer_types, opset_versions
from .algebra import NotProvenError
from .convolution import is_candidate, raise_convolution
from .interpret import MOVES
from .moves import Raised
from .readers import Readers, read_by
from .scan import raise_scan
from .single_step import raise_step, state_of_step
from .single_value import is_single_value, raise_single_value
from .sizes import Size
from .tokens import dropped_tokens
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
        tokens: Symbol of the number of tokens in a graph that takes one a call, see ``tokens.py``; None for any other.
    """

    notes: list[str] = field(default_factory=list[str])
    misses: dict[str, str] = field(default_factory=dict[str, str])
    tokens: str | None = None


def raise_operators(model: onnx.ModelProto) -> Raising:
    """Put operators in place of what spells them out, in place.

    Args:
        model: The model, checked; nodes that no output needs go where something was raised.

    Returns:
        What was raised, and what was left alone and why.

    Raises:
        UnsupportedModelError: if the model's shapes contradict each other.
    """
    done = Raising(tokens=dropped_tokens(model))
    _raise_convolutions(model, done)
    _raise_scans(model, done)
    _raise_single_values(model, done)
    if done.tokens is not None:
        _raise_steps(model, done, done.tokens)
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
    types = infer_types(model if done.tokens is None else _for_one_token(model, done.tokens))
    values, readers = Values(graph, types), Readers(graph)
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


def _raise_single_values(model: onnx.ModelProto, done: Raising) -> None:
    graph = model.graph
    if not any(node.op_type == "LinearAttention" for node in graph.node):
        return
    values = Values(graph, infer_types(model))
    found: list[Raised] = []
    for node in graph.node:
        try:
            if is_single_value(node, values):
                found.append(raise_single_value(node, values))
        except NotProvenError as error:
            done.notes.append(f"not raised: LinearAttention '{node.name}' {error}")
    _put(model, found, done)


def _raise_steps(model: onnx.ModelProto, done: Raising, tokens: str) -> None:
    """In a graph that takes one token a call."""
    graph = model.graph
    values, readers = Values(graph, infer_types(model)), Readers(graph)
    inputs = {v.name for v in graph.input} - {t.name for t in graph.initializer}
    found: list[Raised] = []
    for node in graph.node:
        state = state_of_step(node, values, inputs)
        if state is None:
            continue
        try:
            found.append(raise_step(node, state, Size.of(tokens), values, readers))
        except NotProvenError as error:
            done.notes.append(f"not raised: step '{node.name}' {error}")
    _put(model, found, done)


def _for_one_token(model: onnx.ModelProto, tokens: str) -> onnx.ModelProto:
    """A copy of a model for calls of one token."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in (*copy.graph.input, *copy.graph.output, *copy.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            size = evaluate(dim.dim_param, {tokens: 1}) if dim.HasField("dim_param") else None
            if size is not None:
                dim.dim_value = size
    return copy


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
    import_internal(model)
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
