"""Turns an fp32 export of onnxruntime-genai's model builder into the fp16 one that the builder itself writes.

python samples/half_precision.py fp32/model.onnx fp16/model.onnx
python samples/half_precision.py fp32/model.onnx bf16/model.onnx bf16

Weights, states and values become fp16 or bf16. What the builder leaves in fp32 stays so: the parameters of the gates,
and the rotary embeddings with a cast before and after each. Exports of mobius-onnx become 16 bits wide throughout.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

KEEPS_PARAMETERS = ("LinearAttentionGate", "MRotaryEmbedding")
RUNS_IN_FP32 = ("MRotaryEmbedding",)
DTYPES = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


def to_half(model: onnx.ModelProto, dtype: np.dtype = DTYPES["fp16"]) -> None:
    """Converts the model in place."""
    graph, half = model.graph, onnx.helper.np_dtype_to_tensor_dtype(dtype)
    kept = {name for node in graph.node if node.op_type in KEEPS_PARAMETERS for name in node.input}
    for tensor in graph.initializer:
        if tensor.name not in kept:
            _round(tensor, dtype)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = half
    del graph.value_info[:]
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "value" and attribute.HasField("t"):
                _round(attribute.t, dtype)
            elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                values = attribute.f if attribute.name == "value_float" else list(attribute.floats)
                tensor = numpy_helper.from_array(np.array(values, np.float32))
                _round(tensor, dtype)
                attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = half
        nodes += _between_casts(node, half) if node.op_type in RUNS_IN_FP32 else [node]
    del graph.node[:]
    graph.node.extend(nodes)


def _round(tensor: onnx.TensorProto, dtype: np.dtype) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        wide, limit = numpy_helper.to_array(tensor), float(ml_dtypes.finfo(dtype).max)
        narrow = np.where(np.isfinite(wide), wide.clip(-limit, limit), wide).astype(dtype)  # masks: the least float
        tensor.CopyFrom(numpy_helper.from_array(narrow, tensor.name))


def _between_casts(node: onnx.NodeProto, half: int) -> list[onnx.NodeProto]:
    before, after = node.input[0], node.output[0]
    node.input[0], node.output[0] = f"{after}/in_fp32", f"{after}/fp32"
    return [
        onnx.helper.make_node("Cast", [before], [node.input[0]], f"{node.name}/cast_in", to=TensorProto.FLOAT),
        node,
        onnx.helper.make_node("Cast", [node.output[0]], [after], f"{node.name}/cast_out", to=half),
    ]


def main() -> None:
    """Reads one model, writes the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="FP32.onnx", type=Path)
    parser.add_argument("output", metavar="OUT.onnx", type=Path)
    parser.add_argument("dtype", nargs="?", choices=sorted(DTYPES), default="fp16")
    options = parser.parse_args()
    source, output = options.source, options.output
    output.parent.mkdir(parents=True, exist_ok=True)
    model = onnx.load(source)
    to_half(model, DTYPES[options.dtype])
    onnx.save(model, output, save_as_external_data=True, location=f"{output.name}.data", size_threshold=64)


if __name__ == "__main__":
    main()
