"""A depthwise Conv over what was before and what is new becomes CausalConvWithState.

all = Concat(past, x);  y = Conv(all, weight);  present = last columns of all
and where there are: y + bias, y * Sigmoid(y), a Slice of y's last columns where the past has more than Conv needs
"""

from __future__ import annotations

import numpy as np
import onnx
from linattn.dialect_patterns.op import MICROSOFT

from ..schema import attributes_of, domain_of
from .algebra import Algebra, NotProvenError
from .moves import Raised, Writer, trace
from .readers import Readers, is_cast
from .sizes import Size
from .values import Values, is_zero

_FLOATS = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT}
_MAX_TAPS = 256  # of the operator
_FAR = (1 << 31) - 1
"""An end from here on means the last column."""


def is_candidate(node: onnx.NodeProto, values: Values) -> bool:
    """Whether a node is a depthwise convolution of a Concat."""
    if node.op_type != "Conv" or domain_of(node) != "" or attributes_of(node).get("group", 1) == 1:
        return False
    before = values.producers.get(node.input[0])
    return before is not None and before.op_type == "Concat" and domain_of(before) == ""


def raise_convolution(node: onnx.NodeProto, values: Values, readers: Readers) -> Raised:
    """What takes the place of a Conv that :func:`is_candidate`.

    Raises:
        NotProvenError: if it is not provably CausalConvWithState.
    """
    concat = values.producers[node.input[0]]
    if len(concat.input) != 2:
        raise NotProvenError(f"reads a Concat of {len(concat.input)} values instead of a state and an input")
    past, x = concat.input
    if any(other.op_type == "Conv" and other.name != node.name for other in readers.of(concat.output[0])):
        raise NotProvenError("reads a state that another Conv reads too")
    if any(values.may_depend(name, on=concat.output[0]) for name in node.input[1:]):
        raise NotProvenError("has a kernel or a bias that is computed from its state")
    shapes = [values.shape(name) for name in (past, x, node.input[1])]
    before, new, weight = shapes
    if before is None or new is None or weight is None or {len(before), len(new), len(weight)} != {3}:
        raise NotProvenError("is not a convolution along one axis of known shape")
    if int(str(attributes_of(concat).get("axis", 0))) % 3 != 2:
        raise NotProvenError("reads a Concat along another axis than the last")
    taps, dilation = _taps(node, weight)
    kinds = {values.element_type(name) for name in (past, x, *node.input[1:]) if name}
    if len(kinds) != 1 or not kinds <= _FLOATS:
        raise NotProvenError("computes with other types than f32, f16 and bf16, or with several")
    held, needed = before[2].value, (taps - 1) * dilation
    if held is None or held < needed or not needed:
        raise NotProvenError(f"reads {before[2]} columns of state, where {taps} taps need {needed}")
    slices = [n for n in readers.of(concat.output[0]) if n.op_type == "Slice" and domain_of(n) == ""]
    ends = [n.output[0] for n in slices if _is_range(n, values, new[2], before[2] + new[2])]
    others = [n.name for n in slices if n.output[0] not in ends]
    zero = held == needed and is_zero(values, past)
    if others or not (ends or zero):
        how = f"Slice '{others[0]}' takes others than its last {held} columns" if others else "no Slice takes the next"
        raise NotProvenError(f"reads a state of {held} columns, but {how}")
    writer = Writer(Algebra(), node.name, values.names)
    result, following = _cut(node, values, readers, held - needed, new[2])
    result, following, bias = _bias(writer, node, values, readers, result, following, weight[0])
    result, activation = _activation(values, readers, result, following)
    state = "" if zero else past if held == needed else _columns(writer, past, held - needed, held)
    present = "" if not ends else ends[0] if held == needed else values.names.new(f"{node.name}.present")
    attributes: dict[str, object] = {"activation": activation} if activation != "none" else {}
    if dilation != 1:
        attributes["dilation"] = dilation
    ports = [x, node.input[1], bias, state]
    while not ports[-1]:
        ports.pop()
    writer.node("CausalConvWithState", ports, [result, present], domain=MICROSOFT, name=node.name, **attributes)
    if held > needed:
        older = _columns(writer, concat.output[0], -held, -needed)
        writer.node("Concat", [older, present], [ends[0]], axis=2)
    for name in ends[1:]:
        writer.node("Identity", [ends[0]], [name])
    what = f"Conv '{node.name}' -> CausalConvWithState" + (f" ({activation})" if activation != "none" else "")
    return Raised(what, writer.nodes, writer.initializers)


def _taps(node: onnx.NodeProto, weight: tuple[Size, ...]) -> tuple[int, int]:
    """Taps and dilation of a convolution with a kernel a channel and nothing else."""
    attributes = attributes_of(node)
    channels, one, taps = (size.value for size in weight)
    if channels is None or taps is None or taps > _MAX_TAPS or one != 1 or attributes.get("group") != channels:
        raise NotProvenError("has no kernel of its own for each channel")
    if attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or any(_ints(attributes, "pads", 0)):
        raise NotProvenError("pads its input besides the state")
    if any(stride != 1 for stride in _ints(attributes, "strides", 1)):
        raise NotProvenError("leaves out columns (strides)")
    (dilation,) = _ints(attributes, "dilations", 1)
    return taps, dilation


