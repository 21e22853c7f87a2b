"""What depends on constants alone (shapes, positions, masks) is computed, so that the importer sees static shapes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from linattn.dialect_patterns.node import TensorSpec
from linattn.runtime.errors import UnsupportedModelError
from onnx import numpy_helper

from .evaluate import evaluate_node
from .schema import DTYPES, domain_of, is_weight, spec_of_type

MAX_FOLDED_ELEMENTS = 65_536
"""Larger results stay in the graph: IREE folds what is worth folding, with the weights where they are."""

MAX_FOLDED_BYTES = 64 << 20
"""Of all values that are folded for one entry point; what comes after stays in the graph as well."""

# What shapes, positions and masks are computed with. Their cost is bounded by the sizes of inputs and outputs, which
# that of a convolution or of attention is not.
_FOLDED_NAMES = """
    Abs Add And ArgMax ArgMin BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Clip Concat
    ConstantOfShape Cos CumSum Div Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND
    Gemm Greater GreaterOrEqual Identity IsInf IsNaN Less LessOrEqual Log MatMul Max Mean Min Mod Mul Neg Not
    OneHot Or Pad Pow Range Reciprocal ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare Relu Reshape Round ScatterElements ScatterND Sigmoid Sign Sin Size Slice Softmax Softplus
    Split Sqrt Squeeze Sub Sum Tanh Tile Transpose Trilu Unsqueeze Where Xor
"""
_FOLDED = frozenset(_FOLDED_NAMES.split())


def fold_constants(
    graph: onnx.GraphProto, types: Mapping[str, onnx.TypeProto], weights: Mapping[str, np.ndarray[Any, Any]]
) -> bool:
    """Replace nodes with constant results by initializers, in place; whether any was.

    Args:
        graph: The graph.
        types: Type of every value.
        weights: Initializer name -> values, of those that lie outside the graph.

    Raises:
        UnsupportedModelError: if a constant cannot be computed, or is not what was inferred for it.
    """
    constants: dict[str, np.ndarray[Any, Any]] = {}
    for tensor in graph.initializer:
        if math.prod(tensor.dims) <= MAX_FOLDED_ELEMENTS:
            inside = tensor.data_location != onnx.TensorProto.EXTERNAL
            constants[tensor.name] = numpy_helper.to_array(tensor) if inside else weights[tensor.name]
    outputs = {v.name for v in graph.output}
    kept: list[onnx.NodeProto] = []
    folded = False
    held = sum(value.nbytes for name, value in constants.items() if name not in weights)
    views = _views(graph)
    for node in graph.node:
        is_inner = not outputs & set(node.output) and held < MAX_FOLDED_BYTES and node.name not in views
        values = _constant_results(node, constants, types) if is_inner else None
        if values is None:
            kept.append(node)
            continue
        folded = True
        for name, value in zip(node.output, values, strict=False):
            if name:
                _check_folded(node, name, value, types)
                constants[name] = value
                held += value.nbytes
                graph.initializer.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
    del graph.node[:]
    graph.node.extend(kept)
    return folded


def _views(graph: onnx.GraphProto) -> set[str]:
    """Reshapes of weights that other nodes read as well: the importer makes views of one copy, folding a second one."""
    weights = {tensor.name for tensor in graph.initializer if is_weight(tensor)}
    readers = Counter(name for node in graph.node for name in set(node.input) & weights)
    return {node.name for node in graph.node if node.op_type == "Reshape" and readers[node.input[0]] > 1}


def _check_folded(
    node: onnx.NodeProto, name: str, value: np.ndarray[Any, Any], types: Mapping[str, onnx.TypeProto]
) -> None:
    """A value is what was inferred for it; where it is not, the node's attributes or inputs contradict each other."""
    spec = spec_of_type(types.get(name))
    try:
        dtype = DTYPES.get(onnx.helper.np_dtype_to_tensor_dtype(value.dtype))
    except ValueError:  # not a type of ONNX
        dtype = None
    if spec is not None and node.op_type != "Shape" and (spec.dtype != dtype or spec.shape != value.shape):
        raise UnsupportedModelError(
            f"its output '{name}' is not what its type says",
            where=f"node '{node.name}' ({node.op_type})",
            got=TensorSpec(value.shape, dtype or str(value.dtype)),
            expected=spec,
        )


def _constant_results(
    node: onnx.NodeProto, constants: Mapping[str, np.ndarray[Any, Any]], types: Mapping[str, onnx.TypeProto]
) -> list[np.ndarray[Any, Any]] | None:
    if domain_of(node) != "":
        return None
    if node.op_type == "Shape":
        spec = spec_of_type(types.get(node.input[0]))
        if spec is None:
            return None
        attributes = {a.name: a.i for a in node.attribute}
        dims = spec.shape[slice(attributes.get("start", 0), attributes.get("end"))]
        return None if None in dims else [np.array(dims, np.int64)]
    if node.op_type not in _FOLDED or any(name and name not in constants for name in node.input):
        return None
    for name in node.output:
        spec = spec_of_type(types.get(name)) if name else None
        if name and (spec is None or None in spec.shape or math.prod(d or 0 for d in spec.shape) > MAX_FOLDED_ELEMENTS):
            return None
    return evaluate_node(node, [constants[name] if name else None for name in node.input])
