"""Optional inputs that are left out at the end of a node's list go: ONNX reads a list with and without them alike."""

from __future__ import annotations

import onnx


def drop_trailing_inputs(graph: onnx.GraphProto) -> None:
    """Take empty names from the end of every node's inputs, in place."""
    for node in graph.node:
        while node.input and not node.input[-1]:
            del node.input[-1]
