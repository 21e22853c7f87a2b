"""A Scan over tokens that computes a linear recurrence becomes LinearAttention, or SelectiveScan if it is Mamba-1's."""

from __future__ import annotations

from dataclasses import replace

import onnx

from ..schema import domain_of
from .algebra import Algebra, NotProvenError, Tensor
from .interpret import Interpreter
from .moves import Raised, trace
from .products import ProductAlgebra, Products
from .readers import Readers
from .recurrence import NEXT, STATE, match_recurrence
from .selective import match_selective
from .values import Values, is_zero
from .write_recurrence import Loop, Outcome, write_recurrence
from .write_selective import SelectiveWriter, require_f32


def raise_scan(node: onnx.NodeProto, values: Values, readers: Readers) -> tuple[Raised, Outcome]:
    """What takes the place of a Scan, and where its output is then.

    Raises:
        NotProvenError: if it computes something else, or not provably LinearAttention; the message begins with where.
    """
    loop = _read(node, values)
    selective = len(values.shape(loop.state) or ()) == 3
    try:
        if loop.constants:
            raise NotProvenError(f"carries {1 + len(loop.constants)} states from token to token instead of one")
        algebra = Algebra()
        update, output = _run_body(loop, values, algebra)
        return write_recurrence(node.name, loop, values, readers, algebra, match_recurrence(update, output))
    except NotProvenError as error:
        if not selective:
            raise
        why = error
    try:
        return _raise_selective_scan(node.name, loop, values)
    except NotProvenError as error:
        raise NotProvenError(f"{why}, and as Mamba-1's selective scan it {error}") from error


def _raise_selective_scan(name: str, loop: Loop, values: Values) -> tuple[Raised, Outcome]:
    """SelectiveScan in the place of a loop."""
    if not loop.inputs:
        raise NotProvenError("reads nothing at each token")
    first, value = next(iter(loop.inputs.items()))
    algebra = ProductAlgebra((values.shape(value) or ())[loop.axes[first]])
    found = match_selective(algebra, *_run_selective(loop, values, algebra))
    scan = SelectiveWriter(algebra, values, name, found, algebra.token)
    require_f32(values, loop.state)
    result = scan.write("" if is_zero(values, loop.state) else loop.state, loop.final)
    axes = list(found.output)
    axes.insert(loop.output_axis % (len(axes) + 1), algebra.token)
    writer = scan.writer
    writer.rearrange(result, scan.layout, axes, loop.output)
    for after, before in loop.unchanged.items():
        writer.node("Identity", [before], [after])
    values.shapes[loop.output] = tuple(algebra.size(axis) for axis in axes)
    raised = Raised(f"Scan '{name}' -> SelectiveScan", writer.nodes, writer.initializers)
    return raised, Outcome(loop.output, result, algebra, tuple(axes), scan.layout)


def _read(node: onnx.NodeProto, values: Values) -> Loop:
    attributes = {a.name: a for a in node.attribute}
    body, count = attributes["body"].g, attributes["num_scan_inputs"].i
    states = len(node.input) - count
    if len(body.input) != len(node.input) or len(body.output) != len(node.output) or not all(node.input):
        raise NotProvenError("has other inputs or outputs than its body")
    same = [i for i in range(states) if _through_identities(body, body.output[i].name) == body.input[i].name]
    if states - len(same) != 1 or 0 in same:
        raise NotProvenError(f"carries {states} states from token to token instead of one")
    scanned = len(node.output) - states
    used = [i for i in range(scanned) if node.output[states + i]]
    if len(used) != 1:
        raise NotProvenError(f"gives {len(used)} outputs a token instead of one")
    for name in ("scan_input_directions", "scan_output_directions"):
        if name in attributes and any(attributes[name].ints):
            raise NotProvenError("runs from the last token to the first")
    axes = list(attributes["scan_input_axes"].ints) if "scan_input_axes" in attributes else [0] * count
    out_axes = list(attributes["scan_output_axes"].ints) if "scan_output_axes" in attributes else [0] * scanned
    if len(axes) != count or len(out_axes) != scanned:
        raise NotProvenError("has another number of axes than inputs or outputs")
    names = [v.name for v in body.input]
    ranks = [len(values.shape(name) or ()) for name in node.input[states:]]
    if any(not -rank <= axis < rank for axis, rank in zip(axes, ranks, strict=True)):
        raise NotProvenError("scans an axis that is not there, or inputs of unknown shape")
    return Loop(
        node.input[0],
        dict(zip(names[states:], node.input[states:], strict=True)),
        {name: axis % rank for name, axis, rank in zip(names[states:], axes, ranks, strict=True)},
        node.output[0],
        node.output[states + used[0]],
        out_axes[used[0]],
        body.output[states + used[0]].name,
        body,
        {names[i]: node.input[i] for i in same},
        {node.output[i]: node.input[i] for i in same if node.output[i]},
    )


