"""Swish (ai.onnx 24) in the operators that exporters wrote before, which kernels of gated products look for.

Swish(x, alpha)  ->  Mul(x, Sigmoid(Mul(x, alpha)))
"""

from __future__ import annotations

import onnx

from .names import Names
from .schema import attributes_of, domain_of


def expand_swish(graph: onnx.GraphProto) -> None:
    """Replace each Swish, in place."""
    kept: list[onnx.NodeProto] = []
    names = Names(graph)
    for node in graph.node:
        if node.op_type != "Swish" or domain_of(node) != "":
            kept.append(node)
            continue
        x, (y,), alpha = node.input[0], node.output, attributes_of(node).get("alpha", 1.0)
        assert isinstance(alpha, float)
        inner = x
        if alpha != 1.0:
            factor, cast, inner = (names.new(f"{y}.{what}") for what in ("alpha", "alpha of its type", "scaled"))
            graph.initializer.append(onnx.helper.make_tensor(factor, onnx.TensorProto.FLOAT, [], [alpha]))
            kept += [
                onnx.helper.make_node("CastLike", [factor, x], [cast], f"{node.name}.cast"),
                onnx.helper.make_node("Mul", [x, cast], [inner], f"{node.name}.scale"),
            ]
        gate = names.new(f"{y}.gate")
        kept += [
            onnx.helper.make_node("Sigmoid", [inner], [gate], f"{node.name}.gate"),
            onnx.helper.make_node("Mul", [x, gate], [y], node.name),
        ]
    del graph.node[:]
    graph.node.extend(kept)
