"""What a node tells of sizes: the elements of a list of sizes that it computes, the shape of what it makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import onnx

from ..schema import attributes_of
from .sizes import Size, product

if TYPE_CHECKING:
    from .values import Values

MAX_ELEMENTS = 64
"""Of a constant that is looked at: axes, shapes, scales."""


def _shape(values: Values, node: onnx.NodeProto, depth: int) -> tuple[Size, ...] | None:
    dims = values.shape(node.input[0], depth)
    attributes = {a.name: a.i for a in node.attribute}
    return None if dims is None else dims[slice(attributes.get("start", 0), attributes.get("end"))]


def _concat(values: Values, node: onnx.NodeProto, depth: int) -> tuple[Size, ...] | None:
    result: tuple[Size, ...] = ()
    for name in node.input:
        part = values.sizes(name, depth)
        if part is None or len(result) + len(part) > MAX_ELEMENTS:
            return None
        result += part
    return result


def _same(values: Values, node: onnx.NodeProto, depth: int) -> tuple[Size, ...] | None:
    if node.op_type == "Cast" and attributes_of(node).get("to") not in (onnx.TensorProto.INT64, onnx.TensorProto.INT32):
        return None
    return values.sizes(node.input[0], depth)


def _pick(values: Values, node: onnx.NodeProto, depth: int) -> tuple[Size, ...] | None:
    sizes, places = values.sizes(node.input[0], depth), values.constant(node.input[1], depth)
    if sizes is None or places is None or any(not -len(sizes) <= p < len(sizes) for p in places.reshape(-1)):
        return None
    return tuple(sizes[int(p)] for p in places.reshape(-1))


def _cut(values: Values, node: onnx.NodeProto, depth: int) -> tuple[Size, ...] | None:
    sizes = values.sizes(node.input[0], depth)
    bounds = [values.constant(name, depth) if name else None for name in node.input[1:]]
    if sizes is None or any(b is None or b.size != 1 for b, n in zip(bounds, node.input[1:], strict=True) if n):
        return None
    numbers = [None if b is None else int(b.reshape(())) for b in bounds]
    start, end = numbers[:2]
    step = numbers[3] if len(numbers) > 3 else None
    return sizes[slice(start, end, step)] if (step or 1) > 0 else None


def _arithmetic(operation: Callable[[Size, Size], Size | None]) -> Callable[[Values, onnx.NodeProto, int], Any]:
    def evaluate(values: Values, node: onnx.NodeProto, depth: int) -> tuple[Size, ...] | None:
        one, other = (values.sizes(name, depth) for name in node.input)
        if one is None or other is None or (len(one) != len(other) and 1 not in (len(one), len(other))):
            return None
        count = max(len(one), len(other))
        results = [operation(one[i % len(one)], other[i % len(other)]) for i in range(count)]
        known = tuple(result for result in results if result is not None)
        return known if len(known) == count else None

    return evaluate


Rule = Callable[["Values", onnx.NodeProto, int], "tuple[Size, ...] | None"]

LISTS: dict[str, Rule] = {
    "Shape": _shape,
    "Concat": _concat,
    "Gather": _pick,
    "Slice": _cut,
    "Add": _arithmetic(Size.__add__),
    "Sub": _arithmetic(Size.__sub__),
    "Mul": _arithmetic(Size.__mul__),
    "Div": _arithmetic(Size.divided_by),
} | dict.fromkeys(("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"), _same)
"""What computes the elements of a list of sizes."""


def _like_input(values: Values, node: onnx.NodeProto, depth: int) -> tuple[Size, ...] | None:
    return values.shape(node.input[0], depth)


def _like_list(values: Values, node: onnx.NodeProto, depth: int) -> tuple[Size, ...] | None:
    return values.sizes(node.input[0], depth)


def _broadcast(values: Values, node: onnx.NodeProto, depth: int) -> tuple[Size, ...] | None:
    one, other = (values.shape(name, depth) for name in node.input)
    if one is None or other is None:
        return None
    rank = max(len(one), len(other))
    first, second = ((Size.of(1),) * (rank - len(shape)) + shape for shape in (one, other))
    return tuple(
        b if a.value == 1 or (a.value is None and b.value not in (1, None)) else a
        for a, b in zip(first, second, strict=True)
    )


def _concatenated(values: Values, node: onnx.NodeProto, depth: int) -> tuple[Size, ...] | None:
    parts = [values.shape(name, depth) for name in node.input]
    known = [part for part in parts if part is not None]
    if len(known) != len(parts) or len({len(part) for part in known}) != 1 or not known[0]:
        return None
    axis = int(str(attributes_of(node).get("axis", 0))) % len(known[0])
    total = Size.of(0)
    for part in known:
        total = total + part[axis]
    return (*known[0][:axis], total, *known[0][axis + 1 :])


def _transposed(values: Values, node: onnx.NodeProto, depth: int) -> tuple[Size, ...] | None:
    shape = values.shape(node.input[0], depth)
    permutation = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
    if shape is None or (permutation is not None and sorted(permutation) != list(range(len(shape)))):
        return None
    return tuple(shape[i] for i in permutation) if permutation is not None else shape[::-1]


def _reshaped(values: Values, node: onnx.NodeProto, depth: int) -> tuple[Size, ...] | None:
    shape, wanted = values.shape(node.input[0], depth), values.sizes(node.input[1], depth)
    if shape is None or wanted is None:
        return None
    if not attributes_of(node).get("allowzero"):
        if any(size.value == 0 and i >= len(shape) for i, size in enumerate(wanted)):
            return None
        wanted = tuple(shape[i] if size.value == 0 else size for i, size in enumerate(wanted))
    known = product(size for size in wanted if size.value != -1)
    rest = product(shape).divided_by(known)
    return None if rest is None else tuple(rest if size.value == -1 else size for size in wanted)


def _unsqueezed(values: Values, node: onnx.NodeProto, depth: int) -> tuple[Size, ...] | None:
    shape = values.shape(node.input[0], depth)
    axes = values.constant(node.input[1], depth) if len(node.input) > 1 else None
    if shape is None or axes is None:
        return None
    rank = len(shape) + axes.size
    places = {int(axis) % rank for axis in axes.reshape(-1)}
    old = iter(shape)
    return tuple(Size.of(1) if i in places else next(old) for i in range(rank)) if len(places) == axes.size else None


def _tiled(values: Values, node: onnx.NodeProto, depth: int) -> tuple[Size, ...] | None:
    shape, counts = values.shape(node.input[0], depth), values.sizes(node.input[1], depth)
    if shape is None or counts is None or len(shape) != len(counts):
        return None
    return tuple(size * count for size, count in zip(shape, counts, strict=True))


SHAPES: dict[str, Rule] = {
    "ConstantOfShape": _like_list,
    "Concat": _concatenated,
    "Transpose": _transposed,
    "Reshape": _reshaped,
    "Unsqueeze": _unsqueezed,
    "Tile": _tiled,
    **dict.fromkeys(("Cast", "CastLike", "Clip", "Exp", "Identity", "Neg", "Relu", "Sigmoid", "Softplus"), _like_input),
    **dict.fromkeys(("Add", "Div", "Mul", "Sub"), _broadcast),
}
"""What tells more of an output's shape than inference does."""
