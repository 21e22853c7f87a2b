"""A Scan over tokens that computes a linear recurrence becomes LinearAttention."""

from __future__ import annotations

from dataclasses import replace

import onnx

from ..schema import domain_of
from .algebra import Algebra, NotProvenError, Tensor
from .interpret import Interpreter
from .moves import Raised, trace
from .readers import Readers
from .recurrence import NEXT, STATE, match_recurrence
from .values import Values
from .write_recurrence import Loop, Outcome, write_recurrence


def raise_scan(node: onnx.NodeProto, values: Values, readers: Readers) -> tuple[Raised, Outcome]:
    """What takes the place of a Scan, and where its output is then.

    Raises:
        NotProvenError: if it computes something else, or not provably LinearAttention; the message begins with where.
    """
    loop = _read(node, values)
    algebra = Algebra()
    update, output = _run_body(loop, values, algebra)
    return write_recurrence(node.name, loop, values, readers, algebra, match_recurrence(update, output))


def _read(node: onnx.NodeProto, values: Values) -> Loop:
    attributes = {a.name: a for a in node.attribute}
    body, count = attributes["body"].g, attributes["num_scan_inputs"].i
    states = len(node.input) - count
    if states != 1:
        raise NotProvenError(f"carries {states} states from token to token instead of one")
    scanned = len(node.output) - 1
    used = [i for i in range(scanned) if node.output[1 + i]]
    if len(used) != 1:
        raise NotProvenError(f"gives {len(used)} outputs a token instead of one")
    for name in ("scan_input_directions", "scan_output_directions"):
        if name in attributes and any(attributes[name].ints):
            raise NotProvenError("runs from the last token to the first")
    axes = list(attributes["scan_input_axes"].ints) if "scan_input_axes" in attributes else [0] * count
    out_axes = list(attributes["scan_output_axes"].ints) if "scan_output_axes" in attributes else [0] * scanned
    if len(body.input) != len(node.input) or len(body.output) != len(node.output) or not all(node.input):
        raise NotProvenError("has other inputs or outputs than its body")
    if len(axes) != count or len(out_axes) != scanned:
        raise NotProvenError("has another number of axes than inputs or outputs")
    names = [v.name for v in body.input]
    ranks = [len(values.shape(name) or ()) for name in node.input[1:]]
    if any(not -rank <= axis < rank for axis, rank in zip(axes, ranks, strict=True)):
        raise NotProvenError("scans an axis that is not there, or inputs of unknown shape")
    return Loop(
        node.input[0],
        dict(zip(names[1:], node.input[1:], strict=True)),
        {name: axis % rank for name, axis, rank in zip(names[1:], axes, ranks, strict=True)},
        node.output[0],
        node.output[1 + used[0]],
        out_axes[used[0]],
        body.output[1 + used[0]].name,
        body,
    )


def _run_body(loop: Loop, outer: Values, algebra: Algebra) -> tuple[Tensor, Tensor]:
    """The state after a step, of the state before it; the output, of the state after it."""
    body = loop.body
    values = Values(body, outer.types, outer)
    state, carried = body.input[0].name, _through_identities(body, body.output[0].name)
    shape = outer.shape(loop.state)
    if shape is None:
        raise NotProvenError("starts from a state whose shape is not known")
    types = {state: outer.element_type(loop.state)}
    known = {state: _named(algebra.input(state, shape), STATE)}
    values.shapes[state] = shape
    for name, value in loop.inputs.items():
        source = trace(algebra, outer, value, scales=True)
        sizes = [algebra.size(axis) for i, axis in enumerate(source.axes) if i != loop.axes[name]]
        known[name] = algebra.input(name, sizes)
        values.shapes[name] = tuple(sizes)
        types[name] = outer.element_type(value)
    run = Interpreter(algebra, values, types)
    update: Tensor | None = known.get(carried)
    for node in _needed(body, [carried, loop.output_name]):
        if node.op_type == "Constant" and domain_of(node) == "":
            continue  # read where it is used
        try:
            tensor = run.run(node, known)
        except NotProvenError as error:
            raise NotProvenError(f"in its body node '{node.name}' ({node.op_type}) {error}") from error
        if node.output[0] == carried:
            update = tensor
            tensor = replace(_named(algebra.input(carried, algebra.shape(tensor)), NEXT), rounded=tensor.rounded)
        known[node.output[0]] = tensor
        values.shapes[node.output[0]] = algebra.shape(tensor)
    if update is None or loop.output_name not in known:
        raise NotProvenError("gives what its body does not compute")
    if algebra.shape(update) != shape:
        raise NotProvenError("carries a state that changes its shape")
    return update, known[loop.output_name]


def _named(tensor: Tensor, name: str) -> Tensor:
    """A tensor of one input, under another name."""
    (term,) = tensor.terms
    return replace(tensor, terms=(replace(term, factors=(replace(term.factors[0], name=name),)),))


def _through_identities(body: onnx.GraphProto, name: str) -> str:
    producers = {node.output[0]: node for node in body.node if node.op_type == "Identity" and domain_of(node) == ""}
    for _ in body.node:
        if name not in producers:
            break
        name = producers[name].input[0]
    return name


def _needed(body: onnx.GraphProto, names: list[str]) -> list[onnx.NodeProto]:
    """The nodes that values depend on, in order."""
    wanted = set(names)
    kept: list[onnx.NodeProto] = []
    for node in reversed(body.node):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    return kept[::-1]
