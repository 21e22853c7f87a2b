"""Binds dimensions of a graph and folds what becomes constant, so that the importer sees static shapes.

A graph with every dim bound ends with no ``Shape`` arithmetic at all; with open dims what depends on them stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from linattn.dialect_patterns.node import TensorSpec
from linattn.runtime.errors import UnsupportedModelError
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from .dims import evaluate
from .schema import CAPACITY, DTYPES, check_contracts, domain_of, infer_types, spec_of_type, type_of_spec
from .slices import explicit_slices
from .states import KV_LENGTH_AXIS, StatePair

MAX_FOLDED_ELEMENTS = 65_536
"""Larger results stay in the graph: IREE folds what is worth folding, with the weights where they are."""

MAX_FOLDED_BYTES = 64 << 20
"""Of all values that are folded for one entry point; what comes after stays in the graph as well."""

MAX_FOLDING_ROUNDS = 64
"""A chain in which each result's size depends on the one before takes a round a link, and inference each time."""

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


@dataclass
class SpecializedGraph:
    """One entry point's graph.

    Attributes:
        proto: The model with bound dims and folded constants; unused nodes and initializers are gone.
        types: Type of every value.
    """

    proto: onnx.ModelProto
    types: dict[str, onnx.TypeProto]


def specialize(
    proto: onnx.ModelProto,
    sizes: Mapping[str, int],
    state_types: Mapping[str, onnx.TypeProto],
    capacity_states: Iterable[StatePair],
    weights: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> SpecializedGraph:
    """Bind symbols and fold constants.

    Args:
        proto: The model; not changed. External weights need not be loaded.
        sizes: Symbol -> size. Symbols that are left out stay open.
        state_types: Graph input or output name -> its type, for states whose declared shapes are not precise.
        capacity_states: KV caches that are buffers of fixed capacity: their nodes are marked, and the present value
            has the past's shape.
        weights: Initializer name -> values, of those that lie outside the graph; small ones are folded too.

    Raises:
        UnsupportedModelError: if a node's output type cannot be found, or a constant one not computed.
    """
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    graph = model.graph
    for name, tensor_type in state_types.items():
        for value in (*graph.input, *graph.output):
            if value.name == name:
                value.type.CopyFrom(tensor_type)
    for value in (*graph.input, *graph.output, *graph.value_info):
        _bind(value.type, sizes)
    present = _mark_capacity(graph, list(capacity_states))
    _constants_to_initializers(graph)
    types = _infer(model, present)
    for _ in range(MAX_FOLDING_ROUNDS):
        if not _fold(graph, types, weights or {}):
            break
        types = _infer(model, present)
    _explicit_reshapes(graph, types)
    explicit_slices(graph, types)
    _drop_unused(graph)
    versions = {("" if o.domain == "ai.onnx" else o.domain): o.version for o in model.opset_import}
    check_contracts(graph, types, versions)  # its errors say more than a missing type further down
    for node in graph.node:
        for name in node.output:
            spec = spec_of_type(types.get(name)) if name else None
            if spec is not None and any(size is not None and size < 0 for size in spec.shape):
                raise UnsupportedModelError(
                    f"its output '{name}' has a negative size",
                    where=f"node '{node.name}' ({node.op_type})",
                    got=spec,
                    expected="sizes of 0 or more",
                    hint="export the model again, or compile with larger --prefill-blocks",
                )
            if name and spec is None:
                raise UnsupportedModelError(
                    f"the shape of its output '{name}' cannot be inferred",
                    where=f"node '{node.name}' ({node.op_type})",
                    hint="run the exporter's shape inference first",
                )
    return SpecializedGraph(model, types)


def _bind(proto: onnx.TypeProto, sizes: Mapping[str, int]) -> None:
    for dim in proto.tensor_type.shape.dim:
        if dim.HasField("dim_param"):
            size = evaluate(dim.dim_param, sizes)
            if size is not None:
                dim.dim_value = size


def _mark_capacity(graph: onnx.GraphProto, states: list[StatePair]) -> dict[str, str]:
    """Mark attention nodes whose cache has a fixed capacity; returns present value -> past input."""
    names = {state.node for state in states}
    for node in graph.node:
        if node.name in names:
            node.attribute.append(onnx.helper.make_attribute(CAPACITY, 1))
    return {state.present: state.past for state in states}


def _infer(model: onnx.ModelProto, present: Mapping[str, str]) -> dict[str, onnx.TypeProto]:
    """Types of all values.

    Args:
        model: The model.
        present: Present values of fixed-capacity caches -> past input, whose type they have (the operator's own
            inference would say past + T).
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    for node in probe.graph.node:
        for i, name in enumerate(node.output):
            if name in present:
                node.output[i] = ""
    kept = [v for v in probe.graph.output if v.name not in present]
    del probe.graph.output[:]
    probe.graph.output.extend(kept)
    types = infer_types(probe)
    for name, past in present.items():
        types[name] = types[past]
    return types


def constant_ints(graph: onnx.GraphProto, name: str) -> list[int] | None:
    """The values of a constant such as axes or sizes; None if it is computed or outside the graph."""
    tensor = next((t for t in graph.initializer if t.name == name), None)
    if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL:
        return None
    return [int(value) for value in numpy_helper.to_array(tensor).reshape(-1)]


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Constant" and domain_of(node) == "":
            (value,) = _evaluate(node, [])
            graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _evaluate(node: onnx.NodeProto, inputs: list[np.ndarray[Any, Any] | None]) -> list[np.ndarray[Any, Any]]:
    feeds = {name: value for name, value in zip(node.input, inputs, strict=True) if name and value is not None}
    try:
        with np.errstate(all="ignore"):
            evaluator: Any = ReferenceEvaluator(node)
            results: Any = evaluator.run(None, feeds)
            arrays = [np.asarray(r) for r in results]
    except Exception as error:  # whatever numpy, or onnx's Python, says of values that do not fit the operator
        raise UnsupportedModelError(
            f"cannot be computed from its constant inputs: {' '.join(str(error).split())[:200]}",
            where=f"node '{node.name}' ({node.op_type})",
            got=", ".join(f"{a.dtype}{list(a.shape)}" for a in feeds.values()) or None,
        ) from error
    return arrays


def _fold(
    graph: onnx.GraphProto, types: Mapping[str, onnx.TypeProto], weights: Mapping[str, np.ndarray[Any, Any]]
) -> bool:
    """Replace nodes with constant results by initializers; whether any was."""
    constants: dict[str, np.ndarray[Any, Any]] = {}
    for tensor in graph.initializer:
        if math.prod(tensor.dims) <= MAX_FOLDED_ELEMENTS:
            inside = tensor.data_location != onnx.TensorProto.EXTERNAL
            constants[tensor.name] = numpy_helper.to_array(tensor) if inside else weights[tensor.name]
    outputs = {v.name for v in graph.output}
    kept: list[onnx.NodeProto] = []
    folded = False
    held = sum(value.nbytes for name, value in constants.items() if name not in weights)
    for node in graph.node:
        is_inner = not outputs & set(node.output) and held < MAX_FOLDED_BYTES
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
    return _evaluate(node, [constants[name] if name else None for name in node.input])


def _explicit_reshapes(graph: onnx.GraphProto, types: dict[str, onnx.TypeProto]) -> None:
    """Write a reshape's target as sizes where the result is static: no 0 and no -1 left to the importer."""
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        kept.append(node)
        if node.op_type != "Reshape" or domain_of(node) != "":
            continue
        source, result = spec_of_type(types.get(node.input[0])), spec_of_type(types.get(node.output[0]))
        if source is None or result is None:
            continue
        if None not in result.shape:
            _set_target(graph, node, [d or 0 for d in result.shape])
            continue
        last = source.shape[-1] if source.rank else None
        if source.shape.count(None) > 1 and result.rank == 2 and result.shape[0] is None and last and result.shape[1]:
            # The importer gets [?, ?, 512] -> [-1, 128] wrong (a static size of 0), by way of [0, 0, 4, 128] right.
            split = onnx.helper.make_node(
                "Reshape", [node.input[0], ""], [f"{node.output[0]}.split"], f"{node.name}.split"
            )
            sizes = [0] * (source.rank - 1) + [last // result.shape[1], result.shape[1]]
            if sizes[-2] * sizes[-1] == last:
                _set_target(graph, split, sizes)
                shape = (*source.shape[:-1], *sizes[-2:])
                types[split.output[0]] = type_of_spec(TensorSpec(shape, source.dtype))
                node.input[0] = split.output[0]
                kept.insert(-1, split)
    del graph.node[:]
    graph.node.extend(kept)


def _set_target(graph: onnx.GraphProto, node: onnx.NodeProto, sizes: list[int]) -> None:
    name = f"{node.output[0]}.shape"
    graph.initializer.append(numpy_helper.from_array(np.array(sizes, np.int64), name))
    node.input[1] = name
    if 0 not in sizes:
        del node.attribute[:]  # allowzero says nothing any more


def _drop_unused(graph: onnx.GraphProto) -> None:
    wanted = {v.name for v in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    initializers = [t for t in graph.initializer if t.name in wanted]
    del graph.initializer[:]
    graph.initializer.extend(initializers)


def state_type(spec_proto: onnx.TypeProto, known: Mapping[int, int]) -> onnx.TypeProto:
    """A state's declared type with the sizes that its operator fixes.

    Args:
        spec_proto: The declared type.
        known: Axis -> size.
    """
    result = onnx.TypeProto()
    result.CopyFrom(spec_proto)
    for axis, size in known.items():
        result.tensor_type.shape.dim[axis].dim_value = size
    return result


__all__ = ["KV_LENGTH_AXIS", "SpecializedGraph", "specialize", "state_type", "type_of_spec"]
