"""Token ids and positions of a prompt on a GPU are copied into its memory before anything reads them."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from linattn.dialect_patterns.near_ids import NEAR_IDS, chunks_of
from linattn.dialect_patterns.op import INTERNAL
from linattn.dialect_patterns.target import Target

from .schema import spec_of_type
from .specialize import SpecializedGraph

LEAST_TOKENS = 16
"""Fewer are read sooner than a kernel starts."""


def near_ids(graph: SpecializedGraph, inputs: Sequence[str], tokens: int | None, target: Target) -> SpecializedGraph:
    """The graph with such copies.

    Args:
        graph: An entry point's graph; not changed.
        inputs: Names of its inputs of token ids and positions.
        tokens: T; None where it is open.
        target: The machine; on a CPU nothing changes.
    """
    specs = {name: spec_of_type(graph.types.get(name)) for name in inputs}
    meant = [name for name, spec in specs.items() if spec is not None and chunks_of(spec)]
    if not target.is_gpu or (tokens or 0) < LEAST_TOKENS or not meant:
        return graph
    model, types = graph.copied(), dict(graph.types)
    nodes: list[onnx.NodeProto] = []
    for name in meant:
        near = f"{name}.near"
        types[near] = graph.types[name]
        for node in model.graph.node:
            for place, read in enumerate(node.input):
                if read == name:
                    node.input[place] = near
        nodes.append(onnx.helper.make_node(NEAR_IDS, [name], [near], near, domain=INTERNAL))
    following = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *following])
    return SpecializedGraph(model, types)
