"""What is known of a graph's values before any size is bound: constants, lists of sizes, how values are moved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from linattn.runtime.errors import LinattnError
from onnx import numpy_helper

from ..evaluate import evaluate_node
from ..names import Names
from ..schema import domain_of
from .shapes import LISTS, MAX_ELEMENTS, SHAPES
from .sizes import Size

_MAX_DEPTH = 64
"""Of a chain that computes a size or a scale."""

_COMPUTED_NAMES = """
    Add Cast CastLike Constant ConstantOfShape Div Exp Identity Mul Neg Pow Reciprocal Reshape Sqrt Squeeze Sub
    Unsqueeze
"""
_COMPUTED = frozenset(_COMPUTED_NAMES.split())


class Values:
    """The values of a graph, or of a body inside it that sees them too.

    Attributes:
        types: Inferred types of the outer graph's values.
        producers: Value -> the node that makes it.
        shapes: Shapes of which more is known than was inferred.
        names: Names for new values of the outer graph.
    """

    def __init__(
        self, graph: onnx.GraphProto, types: Mapping[str, onnx.TypeProto], outer: Values | None = None
    ) -> None:
        self.producers: dict[str, onnx.NodeProto] = {name: n for n in graph.node for name in n.output if name}
        self._initializers: dict[str, onnx.TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self.types: Mapping[str, onnx.TypeProto] = types
        self.shapes: dict[str, tuple[Size, ...]] = {}
        self.names = Names(graph) if outer is None else outer.names
        if outer is not None:  # a body's own names hide those around it
            own = {v.name for v in graph.input} | self.producers.keys() | self._initializers.keys()
            self.producers |= {name: n for name, n in outer.producers.items() if name not in own}
            self._initializers |= {name: t for name, t in outer._initializers.items() if name not in own}
            self.types = {name: proto for name, proto in types.items() if name not in own}
            self.shapes = {name: shape for name, shape in outer.shapes.items() if name not in own}
        self._constants: dict[str, np.ndarray[Any, Any] | None] = {}
        self._lists: dict[str, tuple[Size, ...] | None] = {}

    def is_initializer(self, name: str) -> bool:
        """Whether a value is a constant of the graph."""
        return name in self._initializers and name not in self.producers

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
            inside = tensor.data_location != onnx.TensorProto.EXTERNAL and math.prod(tensor.dims) <= MAX_ELEMENTS
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
        if node.op_type == "ConstantOfShape" and inputs[0] is not None and math.prod(inputs[0]) > MAX_ELEMENTS:
            return None
        try:
            (value,) = evaluate_node(node, inputs)
        except LinattnError:  # said where it matters, when the model is specialised
            return None
        return value if value.size <= MAX_ELEMENTS else None

    def may_depend(self, name: str, on: str) -> bool:
        """Whether a value may be computed from another one; also where it takes many steps to tell."""
        pending, count = [name] if name else [], 0
        while pending:
            value = pending.pop()
            count += 1
            if value == on or count > MAX_ELEMENTS:
                return True
            node = self.producers.get(value)
            pending += [n for n in node.input if n] if node is not None else []
        return False

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
        computed = node is not None and domain_of(node) == "" and node.op_type in LISTS
        if depth > _MAX_DEPTH:
            return None
        if node is not None and computed:
            return LISTS[node.op_type](self, node, depth + 1)
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
            step = None if all(size.value is not None for size in dims) else SHAPES.get(node.op_type)
            more = step(self, node, depth + 1) if step is not None else None
            self.shapes[name] = more if more is not None and len(more) == len(dims) else dims
        return self.shapes[name]


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
