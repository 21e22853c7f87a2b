"""What is known of a graph's values before any size is bound: constants, lists of sizes, how values are moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from linattn.runtime.errors import LinattnError
from onnx import numpy_helper

from ..evaluate import evaluate_node
from ..schema import attributes_of, domain_of
from .sizes import Size

_MAX_ELEMENTS = 64
"""Of a constant that is looked at: axes, shapes, scales."""

_MAX_DEPTH = 64
"""Of a chain that computes a size or a scale."""

_COMPUTED_NAMES = """
    Add Cast CastLike Constant ConstantOfShape Div Exp Identity Mul Neg Pow Reciprocal Reshape Sqrt Squeeze Sub
    Unsqueeze
"""
_COMPUTED = frozenset(_COMPUTED_NAMES.split())

_SAME_SHAPE = frozenset(("Cast", "CastLike", "Clip", "Exp", "Identity", "Neg", "Relu", "Sigmoid", "Softplus", "Tanh"))


class Values:
    """The values of a graph, or of a body inside it that sees them too.

    Attributes:
        types: Inferred types of the outer graph's values.
        producers: Value -> the node that makes it.
        shapes: Shapes of which more is known than was inferred.
    """

    def __init__(
        self, graph: onnx.GraphProto, types: Mapping[str, onnx.TypeProto], outer: Values | None = None
    ) -> None:
        self.producers: dict[str, onnx.NodeProto] = {name: n for n in graph.node for name in n.output if name}
        self._initializers: dict[str, onnx.TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self.types: Mapping[str, onnx.TypeProto] = types
        self.shapes: dict[str, tuple[Size, ...]] = {}
        if outer is not None:  # a body's own names hide those around it
            own = {v.name for v in graph.input} | self.producers.keys() | self._initializers.keys()
            self.producers |= {name: n for name, n in outer.producers.items() if name not in own}
            self._initializers |= {name: t for name, t in outer._initializers.items() if name not in own}
            self.types = {name: proto for name, proto in types.items() if name not in own}
            self.shapes = {name: shape for name, shape in outer.shapes.items() if name not in own}
        self._constants: dict[str, np.ndarray[Any, Any] | None] = {}
        self._lists: dict[str, tuple[Size, ...] | None] = {}

    def element_type(self, name: str) -> int:
        """ONNX's number of a value's element type, 0 if it is not known."""
        proto = self.types.get(name)
        return proto.tensor_type.elem_type if proto is not None else 0

    def dims(self, name: str) -> tuple[Size, ...] | None:
        """Shape as inferred; what is open and has no symbol is a symbol of its own."""
        proto = self.types.get(name)
        if proto is None or not proto.tensor_type.HasField("shape"):
            return None
        return tuple(
            Size.of(d.dim_value if d.HasField("dim_value") else d.dim_param or f"{name}[{i}]")
            for i, d in enumerate(proto.tensor_type.shape.dim)
        )

    def constant(self, name: str, depth: int = 0) -> np.ndarray[Any, Any] | None:
        """A small constant, or what is computed from such; None for anything else."""
        if name not in self._constants:
            self._constants[name] = self._constant(name, depth)
        return self._constants[name]

    def _constant(self, name: str, depth: int) -> np.ndarray[Any, Any] | None:
        tensor = self._initializers.get(name)
        if tensor is not None:
            inside = tensor.data_location != onnx.TensorProto.EXTERNAL and math.prod(tensor.dims) <= _MAX_ELEMENTS
            return numpy_helper.to_array(tensor) if inside else None
        node = self.producers.get(name)
        if node is None or domain_of(node) != "" or depth > _MAX_DEPTH:
            return None
        if node.op_type not in _COMPUTED:
            sizes = self.sizes(name, depth + 1)
            known = None if sizes is None else [size.value for size in sizes]
            return None if known is None or None in known else np.array(known, np.int64)
        inputs = [self.constant(n, depth + 1) if n else None for n in node.input]
        if node.op_type == "CastLike":  # only the type of the second one matters
            dtype = self.element_type(node.input[1])
            if inputs[0] is None or not dtype:
                return None
            return inputs[0].astype(onnx.helper.tensor_dtype_to_np_dtype(dtype))
        if any(n and value is None for n, value in zip(node.input, inputs, strict=True)):
            return None
        if node.op_type == "ConstantOfShape" and inputs[0] is not None and math.prod(inputs[0]) > _MAX_ELEMENTS:
            return None
        try:
            (value,) = evaluate_node(node, inputs)
        except LinattnError:  # said where it matters, when the model is specialised
            return None
        return value if value.size <= _MAX_ELEMENTS else None

    def number(self, name: str) -> float | None:
        """The value of a constant with one element."""
        value = self.constant(name)
        return float(value.reshape(())) if value is not None and value.size == 1 else None

    def sizes(self, name: str, depth: int = 0) -> tuple[Size, ...] | None:
        """The elements of a list of sizes, or of a single one, open ones as symbols; None if it is no such list."""
        if name not in self._lists:
            self._lists[name] = self._sizes(name, depth)
        return self._lists[name]

    def _sizes(self, name: str, depth: int) -> tuple[Size, ...] | None:
        node = self.producers.get(name)
        computed = node is not None and domain_of(node) == "" and node.op_type in _LISTS
        if depth > _MAX_DEPTH:
            return None
        if node is not None and computed:
            return _LISTS[node.op_type](self, node, depth + 1)
        value = self.constant(name, depth + 1) if node is None or node.op_type == "Constant" else None
        if value is None or value.dtype.kind not in "iu":
            return None
        return tuple(Size.of(int(v)) for v in value.reshape(-1))

    def shape(self, name: str, depth: int = 0) -> tuple[Size, ...] | None:
        """Shape as inferred, and where inference leaves a size open what the nodes before tell."""
        if name not in self.shapes:
            dims, node = self.dims(name), self.producers.get(name)
            if dims is None or node is None or domain_of(node) != "" or depth > _MAX_DEPTH:
                return dims
            more = dims if all(size.value is not None for size in dims) else self._more(node, dims, depth + 1)
            self.shapes[name] = more if more is not None and len(more) == len(dims) else dims
        return self.shapes[name]

    def _more(self, node: onnx.NodeProto, dims: tuple[Size, ...], depth: int) -> tuple[Size, ...] | None:
        if node.op_type in _SAME_SHAPE:
            return self.shape(node.input[0], depth)
        if node.op_type == "ConstantOfShape":
            return self.sizes(node.input[0], depth)
        if node.op_type != "Concat":
            return None
        axis = int(str(attributes_of(node).get("axis", 0))) % max(len(dims), 1)
        total = Size.of(0)
        for name in node.input:
            part = self.shape(name, depth)
            if part is None or len(part) != len(dims):
                return None
            total = total + part[axis]
        return (*dims[:axis], total, *dims[axis + 1 :])


def is_zero(values: Values, name: str) -> bool:
    """Whether a value is zeros of whatever shape."""
    while (node := values.producers.get(name)) is not None and domain_of(node) == "":
        if node.op_type == "ConstantOfShape":
            fill = next((a.t for a in node.attribute if a.name == "value"), None)
            return fill is None or not numpy_helper.to_array(fill).any()
        if node.op_type not in ("Cast", "CastLike", "Expand", "Identity", "Reshape", "Transpose"):
            break
        name = node.input[0]
    return False


def _shape(values: Values, node: onnx.NodeProto, depth: int) -> tuple[Size, ...] | None:
    dims = values.shape(node.input[0], depth)
    attributes = {a.name: a.i for a in node.attribute}
    return None if dims is None else dims[slice(attributes.get("start", 0), attributes.get("end"))]


def _concat(values: Values, node: onnx.NodeProto, depth: int) -> tuple[Size, ...] | None:
    result: tuple[Size, ...] = ()
    for name in node.input:
        part = values.sizes(name, depth)
        if part is None or len(result) + len(part) > _MAX_ELEMENTS:
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


_LISTS: dict[str, Callable[[Values, onnx.NodeProto, int], tuple[Size, ...] | None]] = {
    "Shape": _shape,
    "Concat": _concat,
    "Gather": _pick,
    "Slice": _cut,
    "Add": _arithmetic(Size.__add__),
    "Sub": _arithmetic(Size.__sub__),
    "Mul": _arithmetic(Size.__mul__),
    "Div": _arithmetic(Size.divided_by),
} | dict.fromkeys(("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"), _same)
