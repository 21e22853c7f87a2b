"""Reductions of bf16 are computed in f32 and rounded once, between two Casts.

IREE sums in the type of the elements: 8 bits of mantissa make 256 + 1 of it 256, and on Vulkan it does not compile
("'spirv.Bitcast' op mismatch in result type bitwidth").
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import TensorProto, helper

_REDUCTIONS = frozenset({
    "CumSum", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSum", "ReduceSumSquare",
})  # fmt: skip


def widen_reductions(graph: onnx.GraphProto, types: Mapping[str, onnx.TypeProto]) -> bool:
    """Put the Casts around the reductions of a graph, in place.

    Args:
        graph: The graph.
        types: Value -> its type.

    Returns:
        Whether there were any.
    """
    nodes: list[onnx.NodeProto] = []
    found = False
    for node in graph.node:
        given = types.get(node.input[0]) if node.input else None
        narrow = given is not None and given.tensor_type.elem_type == TensorProto.BFLOAT16
        if node.domain or node.op_type not in _REDUCTIONS or not narrow:
            nodes.append(node)
            continue
        found = True
        before, after = node.input[0], node.output[0]
        wide, reduced = f"{after}/in_f32", f"{after}/f32"
        nodes.append(helper.make_node("Cast", [before], [wide], f"{node.name}/widen", to=TensorProto.FLOAT))
        node.input[0], node.output[0] = wide, reduced
        nodes += [node, helper.make_node("Cast", [reduced], [after], f"{node.name}/narrow", to=TensorProto.BFLOAT16)]
    del graph.node[:]
    graph.node.extend(nodes)
    return found
