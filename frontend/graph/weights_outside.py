"""The values of weights leave the graph, as if they had come in a file beside it.

Each entry point is a copy of the graph, and shape inference writes and reads a whole one each time: those are cheap
without the values. Integers stay: they may be shapes, axes or indices, whose values inference and folding look at.
"""

from __future__ import annotations

from onnx import TensorProto, numpy_helper

from ..model import LoadedModel
from .schema import is_weight

_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.UINT8)


def move_weights_outside(model: LoadedModel) -> None:
    """Move them to ``model.weights``, in place."""
    for tensor in model.proto.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL or tensor.data_type not in _TYPES or not is_weight(tensor):
            continue
        model.weights[tensor.name] = numpy_helper.to_array(tensor)
        model.derived.add(tensor.name)  # the graph's hash knows them
        kept = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        kept.data_location = TensorProto.EXTERNAL
        tensor.CopyFrom(kept)