def _run_body(loop: Loop, outer: Values, algebra: Algebra) -> tuple[Tensor, Tensor]:
    """The state after a step, of the state before it; the output, of the state after it."""
    body = Body(loop, outer, algebra)
    for name, value in loop.inputs.items():
        source = trace(algebra, outer, value, scales=True)
        sizes = [algebra.size(axis) for i, axis in enumerate(source.axes) if i != loop.axes[name]]
        body.give(name, algebra.input(name, sizes), outer.element_type(value))
    return body.run()


def _run_selective(loop: Loop, outer: Values, algebra: ProductAlgebra) -> tuple[Tensor, Tensor]:
    """The same, of what the loop's inputs are products of."""
    body, products = Body(loop, outer, algebra), Products(algebra, outer)
    for name, value in loop.inputs.items():
        tensor = products.of(value)
        if len(tensor.axes[loop.axes[name]]) > 1:
            tensor = products.input(value)
        axis = tensor.axes[loop.axes[name]]
        tensor = replace(tensor, axes=tuple(a for i, a in enumerate(tensor.axes) if i != loop.axes[name]))
        body.give(name, algebra.rename(tensor, dict.fromkeys(axis, algebra.token)), outer.element_type(value))
    for name, value in loop.constants.items():
        body.give(name, products.of(value), outer.element_type(value))
    for name in body.captured():
        body.give(name, products.of(name), outer.element_type(name))
    return body.run()


class Body:
    """The body of a loop on tensors.

    Args:
        loop: The loop.
        outer: The graph around it.
        algebra: Where variables come from.
    """

    def __init__(self, loop: Loop, outer: Values, algebra: Algebra) -> None:
        self._loop, self._algebra = loop, algebra
        self._values = Values(loop.body, outer.types, outer)
        self._known: dict[str, Tensor] = {}
        self._types: dict[str, int] = {}
        shape = outer.shape(loop.state)
        if shape is None:
            raise NotProvenError("starts from a state whose shape is not known")
        self._shape = shape
        self._carried = _through_identities(loop.body, loop.body.output[0].name)
        self.give(loop.body.input[0].name, algebra.input(STATE, shape), outer.element_type(loop.state))
        self._nodes = _needed(loop.body, [self._carried, loop.output_name])

    def give(self, name: str, tensor: Tensor, kind: int) -> None:
        """What a value of the body is, and its element type."""
        self._known[name], self._types[name] = tensor, kind
        self._values.shapes[name] = self._algebra.shape(tensor)

    def captured(self) -> list[str]:
        """The values around it that it reads, but for numbers, axes and shapes."""
        own = {name for node in self._loop.body.node for name in node.output} | self._known.keys()
        reads = dict.fromkeys(name for node in self._nodes for name in node.input if name)
        return [n for n in reads if n not in own and self._values.constant(n) is None and self._values.sizes(n) is None]

    def run(self) -> tuple[Tensor, Tensor]:
        """The state after a step, of the state before it; the output, of the state after it."""
        loop, carried, algebra, known = self._loop, self._carried, self._algebra, self._known
        run = Interpreter(algebra, self._values, self._types)
        update: Tensor | None = known.get(carried)
        for node in self._nodes:
            if node.op_type == "Constant" and domain_of(node) == "":
                continue  # read where it is used
            try:
                tensor = run.run(node, known)
            except NotProvenError as error:
                raise NotProvenError(f"in its body node '{node.name}' ({node.op_type}) {error}") from error
            if node.output[0] == carried:
                update = tensor
                tensor = replace(algebra.input(NEXT, algebra.shape(tensor)), rounded=tensor.rounded)
            known[node.output[0]] = tensor
            self._values.shapes[node.output[0]] = algebra.shape(tensor)
        if update is None or loop.output_name not in known:
            raise NotProvenError("gives what its body does not compute")
        if algebra.shape(update) != self._shape:
            raise NotProvenError("carries a state that changes its shape")
        return update, known[loop.output_name]


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
