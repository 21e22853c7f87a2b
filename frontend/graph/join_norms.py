"""An RMS norm becomes part of the kernel of the products that read it, for one row on GPUs.

A step has two norms a layer, each a dispatch that does next to nothing, and with a residual the sum before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from linattn.dialect_patterns.mat_mul import joined, normed
from linattn.dialect_patterns.mat_mul.contract import MatMul
from linattn.dialect_patterns.mat_mul.joined import Products
from linattn.dialect_patterns.node import TensorSpec
from linattn.dialect_patterns.norms.rms_normalization import RMSNormalization
from linattn.dialect_patterns.norms.simplified_layer_normalization import SimplifiedLayerNormalization
from linattn.dialect_patterns.norms.skip_simplified_layer_normalization import SkipSimplifiedLayerNormalization
from linattn.dialect_patterns.op import INTERNAL, LoweringOptions
from linattn.dialect_patterns.target import Target

from .internal import import_internal
from .schema import check_contracts, spec_of_type
from .specialize import SpecializedGraph

_SKIP, _BIAS, _SUM = 1, 3, 3


@dataclass(frozen=True)
class _Norm:
    """A norm over the last dimension.

    Attributes:
        x: What is normalised, or the first part of it.
        skip: The other part; "": there is none.
        gamma: The weights.
        epsilon: Added to the mean square.
        total: The output that is the sum of the parts; "": there is none.
    """

    x: str
    skip: str
    gamma: str
    epsilon: float
    total: str


def join_norms(
    graph: SpecializedGraph, versions: Mapping[str, int], target: Target, options: LoweringOptions
) -> SpecializedGraph:
    """The graph with norms inside of the products that alone read them.

    Args:
        graph: An entry point's graph; not changed.
        versions: Domain -> opset version.
        target: The machine; on one without such kernels nothing is joined.
        options: What the user asked of the lowering.
    """
    if not target.is_gpu:
        return graph
    model = onnx.ModelProto()
    model.CopyFrom(graph.proto)
    import_internal(model)
    contracts = check_contracts(model.graph, graph.types, versions)
    weights = {tensor.name for tensor in model.graph.initializer}
    kept = {value.name for value in model.graph.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in dict.fromkeys(node.input):
            readers.setdefault(name, []).append(node)
    gone: set[str] = set()
    for node in model.graph.node:
        norm = _norm(node, contracts.get(node.name), graph)
        after = readers.get(node.output[0], [])
        if norm is None or len(after) != 1 or node.output[0] in kept:
            continue
        (reader,) = after
        products = _products(contracts.get(reader.name))
        ours = products and reader.input[0] == node.output[0] and all(name in weights for name in reader.input[1:])
        with_sum = norm.total in readers or norm.total in kept
        results = [*reader.output, *([norm.total] if with_sum else [])]
        if (
            not ours
            or node.output[0] in reader.input[1:]
            or not normed.can_join(products, len(results), target, options)
        ):
            continue
        attributes: dict[str, Any] = {
            normed.GATED: int(reader.op_type == joined.GATED),
            normed.EPSILON: norm.epsilon,
            normed.WITH_SKIP: int(bool(norm.skip)),
            normed.WITH_SUM: int(with_sum),
        }
        inputs = [norm.x, norm.gamma, *([norm.skip] if norm.skip else []), *reader.input[1:]]
        gone.add(reader.name)
        node.CopyFrom(onnx.helper.make_node(normed.NORMED, inputs, results, reader.name, domain=INTERNAL, **attributes))
    left = [node for node in model.graph.node if node.name not in gone or node.op_type == normed.NORMED]
    del model.graph.node[:]
    model.graph.node.extend(left)
    return SpecializedGraph(model, graph.types)


def _products(contract: Any) -> Sequence[MatMul]:
    """What a node multiplies its first input with; nothing if it is no such node."""
    return contract.products if isinstance(contract, Products) else [contract] if isinstance(contract, MatMul) else []


def _norm(node: onnx.NodeProto, contract: Any, graph: SpecializedGraph) -> _Norm | None:
    """The norm that a node is, if it is over one row's own values, of one type."""

    def spec(name: str) -> TensorSpec | None:
        return spec_of_type(graph.types.get(name))

    if isinstance(contract, SkipSimplifiedLayerNormalization):
        has_bias = len(node.input) > _BIAS and node.input[_BIAS] != ""
        if has_bias or spec(node.input[_SKIP]) != contract.x:
            return None
        total = node.output[_SUM] if contract.with_sum else ""
        return _Norm(node.input[0], node.input[_SKIP], node.input[2], contract.epsilon, total)
    if isinstance(contract, SimplifiedLayerNormalization):
        if contract.with_inverse:
            return None
        contract = contract.norm
    if not isinstance(contract, RMSNormalization):
        return None
    x, scale = contract.x, contract.scale
    if contract.axis != x.rank - 1 or scale != TensorSpec(x.shape[-1:], x.dtype):
        return None
    return _Norm(node.input[0], "", node.input[1], contract.epsilon, "")
