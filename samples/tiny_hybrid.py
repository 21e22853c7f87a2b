"""Builds a tiny hybrid language model as ONNX: gated-delta layers with short convolutions and one softmax layer.

It has the shape of the real ones (Qwen3.5 and its kin) in small: bytes as tokens, random weights, every state that
such models carry, in the standard operators of ai.onnx 27.

    python samples/tiny_hybrid.py tiny/model.onnx

writes a tokenizer of bytes and a chat template beside it, so that it speaks text (random text: so are its weights).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCABULARY, HIDDEN, HEADS, HEAD, TAPS, ROTARY, POSITIONS = 256, 64, 2, 32, 4, 16, 512
DTYPES = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16}


class _Graph:
    """Collects nodes and weights; methods return the name of the value they made."""

    def __init__(self, dtype: int, seed: int) -> None:
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(seed)

    def op(self, op_type: str, *inputs: str, outputs: int = 1, name: str = "", **attributes: object) -> list[str]:
        name = name or f"{op_type}_{len(self.nodes)}"
        results = [name if outputs == 1 else f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), results, name=f"node.{name}", **attributes))
        return results

    def one(self, op_type: str, *inputs: str, name: str = "", **attributes: object) -> str:
        return self.op(op_type, *inputs, name=name, **attributes)[0]

    def constant(self, value: object, dtype: type | None = None) -> str:
        array = np.asarray(value) if dtype is None else np.asarray(value, dtype)
        name = f"constant_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, *shape: int, scale: float | None = None) -> str:
        scale = shape[0] ** -0.5 if scale is None else scale
        array = self._random.standard_normal(shape) * scale
        self.weights.append(numpy_helper.from_array(array.astype(helper.tensor_dtype_to_np_dtype(self.dtype)), name))
        return name

    def norm(self, x: str, name: str, width: int) -> str:
        ones = np.ones(width, helper.tensor_dtype_to_np_dtype(self.dtype))
        self.weights.append(numpy_helper.from_array(ones, f"{name}.weight"))
        return self.one("RMSNormalization", x, f"{name}.weight", name=name, epsilon=1e-6, axis=-1)


def _unit_heads(g: _Graph, x: str) -> str:
    """[B, T, H*d] with every head at length one."""
    heads = g.one("Reshape", x, g.constant([0, 0, HEADS, HEAD], np.int64))
    return g.one("Reshape", g.one("LpNormalization", heads, axis=-1, p=2), g.constant([0, 0, HEADS * HEAD], np.int64))


def _delta_layer(g: _Graph, x: str, layer: int) -> str:
    width, prefix = HEADS * HEAD, f"layers.{layer}"
    qkv = g.one("MatMul", x, g.weight(f"{prefix}.qkv", HIDDEN, 3 * width))
    columns = g.one("Transpose", qkv, perm=[0, 2, 1])
    g.nodes.append(
        helper.make_node(
            "CausalConvWithState",
            [columns, g.weight(f"{prefix}.conv", 3 * width, 1, TAPS, scale=0.5), "", f"past.{layer}.conv"],
            [f"{prefix}.conv_out", f"present.{layer}.conv"],
            name=f"{prefix}.conv",
            activation="silu",
        )
    )
    rows = g.one("Transpose", f"{prefix}.conv_out", perm=[0, 2, 1])
    q, k, v = g.op("Split", rows, g.constant([width] * 3, np.int64), outputs=3, name=f"{prefix}.split", axis=-1)
    beta = g.one("Sigmoid", g.one("MatMul", x, g.weight(f"{prefix}.beta", HIDDEN, HEADS)))
    decay = g.one("Neg", g.one("Softplus", g.one("MatMul", x, g.weight(f"{prefix}.decay", HIDDEN, HEADS))))
    g.nodes.append(
        helper.make_node(
            "LinearAttention",
            [_unit_heads(g, q), _unit_heads(g, k), v, f"past.{layer}.recurrent", decay, beta],
            [f"{prefix}.attention", f"present.{layer}.recurrent"],
            name=f"{prefix}.linear_attention",
            q_num_heads=HEADS,
            kv_num_heads=HEADS,
            update_rule="gated_delta",
        )
    )
    return g.one("MatMul", f"{prefix}.attention", g.weight(f"{prefix}.out", width, HIDDEN))


def _softmax_layer(g: _Graph, x: str, layer: int) -> str:
    width, prefix = HEADS * HEAD, f"layers.{layer}"
    angles = np.arange(POSITIONS)[:, None] / 10_000.0 ** (np.arange(ROTARY // 2) / (ROTARY // 2))
    np_dtype = helper.tensor_dtype_to_np_dtype(g.dtype)
    cos, sin = (g.constant(f(angles).astype(np_dtype)) for f in (np.cos, np.sin))
    rotary = [g.one("Gather", table, "position_ids") for table in (cos, sin)]
    q, k, v = (g.one("MatMul", x, g.weight(f"{prefix}.{n}", HIDDEN, width)) for n in "qkv")
    q, k = (
        g.one("RotaryEmbedding", t, *rotary, num_heads=HEADS, rotary_embedding_dim=ROTARY, interleaved=0)
        for t in (q, k)
    )
    mask = g.one("Cast", g.one("Unsqueeze", "attention_mask", g.constant([1, 2], np.int64)), to=TensorProto.BOOL)
    g.nodes.append(
        helper.make_node(
            "Attention",
            [q, k, v, mask, f"past.{layer}.key", f"past.{layer}.value"],
            [f"{prefix}.attention", f"present.{layer}.key", f"present.{layer}.value"],
            name=f"{prefix}.attention",
            q_num_heads=HEADS,
            kv_num_heads=HEADS,
            is_causal=1,
        )
    )
    return g.one("MatMul", f"{prefix}.attention", g.weight(f"{prefix}.out", width, HIDDEN))


def build(dtype: str = "f32", seed: int = 0) -> onnx.ModelProto:
    """The model.

    Args:
        dtype: ``f32`` or ``f16``, of weights, activations and states.
        seed: Of the random weights.
    """
    g = _Graph(DTYPES[dtype], seed)
    hidden = g.one("Gather", g.weight("embedding", VOCABULARY, HIDDEN, scale=1.0), "input_ids")
    kinds = ("delta", "softmax", "delta")
    for layer, kind in enumerate(kinds):
        mix = _delta_layer if kind == "delta" else _softmax_layer
        hidden = g.one("Add", hidden, mix(g, g.norm(hidden, f"layers.{layer}.norm", HIDDEN), layer))
        gate = g.one("MatMul", hidden, g.weight(f"layers.{layer}.gate", HIDDEN, 2 * HIDDEN))
        gate = g.one("Mul", gate, g.one("Sigmoid", gate))
        hidden = g.one("Add", hidden, g.one("MatMul", gate, g.weight(f"layers.{layer}.down", 2 * HIDDEN, HIDDEN)))
    g.one("MatMul", g.norm(hidden, "norm", HIDDEN), g.weight("head", HIDDEN, VOCABULARY), name="logits")

    def value(name: str, dims: list[int | str], elem: int = g.dtype) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, elem, dims)

    int64 = TensorProto.INT64
    inputs = [value("input_ids", ["batch", "sequence"], int64), value("attention_mask", ["batch", "total"], int64)]
    inputs.append(value("position_ids", ["batch", "sequence"], int64))
    outputs = [value("logits", ["batch", "sequence", VOCABULARY])]
    for layer, kind in enumerate(kinds):
        shapes = {"conv": [3 * HEADS * HEAD, TAPS - 1], "recurrent": [HEADS, HEAD, HEAD]}
        if kind == "softmax":
            shapes = {"key": [HEADS, "past", HEAD], "value": [HEADS, "past", HEAD]}
        for name, shape in shapes.items():
            inputs.append(value(f"past.{layer}.{name}", ["batch", *shape]))
            after = ["total" if d == "past" else d for d in shape]
            outputs.append(value(f"present.{layer}.{name}", ["batch", *after]))
    graph = helper.make_graph(g.nodes, "tiny_hybrid", inputs, outputs, g.weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 27)], ir_version=13)


def main() -> None:
    """Writes the model and its files of text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", metavar="OUT.onnx", type=Path, nargs="?", default=Path("tiny_hybrid.onnx"))
    path: Path = parser.parse_args().output
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(build(), path)
    print(f"{path}: {path.stat().st_size} bytes")

    import byte_tokenizer  # lies beside this script

    byte_tokenizer.write(path.parent)


if __name__ == "__main__":
    main()
