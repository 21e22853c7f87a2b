"""Products that read the same value become one node where the target computes them as one kernel.

A decode step's products with a layer's input (queries, keys, values, gates) are small, and a dispatch costs beside its
work, on a GPU microseconds. Two products that end in silu(gate) * up become one node too, the activation included.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import onnx
from linattn.dialect_patterns.mat_mul.joined import GATED, JOINED, can_join, joining, most_products
from linattn.dialect_patterns.op import INTERNAL, LoweringOptions
from linattn.dialect_patterns.target import Target

from .schema import check_contracts, domain_of
from .specialize import SpecializedGraph


def join_products(
    graph: SpecializedGraph, versions: Mapping[str, int], target: Target, options: LoweringOptions
) -> SpecializedGraph:
    """The graph with products of one value joined.

    Args:
        graph: An entry point's graph; not changed.
        versions: Domain -> opset version.
        target: The machine; on one without such kernels nothing is joined.
        options: What the user asked of the lowering.
    """
    model = graph.copied()
    contracts = check_contracts(model.graph, graph.types, versions)
    weights = {tensor.name for tensor in model.graph.initializer}
    products: dict[tuple[str, str], list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        is_product = node.op_type == "MatMul" and domain_of(node) == "" and node.input[1] in weights
        kind = joining(contracts[node.name], target, options) if is_product else ""
        if kind:
            products.setdefault((node.input[0], kind), []).append(node)
    for nodes in products.values():
        for some in groups_of(nodes, most_products(target)):
            found = [contracts[node.name] for node in some]
            tail = gated_tail(model.graph, some)
            if tail and can_join(found, True, target, options):
                gate = tail[0].input[0] if tail[0].op_type == "Sigmoid" else ""
                ordered = sorted(some, key=lambda node: node.output[0] != gate)
                _replace(model.graph, GATED, ordered, [*some, *tail], [tail[-1].output[0]])
            elif can_join(found, False, target, options):
                _replace(model.graph, JOINED, some, some, [node.output[0] for node in some])
    return SpecializedGraph(model, graph.types)


def groups_of(nodes: Sequence[onnx.NodeProto], most: int) -> list[Sequence[onnx.NodeProto]]:
    """The nodes in as few groups of at most that many as will do, of equal sizes as far as they go."""
    count = -(-len(nodes) // most)
    bounds = [len(nodes) * i // count for i in range(count + 1)]
    return [nodes[start:stop] for start, stop in itertools.pairwise(bounds)]


def gated_tail(graph: onnx.GraphProto, products: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes that make silu(gate) * up of two products, in order; none where something else reads a part of it."""
    outputs = {value.name for value in graph.output}

    def readers(name: str) -> list[onnx.NodeProto]:
        return [node for node in graph.node if name in node.input]

    if len(products) != 2 or any(node.output[0] in outputs for node in products):
        return []
    for gate, up in (products, products[::-1]):
        after = sorted(readers(gate.output[0]), key=lambda node: node.op_type != "Sigmoid")
        if [node.op_type for node in after] != ["Sigmoid", "Mul"]:
            continue
        sigmoid, silu = after
        last = readers(silu.output[0])
        if (
            {*silu.input} == {gate.output[0], sigmoid.output[0]}
            and readers(sigmoid.output[0]) == [silu]
            and [node.op_type for node in last] == ["Mul"]
            and {*last[0].input} == {silu.output[0], up.output[0]}
            and readers(up.output[0]) == last
            and not outputs & {sigmoid.output[0], silu.output[0]}
        ):
            return [sigmoid, silu, last[0]]
    return []


def _replace(
    graph: onnx.GraphProto,
    op_type: str,
    products: Sequence[onnx.NodeProto],
    gone: Sequence[onnx.NodeProto],
    outputs: Sequence[str],
) -> None:
    """Put one node where the first of the products was; every input of it is known there."""
    inputs = [products[0].input[0], *(node.input[1] for node in products)]
    node = onnx.helper.make_node(op_type, inputs, outputs, f"{products[0].name}.joined", domain=INTERNAL)
    put_in_place(graph, node, gone)


def put_in_place(graph: onnx.GraphProto, node: onnx.NodeProto, gone: Sequence[onnx.NodeProto]) -> None:
    """Put a node where the first of those was that it stands for."""
    names = [other.name for other in gone]
    place = next(i for i, other in enumerate(graph.node) if other.name in names)
    kept = [other for other in graph.node if other.name not in names]
    kept.insert(place, node)
    del graph.node[:]
    graph.node.extend(kept)
