"""LinearAttention in the place of a loop, between the moves that its operands and its output need."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
from linattn.dialect_patterns.op import MICROSOFT

from ..schema import domain_of
from .algebra import Algebra, Index, NotProvenError, substitute
from .moves import Raised, Writer, trace
from .readers import Readers, is_cast
from .recurrence import Recurrence
from .values import Values, is_zero

_FLOATS = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT)


@dataclass(frozen=True)
class Loop:
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
        constants: Values that the body is given at every token, by their names in it.
        unchanged: The loop's outputs of these, and what they are.
    """

    state: str
    inputs: dict[str, str]
    axes: dict[str, int]
    final: str
    output: str
    output_axis: int
    output_name: str
    body: onnx.GraphProto
    constants: dict[str, str]
    unchanged: dict[str, str]


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


def write_recurrence(
    name: str, loop: Loop, values: Values, readers: Readers, algebra: Algebra, found: Recurrence
) -> tuple[Raised, Outcome]:
    """The operator, and where the loop's output is then.

    Args:
        name: Of the loop, and of the operator.
        loop: The loop.
        values: The graph.
        readers: Who reads its values.
        algebra: Where the recurrence's variables are from.
        found: What the loop computes.

    Raises:
        NotProvenError: if the operator cannot be given its operands.
    """
    writer = Writer(algebra, name, values.names)
    heads = algebra.size(found.heads).value
    if heads is None or algebra.size(found.group).value is None:
        raise NotProvenError("has an open number of heads")
    dtype = values.element_type(loop.output)
    kinds = {role: values.element_type(loop.inputs[operand.name]) for role, operand in found.operands.items()}
    if any(kind not in _FLOATS for kind in (dtype, values.element_type(loop.state), *kinds.values())):
        raise NotProvenError("computes with other types than f32, f16 and bf16")
    wide = dtype if set(kinds.values()) == {dtype} else onnx.TensorProto.FLOAT
    operands = {role: _operand(loop, values, algebra, found, role) for role in found.operands}
    scale = float(np.float32(found.scale * operands["query"].scale))
    if scale == 0 or not math.isfinite(scale):  # 0 is the operator's word for 1/sqrt(dk)
        raise NotProvenError(f"scales its output by {scale:g}")
    inputs: dict[str, str] = {}
    for role, operand in operands.items():
        value = writer.rearrange(operand.root, operand.index, operand.layout)
        inputs[role] = value if kinds[role] == wide else writer.node("Cast", [value], to=wide)
    state, finals = _state_ports(loop, values, readers, wide)
    order = found.roles.order
    direct = order == (0, 1, 2, 3)
    if state and not direct:
        state = writer.node("Transpose", [state], perm=list(order))
    last = "" if not finals else finals[0] if direct else values.names.new(f"{name}.state")
    raised = values.names.new(f"{name}.raised")
    ports = [inputs["query"], inputs["key"], inputs["value"], state, inputs.get("decay", ""), inputs.get("beta", "")]
    while not ports[-1]:
        ports.pop()
    writer.node(
        "LinearAttention", ports, [raised, last], domain=MICROSOFT, name=name, update_rule=found.rule,
        q_num_heads=operands["query"].heads, kv_num_heads=heads, scale=scale,
    )  # fmt: skip
    if finals and not direct:
        writer.node("Transpose", [last], [finals[0]], perm=[order.index(i) for i in range(4)])
    for other in finals[1:]:
        writer.node("Identity", [finals[0]], [other])
    result = raised if wide == dtype else writer.node("Cast", [raised], to=dtype)
    token = operands["query"].layout[1]
    axes = list(found.output)
    axes.insert(loop.output_axis % (len(axes) + 1), token)
    layout = (found.batch, token, found.heads + found.group + found.value)
    writer.rearrange(result, layout, axes, loop.output)
    values.shapes[loop.output] = tuple(algebra.size(axis) for axis in axes)
    what = f"Scan '{name}' -> LinearAttention ({found.rule})"
    return Raised(what, writer.nodes, writer.initializers), Outcome(loop.output, result, algebra, tuple(axes), layout)


def _state_ports(loop: Loop, values: Values, readers: Readers, dtype: int) -> tuple[str, list[str]]:
    """The state before the first token, and the values that the state after the last one is.

    A state that a loop keeps in f32 between casts from and to a type of its own is the operator's in that type; zeros
    are no state, and then the type is ``dtype``.
    """
    finals = [loop.final] if loop.final else []
    cast = values.producers.get(loop.state)
    zero = is_zero(values, loop.state)
    if zero:
        before, own = "", dtype
        if values.element_type(loop.state) == own:
            return "", finals
    elif cast is not None and is_cast(cast):
        before, own = cast.input[0], values.element_type(cast.input[0])
    else:
        return loop.state, finals
    after = readers.only(loop.final)
    outer = {values.element_type(node.output[0]) for node in after}
    moved = all(is_cast(node) and node.input[0] == loop.final for node in after)
    if not moved or outer != {own} or own not in _FLOATS or values.element_type(loop.state) != onnx.TensorProto.FLOAT:
        return loop.state, finals
    return before, [node.output[0] for node in after]


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


def _operand(loop: Loop, values: Values, algebra: Algebra, found: Recurrence, role: str) -> _Placed:
    """Where an operand is, as far back as moves can be undone, and what is left to move."""
    operand = found.operands[role]
    outer = loop.inputs[operand.name]
    source = trace(algebra, values, outer, scales=role == "query")
    axis = loop.axes[operand.name]
    token: Index = (algebra.new(algebra.size(source.axes[axis])),) if source.axes[axis] else ()
    own = list(operand.index)
    own.insert(axis, token)
    used = {v for index in own for v in index}
    heads = tuple(v for v in found.heads + (found.group if role == "query" else ()) if v in used)
    tail = tuple(v for v in found.key + found.value if v in used)
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
