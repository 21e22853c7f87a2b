"""Optional outputs that exporters name and nobody reads (a norm's mean) are left out, as ONNX leaves them out."""

from __future__ import annotations

import onnx
from linattn.dialect_patterns.registry import find_op

from .schema import domain_of, opset_versions


def leave_out_unused_outputs(proto: onnx.ModelProto) -> None:
    """Take the names of unread optional outputs away, in place, from nodes that our patterns lower."""
    graph, versions = proto.graph, opset_versions(proto)
    used = {v.name for v in graph.output} | {name for node in graph.node for name in node.input}
    for node in graph.node:
        if find_op(domain_of(node), node.op_type, versions.get(domain_of(node), 1)) is not None:
            for i, name in enumerate(node.output):
                if i and name not in used:
                    node.output[i] = ""
