"""A Scan over tokens that computes a linear recurrence becomes LinearAttention."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx
from linattn.dialect_patterns.op import MICROSOFT

from ..schema import domain_of
from .algebra import Algebra, Index, NotProvenError, Tensor, substitute
from .interpret import Interpreter
from .moves import Raised, Writer, trace
from .recurrence import NEXT, STATE, Recurrence, match_recurrence
from .values import Values

_FLOATS = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT)


@dataclass(frozen=True)
class _Loop:
    """A Scan in one direction with one state.

    Attributes:
        state: Value of the state before the first token.
        inputs: Values that are scanned, by their names in the body.
        axes: Axis of the tokens in each of them.
        final: Value of the state after the last token; empty if it is left out.
        output: Value with the outputs of all tokens.
        output_axis: Axis of the tokens in it.
        output_name: The output's name in the body.
        body: The step.
    """

    state: str
    inputs: dict[str, str]
    axes: dict[str, int]
    final: str
    output: str
    output_axis: int
    output_name: str
    body: onnx.GraphProto


@dataclass(frozen=True)
class Outcome:
    """Where the output of a raised Scan is.

    Attributes:
        output: The Scan's output.
        result: The operator's, the same elements in another layout.
        algebra: Where the indices are from.
        axes: Index of each axis of the Scan's output.
        layout: Index of each axis of the operator's.
    """

    output: str
    result: str
    algebra: Algebra
    axes: tuple[Index, ...]
    layout: tuple[Index, ...]

    def is_result(self, values: Values, name: str) -> bool:
        """Whether a value that is moved from the Scan's output is the operator's output again."""
        try:
            source = trace(self.algebra, values, name)
            if source.root != self.output:
                return False
            axes, layout = source.axes, self.layout
            for theirs, ours in zip(source.index, self.axes, strict=True):
                for_theirs, for_ours = self.algebra.match(theirs, ours) if theirs and ours else ({}, {})
                axes = tuple(substitute(i, for_theirs) for i in axes)
                layout = tuple(substitute(i, for_ours) for i in layout)
        except NotProvenError:
            return False
        return axes == layout


def raise_scan(node: onnx.NodeProto, values: Values) -> tuple[Raised, Outcome]:
    """What takes the place of a Scan, and where its output is then.

    Raises:
        NotProvenError: if it computes something else, or not provably LinearAttention; the message begins with where.
    """
    loop = _read(node, values)
    algebra = Algebra()
    update, output = _run_body(loop, values, algebra)
    return _write(node, loop, values, algebra, match_recurrence(update, output))


def _read(node: onnx.NodeProto, values: Values) -> _Loop:
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
    return _Loop(
        node.input[0],
        dict(zip(names[1:], node.input[1:], strict=True)),
        {name: axis % rank for name, axis, rank in zip(names[1:], axes, ranks, strict=True)},
        node.output[0],
        node.output[1 + used[0]],
        out_axes[used[0]],
        body.output[1 + used[0]].name,
        body,
    )


def _run_body(loop: _Loop, outer: Values, algebra: Algebra) -> tuple[Tensor, Tensor]:
    """The state after a step, of the state before it; the output, of the state after it."""
    body = loop.body
    values = Values(body, outer.types, outer)
    state, carried = body.input[0].name, _through_identities(body, body.output[0].name)
    shape = outer.shape(loop.state)
    if shape is None:
        raise NotProvenError("starts from a state whose shape is not known")
    types = {state: outer.element_type(loop.state)}
    known = {state: _named(algebra.input(state, shape), STATE)}
    for name, value in loop.inputs.items():
        source = trace(algebra, outer, value, scales=True)
        sizes = [algebra.size(axis) for i, axis in enumerate(source.axes) if i != loop.axes[name]]
        known[name] = algebra.input(name, sizes)
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


def _write(
    node: onnx.NodeProto, loop: _Loop, values: Values, algebra: Algebra, found: Recurrence
) -> tuple[Raised, Outcome]:
    """The operator, between moves that bring its operands and its output into place."""
    writer = Writer(algebra, node.name)
    heads = algebra.size(found.heads).value
    if heads is None or algebra.size(found.group).value is None:
        raise NotProvenError("has an open number of heads")
    dtype = values.element_type(loop.output)
    kinds = {role: values.element_type(loop.inputs[operand.name]) for role, operand in found.operands.items()}
    if any(kind not in _FLOATS for kind in (dtype, *kinds.values())):
        raise NotProvenError("computes with other types than f32, f16 and bf16")
    wide = dtype if set(kinds.values()) == {dtype} else onnx.TensorProto.FLOAT
    operands = {role: _operand(loop, values, algebra, found, role) for role in found.operands}
    inputs: dict[str, str] = {}
    for role, operand in operands.items():
        value = writer.rearrange(operand.root, operand.index, operand.layout)
        inputs[role] = value if kinds[role] == wide else writer.node("Cast", [value], to=wide)
    order = found.roles.order
    direct = order == (0, 1, 2, 3)
    state = loop.state if direct else writer.node("Transpose", [loop.state], perm=list(order))
    final = loop.final if direct or not loop.final else f"{node.name}.state"
    raised = f"{node.name}.raised"
    ports = [inputs["query"], inputs["key"], inputs["value"], state, inputs.get("decay", ""), inputs.get("beta", "")]
    while not ports[-1]:
        ports.pop()
    writer.node(
        "LinearAttention", ports, [raised, final], domain=MICROSOFT, name=node.name, update_rule=found.rule,
        q_num_heads=operands["query"].heads, kv_num_heads=heads, scale=found.scale * operands["query"].scale,
    )  # fmt: skip
    if final != loop.final:
        writer.node("Transpose", [final], [loop.final], perm=[order.index(i) for i in range(4)])
    result = raised if wide == dtype else writer.node("Cast", [raised], to=dtype)
    token = _token(algebra, values, loop, next(iter(loop.inputs)))
    axes = list(found.output)
    axes.insert(loop.output_axis % (len(axes) + 1), token)
    layout = (found.batch, token, found.heads + found.group + found.value)
    writer.rearrange(result, layout, axes, loop.output)
    what = f"Scan '{node.name}' -> LinearAttention ({found.rule})"
    return Raised(what, writer.nodes, writer.initializers), Outcome(loop.output, result, algebra, tuple(axes), layout)


@dataclass(frozen=True)
class _Placed:
    """An operand that is [batch, tokens, heads * size] after a move.

    Attributes:
        root: The value to move.
        index: Index of each of its axes.
        layout: The three axes wanted.
        heads: How many it has.
        scale: Factor that the root lacks.
    """

    root: str
    index: tuple[Index, ...]
    layout: tuple[Index, Index, Index]
    heads: int
    scale: float


def _token(algebra: Algebra, values: Values, loop: _Loop, name: str) -> Index:
    """An index of the tokens, as an input has them."""
    shape = values.shape(loop.inputs[name])
    assert shape is not None  # it has been read
    size = shape[loop.axes[name]]
    return () if size.value == 1 else (algebra.new(size),)


def _operand(loop: _Loop, values: Values, algebra: Algebra, found: Recurrence, role: str) -> _Placed:
    """Where an operand is, as far back as moves can be undone, and what is left to move."""
    operand = found.operands[role]
    outer = loop.inputs[operand.name]
    token = _token(algebra, values, loop, operand.name)
    own = list(operand.index)
    own.insert(loop.axes[operand.name], token)
    used = {v for index in own for v in index}
    heads = tuple(v for v in found.heads + (found.group if role == "query" else ()) if v in used)
    tail = tuple(v for v in found.key + found.value if v in used)
    source = trace(algebra, values, outer, scales=role == "query")
    renames: dict[int, Index] = {}
    index = source.index
    for theirs, ours in zip(source.axes, own, strict=True):
        for_theirs, for_ours = algebra.match(theirs, ours) if theirs and ours else ({}, {})
        index = tuple(substitute(i, for_theirs) for i in index)
        renames |= for_ours
    # The source's variables stand for the operand's from here on.
    batch, token, heads, tail = (substitute(i, renames) for i in (found.batch, token, heads, tail))
    have = {v for i in index for v in i}
    missing = [v for v in (*batch, *token, *heads, *tail) if v not in have]
    fewer = heads[: len(heads) - len(missing)]
    may_repeat = role in ("query", "key") and not found.group
    root, scale = source.root, source.scale
    if missing and not (may_repeat and heads[len(fewer) :] == tuple(missing)):
        root, index, scale, fewer = outer, tuple(substitute(i, renames) for i in own), 1.0, heads
    if operand.is_exp:
        root = _before_exp(values, root)
    count = algebra.size(fewer).value
    if count is None:
        raise NotProvenError("has an open number of heads")
    return _Placed(root, index, (batch, token, fewer + tail), count, scale)


def _before_exp(values: Values, name: str) -> str:
    node = values.producers.get(name)
    if node is None or node.op_type != "Exp" or domain_of(node) != "":
        raise NotProvenError(f"scales the state by '{name}', which is no exponential")
    return node.input[0]
