"""An RMS norm becomes part of the kernels of the products that read it, for one row on GPUs.

A step has two norms a layer, each a dispatch that does next to nothing, and with a residual the sum before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx
from linattn.dialect_patterns.mat_mul import head_normed, joined, normed
from linattn.dialect_patterns.mat_mul.contract import MatMul
from linattn.dialect_patterns.mat_mul.joined import Products
from linattn.dialect_patterns.mat_mul_n_bits import joined as packed
from linattn.dialect_patterns.mat_mul_n_bits.contract import MatMulNBits
from linattn.dialect_patterns.mat_mul_n_bits.joined import NBitsProducts
from linattn.dialect_patterns.node import TensorSpec
from linattn.dialect_patterns.norms.gated_rms_norm import GatedRMSNorm
from linattn.dialect_patterns.norms.rms_normalization import RMSNormalization
from linattn.dialect_patterns.norms.simplified_layer_normalization import SimplifiedLayerNormalization
from linattn.dialect_patterns.norms.skip_simplified_layer_normalization import SkipSimplifiedLayerNormalization
from linattn.dialect_patterns.op import INTERNAL, LoweringOptions
from linattn.dialect_patterns.target import Target

from .join_packed_products import joined_node
from .schema import attributes_of, check_contracts, spec_of_type
from .specialize import SpecializedGraph

_SKIP, _BIAS, _SUM = 1, 3, 3
_MOST_READERS = 2
"""Kernels that compute the norm anew, rather than one more that all of them wait for."""


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
    model = graph.copied()
    contracts = check_contracts(model.graph, graph.types, versions)
    weights = {tensor.name for tensor in model.graph.initializer}
    kept = {value.name for value in model.graph.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in dict.fromkeys(node.input):
            readers.setdefault(name, []).append(node)
    gone: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.name in gone:
            continue
        norm, y = _norm(node, contracts.get(node.name), graph), node.output[0]
        after = readers.get(y, [])
        made: list[onnx.NodeProto | None] = [None]
        where = _Where(weights, target, options)
        gated = contracts.get(node.name)
        if isinstance(gated, GatedRMSNorm) and len(after) == 1 and y not in kept:
            made = [_head_joined(node, gated, after[0], contracts.get(after[0].name), where)]
        if norm is not None and 0 < len(after) <= _MOST_READERS and y not in kept:
            with_sum = norm.total in readers or norm.total in kept
            parts = [replace(norm, total=norm.total if with_sum and i == 0 else "") for i in range(len(after))]
            made = [
                _joined(part, y, reader, contracts.get(reader.name), where)
                for part, reader in zip(parts, after, strict=True)
            ]
        found = [one for one in made if one is not None]
        if len(found) == len(made):
            nodes += found
            gone |= {reader.name for reader in after}
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return SpecializedGraph(model, graph.types)


@dataclass(frozen=True)
class _Where:
    """For what is compiled, and what is known there."""

    weights: set[str]
    target: Target
    options: LoweringOptions


def _joined(norm: _Norm, y: str, reader: onnx.NodeProto, contract: Any, where: _Where) -> onnx.NodeProto | None:
    """The node for a norm and what multiplies its result ``y``; None where there is no such kernel."""
    names = [name for name in reader.input[1:] if name]
    if reader.input[0] != y or not all(name in where.weights for name in names):
        return None
    outputs = [*reader.output, *([norm.total] if norm.total else [])]
    before = [norm.x, norm.gamma, *([norm.skip] if norm.skip else [])]
    attributes: dict[str, Any] = {
        normed.EPSILON: norm.epsilon,
        normed.WITH_SKIP: int(bool(norm.skip)),
        normed.WITH_SUM: int(bool(norm.total)),
    }
    if isinstance(contract, MatMulNBits | NBitsProducts):
        given = contract if isinstance(contract, NBitsProducts) else NBitsProducts((contract,))
        whole = replace(
            given, with_norm=True, with_skip=bool(norm.skip), with_sum=bool(norm.total), epsilon=norm.epsilon
        )
        if given.with_norm or not packed.can_join(whole, where.target, where.options):
            return None
        plain = reader if isinstance(contract, NBitsProducts) else joined_node([reader], [contract], [], gated=False)
        attributes = {**attributes_of(plain), **attributes, packed.WITH_NORM: 1}
        return onnx.helper.make_node(
            packed.JOINED_N_BITS, [*before, *plain.input[1:]], outputs, reader.name, domain=INTERNAL, **attributes
        )
    products = contract.products if isinstance(contract, Products) else [contract]
    if not all(isinstance(product, MatMul) for product in products):
        return None
    if not normed.can_join(products, len(outputs), where.target, where.options):
        return None
    attributes[normed.GATED] = int(reader.op_type == joined.GATED)
    return onnx.helper.make_node(normed.NORMED, [*before, *names], outputs, reader.name, domain=INTERNAL, **attributes)


def _head_joined(
    node: onnx.NodeProto, norm: GatedRMSNorm, reader: onnx.NodeProto, contract: Any, where: _Where
) -> onnx.NodeProto | None:
    """The node for a gated norm by heads and the product of its result; None where there is no such kernel."""
    names = [name for name in reader.input[1:] if name]
    if reader.input[0] != node.output[0] or not all(name in where.weights for name in names):
        return None
    attributes: dict[str, Any] = {"epsilon": norm.epsilon, "multiplies_gate": int(norm.multiplies_gate)}
    if isinstance(contract, MatMulNBits):
        whole = NBitsProducts((contract,), epsilon=norm.epsilon, head=norm.group)
        if not packed.can_join(whole, where.target, where.options):
            return None
        plain = joined_node([reader], [contract], [], gated=False)
        attributes |= {**attributes_of(plain), packed.HEAD: norm.group}
        kind, names = packed.JOINED_N_BITS, list(plain.input[1:])
    elif isinstance(contract, MatMul) and head_normed.can_join(contract, norm.group, where.target, where.options):
        kind = head_normed.HEAD_NORMED
    else:
        return None
    inputs, outputs = [*node.input, *names], list(reader.output)
    return onnx.helper.make_node(kind, inputs, outputs, reader.name, domain=INTERNAL, **attributes)


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
