"""What makes the inputs of LinearAttention becomes part of its kernel, for one token on GPUs.

Exporters write a layer's gates and the norms of its queries and keys as nodes of their own: four kernels of a step that
do next to nothing. A factor of the query is one of the output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx
from linattn.dialect_patterns.linear_attention.contract import LinearAttention
from linattn.dialect_patterns.linear_attention.gated import GATED_LINEAR_ATTENTION, KEY_NORM, QUERY_NORM, can_join
from linattn.dialect_patterns.op import INTERNAL, MICROSOFT, LoweringOptions
from linattn.dialect_patterns.target import Target

from .drop_unused import drop_unused
from .schema import check_contracts, domain_of, spec_of_type
from .specialize import SpecializedGraph

_QUERY, _KEY, _DECAY, _BETA = 0, 1, 4, 5


def join_gates(
    graph: SpecializedGraph, versions: Mapping[str, int], target: Target, options: LoweringOptions
) -> SpecializedGraph:
    """The graph with norms and gates inside of the LinearAttention nodes that read them.

    Args:
        graph: An entry point's graph; not changed.
        versions: Domain -> opset version.
        target: The machine; on one without such a kernel nothing is joined.
        options: What the user asked of the lowering.
    """
    nodes = [node for node in graph.proto.graph.node if node.op_type == "LinearAttention"]
    if not nodes or not target.is_gpu:
        return graph
    model = graph.copied()
    contracts = check_contracts(model.graph, graph.types, versions)
    made_by = {name: node for node in model.graph.node for name in node.output}
    finder = _Finder(graph, made_by)
    for node in model.graph.node:
        contract = contracts.get(node.name)
        if isinstance(contract, LinearAttention) and can_join(contract, target, options):
            _join(node, contract, finder)
    drop_unused(model.graph)
    return SpecializedGraph(model, graph.types)


def _join(node: onnx.NodeProto, contract: LinearAttention, finder: _Finder) -> None:
    """Changes a node in place; what it reads no more is left behind."""
    query, scale = finder.without_factor(node.input[_QUERY])
    inputs, norms = list(node.input), {QUERY_NORM: 0, KEY_NORM: 0}
    for name, index, source, heads in (
        (QUERY_NORM, _QUERY, query, contract.q_heads),
        (KEY_NORM, _KEY, node.input[_KEY], contract.k_heads),
    ):
        found = finder.normed(source, heads, contract.dk)
        if found is not None:
            inputs[index], norms[name] = found, 1
    if not norms[QUERY_NORM]:  # by itself a factor is part of some other kernel
        scale = 1.0
    gate = finder.gate(node, contract)
    if gate is None and not any(norms.values()):
        return
    if gate is not None:
        a, dt_bias, decay_scale, b = gate.input
        inputs[_DECAY:] = [a, b, dt_bias, decay_scale]
    attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    attributes |= {**norms, "scale": contract.scale * scale}
    joined = onnx.helper.make_node(
        GATED_LINEAR_ATTENTION, inputs, list(node.output), node.name, domain=INTERNAL, **attributes
    )
    node.CopyFrom(joined)


class _Finder:
    """Looks what values of a graph are made of."""

    def __init__(self, graph: SpecializedGraph, made_by: Mapping[str, onnx.NodeProto]) -> None:
        self._types, self._made_by = graph.types, made_by
        self._constants = {tensor.name: tensor for tensor in graph.proto.graph.initializer}

    def without_factor(self, name: str) -> tuple[str, float]:
        """What a value is a constant multiple of, and the factor."""
        node = self._made_by.get(name)
        if node is not None and node.op_type == "Mul" and domain_of(node) == "":
            for index, other in enumerate(node.input):
                tensor = self._constants.get(other)
                if tensor is None or math.prod(tensor.dims) != 1 or len(tensor.dims) > 3:
                    continue
                if tensor.data_location != onnx.TensorProto.EXTERNAL:
                    factor = float(onnx.numpy_helper.to_array(tensor).item())
                    return (node.input[1 - index], factor) if factor else (name, 1.0)  # a scale of 0 is the default
        return name, 1.0

    def normed(self, name: str, heads: int, size: int) -> str | None:
        """What a value [B, T, heads * size] is the Euclidean norm of by heads; None if of nothing of its shape."""
        outer = self._reshaped(name)
        node = self._made_by.get(outer)
        if node is None or node.op_type != "LpNormalization" or domain_of(node) != "":
            return None
        shape = spec_of_type(self._types.get(outer))
        attributes = {one.name: one.i for one in node.attribute}
        axis, power = attributes.get("axis", -1), attributes.get("p", 2)
        if shape is None or shape.shape[-2:] != (heads, size) or axis not in (-1, shape.rank - 1) or power != 2:
            return None
        inner, want = self._reshaped(node.input[0]), spec_of_type(self._types.get(name))
        return inner if want is not None and spec_of_type(self._types.get(inner)) == want else None

    def gate(self, node: onnx.NodeProto, contract: LinearAttention) -> onnx.NodeProto | None:
        """The node that makes decay and beta, if it makes both for each head."""
        if contract.decay != "head" or contract.beta != "head" or len(node.input) <= _BETA:
            return None
        gate = self._made_by.get(node.input[_DECAY])
        if gate is None or gate.op_type != "LinearAttentionGate" or domain_of(gate) != MICROSOFT:
            return None
        return gate if list(gate.output) == [node.input[_DECAY], node.input[_BETA]] else None

    def _reshaped(self, name: str) -> str:
        """What a value is another shape of."""
        node = self._made_by.get(name)
        return node.input[0] if node is not None and node.op_type == "Reshape" and domain_of(node) == "" else name
