"""TopK of few candidates as ranks, for GPUs: each element counts those before it, and position p has the one of rank p.

IREE 3.13 sorts a row by one thread, and its Vulkan code of a sort whose values nobody reads (a router that takes the
indices only) does not compile. Counting is two parallel loops, and equal elements come in the order of their indices,
as ONNX has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from linattn.dialect_patterns.node import TensorSpec
from linattn.dialect_patterns.target import Target
from onnx import helper, numpy_helper

from .constants import constant_ints
from .schema import attributes_of, domain_of, opset_versions, spec_of_type, type_of_spec
from .specialize import SpecializedGraph

MAX_CANDIDATES = 1024
"""Ranks take the square of it in comparisons, a row."""


def rank_top_k(graph: SpecializedGraph, target: Target) -> SpecializedGraph:
    """The graph with its TopK along the last axis written as ranks.

    Args:
        graph: An entry point's graph; not changed.
        target: The machine; for CPUs nothing changes.
    """
    found = [node for node in graph.proto.graph.node if _is_meant(node, graph)]
    if not target.is_gpu or not found or opset_versions(graph.proto).get("", 1) < 13:
        return graph
    model = graph.copied()
    types = dict(graph.types)
    kept: list[onnx.NodeProto] = []
    for node in model.graph.node:
        kept += _ranks(node, model.graph, types) if _is_meant(node, graph) else [node]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return SpecializedGraph(model, types)


def _is_meant(node: onnx.NodeProto, graph: SpecializedGraph) -> bool:
    if node.op_type != "TopK" or domain_of(node) != "" or len(node.input) != 2:
        return False
    spec, attributes = spec_of_type(graph.types.get(node.input[0])), attributes_of(node)
    return (
        spec is not None
        and spec.rank > 0
        and spec.dtype in ("f32", "f16", "bf16")
        and isinstance(size := spec.shape[-1], int)
        and 0 < size <= MAX_CANDIDATES
        and attributes.get("axis", -1) in (-1, spec.rank - 1)
        and attributes.get("largest", 1) == 1
        and constant_ints(graph.proto.graph, node.input[1]) is not None
    )


def _ranks(node: onnx.NodeProto, graph: onnx.GraphProto, types: dict[str, onnx.TypeProto]) -> list[onnx.NodeProto]:
    """The nodes in place of one TopK."""
    x, spec = node.input[0], spec_of_type(types[node.input[0]])
    (k,) = constant_ints(graph, node.input[1]) or (0,)
    assert spec is not None
    size, lead = spec.shape[-1] or 0, spec.shape[:-1]
    indices = node.output[1] if len(node.output) > 1 and node.output[1] else f"{node.output[0]}.index"
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, value: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> str:
        graph.initializer.append(numpy_helper.from_array(value, f"{indices}.{name}"))
        dtype = "i1" if value.dtype == np.bool_ else "i64"
        types[f"{indices}.{name}"] = type_of_spec(TensorSpec(tuple(value.shape), dtype))
        return f"{indices}.{name}"

    def add(
        op: str, inputs: Sequence[str], shape: Sequence[int | None], dtype: str, out: str = "", **given: Any
    ) -> str:
        out = out or f"{indices}.{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [out], f"{node.name}.{len(nodes)}", **given))
        types[out] = type_of_spec(TensorSpec(tuple(shape), dtype), types[x])
        return out

    square, chosen = (*lead, size, size), (*lead, k, size)
    last, before_last = constant("last", np.array([-1])), constant("before_last", np.array([-2]))
    own = add("Unsqueeze", [x, last], (*lead, size, 1), spec.dtype)
    other = add("Unsqueeze", [x, before_last], (*lead, 1, size), spec.dtype)
    earlier = constant("earlier", np.tri(size, size, -1, dtype=np.bool_))
    tie = add("And", [add("Equal", [other, own], square, "i1"), earlier], square, "i1")
    ahead = add("Or", [add("Greater", [other, own], square, "i1"), tie], square, "i1")
    count = add("Cast", [ahead], square, "i64", to=onnx.TensorProto.INT64)
    rank = add("ReduceSum", [count, last], (*lead, size), "i64", keepdims=0)
    ranks = add("Unsqueeze", [rank, before_last], (*lead, 1, size), "i64")
    hit = add("Equal", [ranks, constant("positions", np.arange(k)[:, None])], chosen, "i1")
    at = add("Where", [hit, constant("places", np.arange(size)), constant("none", np.array(0))], chosen, "i64")
    add("ReduceSum", [at, last], (*lead, k), "i64", indices, keepdims=0)
    if node.output[0]:
        add("GatherElements", [x, indices], (*lead, k), spec.dtype, node.output[0], axis=spec.rank - 1)
    return nodes