def _ints(attributes: dict[str, object], name: str, default: int) -> list[int]:
    found = attributes.get(name, [default])
    return [int(v) for v in found] if isinstance(found, list) else [default]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def _cut(
    node: onnx.NodeProto, values: Values, readers: Readers, more: int, tokens: Size
) -> tuple[str, list[onnx.NodeProto]]:
    """The last ``tokens`` columns of the convolution, and who reads them."""
    name = node.output[0]
    following = readers.only(name)
    if not more:
        return name, following
    if len(following) != 1 or following[0].op_type != "Slice":
        raise NotProvenError("keeps columns from before the input")
    (cut,) = following
    if not _is_range(cut, values, Size.of(more), tokens + Size.of(more)):
        raise NotProvenError(f"is followed by Slice '{cut.name}', which does not take the input's columns")
    return cut.output[0], readers.only(cut.output[0])


def _bias(
    writer: Writer,
    node: onnx.NodeProto,
    values: Values,
    readers: Readers,
    result: str,
    following: list[onnx.NodeProto],
    channels: Size,
) -> tuple[str, list[onnx.NodeProto], str]:
    """The sum with a bias a channel, where one follows."""
    if len(node.input) > 2 and node.input[2]:
        return result, following, node.input[2]
    if len(following) != 1 or following[0].op_type != "Add" or domain_of(following[0]) != "":
        return result, following, ""
    (add,) = following
    other = next((name for name in add.input if name != result), "")
    if not other or values.may_depend(other, on=node.input[0]):
        return result, following, ""
    shape = values.shape(other)
    if shape is None or len(shape) > 3 or len(shape) < 2 or shape[-2:] != (channels, Size.of(1)):
        return result, following, ""
    if len(shape) == 3 and shape[0] != Size.of(1):
        return result, following, ""
    algebra = Algebra()
    try:
        source = trace(algebra, values, other)
        (index,) = [axis for axis in source.axes if axis]
        moved = Writer(algebra, f"{node.name}.bias", values.names)
        bias = moved.rearrange(source.root, source.index, [index])
    except (NotProvenError, ValueError):
        return result, following, ""
    writer.nodes += moved.nodes
    writer.initializers += moved.initializers
    return add.output[0], readers.only(add.output[0]), bias


def _activation(values: Values, readers: Readers, result: str, following: list[onnx.NodeProto]) -> tuple[str, str]:
    """``y * Sigmoid(y)``, where it follows, perhaps in f32."""
    name, wide = result, ""
    if len(following) == 1 and is_cast(following[0]):
        wide = following[0].output[0]
        if values.element_type(wide) != onnx.TensorProto.FLOAT:
            return result, "none"
        name, following = wide, readers.only(wide)
    end = ""
    if len(following) == 1 and _is_silu(following[0]):
        end = following[0].output[0]
    gates = [n for n in following if n.op_type == "Sigmoid" and domain_of(n) == ""]
    products = [n for n in following if n.op_type == "Mul" and domain_of(n) == ""]
    if len(following) == 2 and len(gates) == len(products) == 1:
        gate = gates[0].output[0]
        if sorted(products[0].input) == sorted((name, gate)) and readers.only(gate) == products:
            end = products[0].output[0]
    if not end:
        return result, "none"
    if wide:
        back = readers.only(end)
        if len(back) != 1 or not is_cast(back[0]):
            return result, "none"
        end = back[0].output[0]
        if values.element_type(end) != values.element_type(result):
            return result, "none"
    return end, "silu"


def _is_silu(node: onnx.NodeProto) -> bool:
    """Whether a node alone is ``y * Sigmoid(y)``: ONNX's, or ONNX Runtime's with its factor at 1."""
    alpha = {("", "Swish"): 1.0, (MICROSOFT, "QuickGelu"): 1.702}.get((domain_of(node), node.op_type))
    return alpha is not None and attributes_of(node).get("alpha", alpha) == 1.0


def _is_range(node: onnx.NodeProto, values: Values, start: Size, end: Size) -> bool:
    """Whether a Slice takes the columns from ``start`` to ``end``, the last one, along the last of three axes."""
    if len(node.input) < 3:
        return False
    ports = [values.sizes(name) if name else None for name in node.input[1:]]
    if any(port is None or len(port) != 1 for port, name in zip(ports, node.input[1:], strict=True) if name):
        return False
    first, last, *more = (port[0] if port else None for port in ports)
    axis, step = ((*more, None, None))[:2]
    if first is None or last is None or axis is None or axis.value not in (2, -1) or (step or Size.of(1)).value != 1:
        return False
    ends = last == end or (last.value or 0) >= _FAR
    return ends and (first == start or (first.value is not None and first.value < 0 and first == start - end))


def _columns(writer: Writer, name: str, start: int, end: int) -> str:
    """A Slice along the last axis."""
    label = len(writer.initializers)
    bounds = [
        writer.constant(f"{word}_{label}", np.array([value], np.int64))
        for word, value in (("from", start), ("to", end), ("axis", 2))
    ]
    return writer.node("Slice", [name, *bounds])
