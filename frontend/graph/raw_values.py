"""Puts 16-bit values into bytes: ONNX may keep them in a field of 32-bit numbers, and IREE's importer knows bytes only.

Initializers and attributes (ConstantOfShape's value), of float16, bfloat16 and uint16.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, numpy_helper

_NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.UINT16)


def raw_values(graph: onnx.GraphProto) -> None:
    """Change the tensors of a graph, in place."""
    attributes = [attribute.t for node in graph.node for attribute in node.attribute if attribute.HasField("t")]
    for tensor in (*graph.initializer, *attributes):
        if tensor.data_type in _NARROW and len(tensor.int32_data):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
