"""Turns an fp32 export of onnxruntime-genai's model builder into the fp16 one that the builder itself writes.

python samples/half_precision.py fp32/model.onnx fp16/model.onnx

Weights, states and values become fp16. What the builder leaves in fp32 stays so: the parameters of the gates, and the
rotary embeddings with a cast before and after each.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

KEEPS_PARAMETERS = ("LinearAttentionGate", "MRotaryEmbedding")
RUNS_IN_FP32 = ("MRotaryEmbedding",)


def to_half(model: onnx.ModelProto) -> None:
    """Converts the model in place."""
    graph = model.graph
    kept = {name for node in graph.node if node.op_type in KEEPS_PARAMETERS for name in node.input}
    for tensor in graph.initializer:
        if tensor.name not in kept:
            _round(tensor)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    del graph.value_info[:]
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                _round(attribute.t)
        nodes += _between_casts(node) if node.op_type in RUNS_IN_FP32 else [node]
    del graph.node[:]
    graph.node.extend(nodes)


def _round(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        half = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))


def _between_casts(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    before, after = node.input[0], node.output[0]
    node.input[0], node.output[0] = f"{after}/in_fp32", f"{after}/fp32"
    return [
        onnx.helper.make_node("Cast", [before], [node.input[0]], f"{node.name}/cast_in", to=TensorProto.FLOAT),
        node,
        onnx.helper.make_node("Cast", [node.output[0]], [after], f"{node.name}/cast_out", to=TensorProto.FLOAT16),
    ]


def main() -> None:
    """Reads one model, writes the other."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, output = Path(sys.argv[1]), Path(sys.argv[2])
    output.parent.mkdir(parents=True, exist_ok=True)
    model = onnx.load(source)
    to_half(model)
    onnx.save(model, output, save_as_external_data=True, location=f"{output.name}.data", size_threshold=64)


if __name__ == "__main__":
    main()
