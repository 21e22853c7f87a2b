"""Products of one value by packed weights become one node where the target computes them as one kernel.

What ``join_products`` does for MatMul: those of one row on GPUs, and a gated pair with its activation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx
from linattn.dialect_patterns.mat_mul_n_bits import joined
from linattn.dialect_patterns.mat_mul_n_bits.contract import MatMulNBits
from linattn.dialect_patterns.mat_mul_n_bits.joined import JOINED_N_BITS, NBitsProducts, can_join
from linattn.dialect_patterns.op import INTERNAL, LoweringOptions
from linattn.dialect_patterns.target import Target

from .join_products import gated_tail, groups_of, put_in_place
from .schema import attributes_of, check_contracts
from .specialize import SpecializedGraph

_MOST = 4  # products of a kernel


def join_packed_products(
    graph: SpecializedGraph, versions: Mapping[str, int], target: Target, options: LoweringOptions
) -> SpecializedGraph:
    """The graph with such products joined.

    Args:
        graph: An entry point's graph; not changed.
        versions: Domain -> opset version.
        target: The machine; on one without such kernels nothing is joined.
        options: What the user asked of the lowering.
    """
    if not target.is_gpu or all(node.op_type != "MatMulNBits" for node in graph.proto.graph.node):
        return graph
    model = graph.copied()
    contracts = check_contracts(model.graph, graph.types, versions)
    weights = {tensor.name for tensor in model.graph.initializer}
    alike: dict[Any, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        contract = contracts.get(node.name)
        if isinstance(contract, MatMulNBits) and all(name in weights for name in node.input[1:] if name):
            key = (node.input[0], attributes_of(node).get("accuracy_level", 0), replace(contract, where="", columns=0))
            alike.setdefault(key, []).append(node)
    for nodes in alike.values():
        for some in groups_of(nodes, _MOST):
            products = tuple(contracts[node.name] for node in some)
            tail = gated_tail(model.graph, some)
            if tail and can_join(NBitsProducts(products, gated=True), target, options):
                gate = tail[0].input[0] if tail[0].op_type == "Sigmoid" else ""
                ordered = sorted(some, key=lambda node: node.output[0] != gate)
                made = joined_node(
                    ordered, [contracts[node.name] for node in ordered], [tail[-1].output[0]], gated=True
                )
                put_in_place(model.graph, made, [*some, *tail])
            elif len(some) > 1 and can_join(NBitsProducts(products), target, options):
                made = joined_node(some, products, [node.output[0] for node in some], gated=False)
                put_in_place(model.graph, made, some)
    return SpecializedGraph(model, graph.types)


def joined_node(
    nodes: Sequence[onnx.NodeProto], products: Sequence[MatMulNBits], outputs: Sequence[str], *, gated: bool
) -> onnx.NodeProto:
    """One node for several MatMulNBits nodes.

    Args:
        nodes: In order.
        products: Their contracts.
        outputs: What it makes.
        gated: Whether it is silu(first) * second.
    """
    c, given = products[0], attributes_of(nodes[0])
    operands = [name for node in nodes for name in node.input[1:] if name]
    attributes: dict[str, Any] = {
        "K": c.depth,
        "bits": c.bits,
        "block_size": c.block_size,
        "accuracy_level": given.get("accuracy_level", 0),
        joined.COLUMNS: [product.columns for product in products],
        joined.WITH_ZEROS: int(c.zero_points != "default"),
        joined.WITH_BIAS: int(c.with_bias),
        joined.GATED: int(gated),
    }
    name = nodes[0].name if len(nodes) == 1 else f"{nodes[0].name}.joined"
    return onnx.helper.make_node(
        JOINED_N_BITS, [nodes[0].input[0], *operands], list(outputs), name, domain=INTERNAL, **attributes
    )
