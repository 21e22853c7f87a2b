"""Builds the model of the benchmarks: the layers of Qwen3.5-0.8B with random weights, of any size and type.

    python samples/benchmark_model.py build/fp32/model.onnx
    python samples/benchmark_model.py build/int4/model.onnx --dtype int4
    python samples/benchmark_model.py build/large/model.onnx --dtype int4 --layers 24 --vocabulary 151936

The graph is what onnxruntime-genai's model builder writes of such a model: three layers of LinearAttention, one of
softmax attention, and so on. It takes no exporter and no download, and equal arguments make equal files. Its speed is
real, what it says is not.
"""

from __future__ import annotations

import argparse
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

MICROSOFT, POSITIONS, BLOCK, ALIGNMENT = "com.microsoft", 4096, 32, 4096
SOFTMAX_HEAD, ROTARY, KV_HEADS = 256, 64, 2
HEAD, TAPS = 128, 4
TYPES = {
    "fp32": (TensorProto.FLOAT, np.dtype(np.float32)),
    "fp16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "bf16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
    "int4": (TensorProto.FLOAT, np.dtype(np.float32)),
}


@dataclass(frozen=True)
class Shape:
    """The sizes; the defaults are those of the published figures, 149 M parameters.

    Attributes:
        layers: Every fourth has softmax attention.
        hidden: Width of a token.
        heads: Of LinearAttention, 128 wide.
        mlp: Width inside the MLP.
        vocabulary: Tokens.
        dtype: ``fp32``, ``fp16``, ``bf16``, or ``int4``: products of 4-bit weights in blocks of 32, the rest in fp32.
        seed: Of the weights.
    """

    layers: int = 4
    hidden: int = 1024
    heads: int = 16
    mlp: int = 3584
    vocabulary: int = 32_000
    dtype: str = "fp32"
    seed: int = 0


@dataclass
class _Graph:
    """Collects nodes, and writes weights to a file as they are made; methods return the name of the value they made."""

    shape: Shape
    file: BinaryIO
    location: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)

    def op(self, op_type: str, *inputs: str, name: str, outputs: list[str] | None = None, **attributes: Any) -> str:
        made = outputs or [f"{name}/output_0"]
        self.nodes.append(helper.make_node(op_type, list(inputs), made, name=name, **attributes))
        return made[0]

    def numbers(self, name: str, values: object) -> str:
        array = np.asarray(values, None if isinstance(values, np.ndarray) else np.int64)
        self.weights.append(onnx.numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, array: np.ndarray) -> str:
        """A weight in the file, where pages begin."""
        self.file.write(b"\0" * (-self.file.tell() % ALIGNMENT))
        tensor = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        for key, value in (("location", self.location), ("offset", self.file.tell()), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self.file.write(np.ascontiguousarray(array).tobytes())
        self.weights.append(tensor)
        return name

    def random(self, name: str) -> np.random.Generator:
        """Numbers by the weight's name, whatever was made before it."""
        return np.random.default_rng([self.shape.seed, zlib.crc32(name.encode())])

    def values(self, name: str, *dims: int, scale: float = 0.02) -> str:
        array = self.random(name).standard_normal(dims, np.float32) * np.float32(scale)
        return self.weight(name, array.astype(TYPES[self.shape.dtype][1]))

    def ones(self, name: str, width: int) -> str:
        return self.weight(name, np.ones(width, TYPES[self.shape.dtype][1]))

    def product(self, x: str, name: str, depth: int, columns: int) -> str:
        weight = name.strip("/").replace("/", ".").removesuffix(".MatMul") + ".MatMul.weight"
        if self.shape.dtype != "int4" or columns < BLOCK:  # the builder leaves the gates' narrow ones alone
            return self.op("MatMul", x, self.values(weight, depth, columns), name=name)
        bits = self.random(weight).integers(0, 256, (columns, depth // BLOCK, BLOCK // 2), np.uint8)
        packed = self.weight(f"{weight}_Q4", bits)
        scales = self.weight(f"{weight}_scales", np.full((columns, depth // BLOCK), 0.004, np.float32))
        sizes = {"K": depth, "N": columns, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
        return self.op("MatMulNBits", x, packed, scales, name=f"{name}_Q4", domain=MICROSOFT, **sizes)


def _delta_layer(g: _Graph, x: str, layer: int) -> str:
    heads, width = g.shape.heads, g.shape.heads * HEAD
    at, weights = f"/model/layers.{layer}/linear_attn", f"model.layers.{layer}.linear_attn"
    qkv, z, b, a = (
        g.product(x, f"{at}/{name}_proj/MatMul", g.shape.hidden, columns)
        for name, columns in (("qkv", 3 * width), ("z", width), ("b", heads), ("a", heads))
    )
    columns = g.op("Transpose", qkv, name=f"{at}/qkv_proj/Transpose", perm=[0, 2, 1])
    taps, bias = g.values(f"{weights}.conv1d.weight", 3 * width, 1, TAPS, scale=0.5), f"{weights}.conv1d.bias"
    g.weight(bias, np.zeros(3 * width, TYPES[g.shape.dtype][1]))
    conv = {"outputs": [f"{at}/conv", f"present.{layer}.conv"], "domain": MICROSOFT, "activation": "silu", "ndim": 1}
    g.op("CausalConvWithState", columns, taps, bias, f"past.{layer}.conv", name=f"{at}/CausalConvWithState", **conv)
    rows = g.op("Transpose", f"{at}/conv", name=f"{at}/conv_out/Transpose", perm=[0, 2, 1])
    parts = [f"{at}/{name}" for name in "qkv"]
    g.op("Split", rows, g.numbers(f"{at}/widths", [width] * 3), name=f"{at}/split_qkv/Split", outputs=parts, axis=-1)
    flat, split = g.numbers(f"{at}/flat", [0, 0, width]), g.numbers(f"{at}/split", [0, 0, heads, HEAD])
    for index, part in enumerate(parts[:2]):
        apart = g.op("Reshape", part, split, name=f"{part}_l2norm/flat/Reshape")
        unit = g.op("LpNormalization", apart, name=f"{part}_l2norm/LpNormalization", axis=-1, p=2)
        parts[index] = g.op("Reshape", unit, flat, name=f"{part}_l2norm/unflat/Reshape")
    scale = g.numbers(f"{at}/scale", np.array(HEAD**-0.5, TYPES[g.shape.dtype][1]))
    q = g.op("Mul", parts[0], scale, name=f"{at}/q_scaled/Mul")
    # The gates' parameters stay in fp32.
    decay = -g.random(f"{weights}.neg_exp_A").uniform(0.05, 4, heads).astype(np.float32)
    rates = g.weight(f"{weights}.neg_exp_A", decay)
    steps = g.weight(f"{weights}.dt_bias", g.random(f"{weights}.dt_bias").standard_normal(heads, np.float32) * 0.02)
    gates = [f"{at}/decay", f"{at}/beta"]
    g.op("LinearAttentionGate", a, steps, rates, b, name=f"{at}/LinearAttentionGate", outputs=gates, domain=MICROSOFT)
    rule = {"q_num_heads": heads, "kv_num_heads": heads, "update_rule": "gated_delta", "scale": 1.0}
    made = [f"{at}/attention", f"present.{layer}.recurrent"]
    inputs = (q, parts[1], parts[2], f"past.{layer}.recurrent", *gates)
    g.op("LinearAttention", *inputs, name=f"{at}/LinearAttention", outputs=made, domain=MICROSOFT, **rule)
    norm = g.ones(f"{weights}.norm.weight", HEAD)
    gated = g.op("GatedRMSNorm", made[0], norm, z, name=f"{at}/GatedRMSNorm", domain=MICROSOFT, epsilon=1e-6)
    return g.product(gated, f"{at}/out_proj/MatMul", width, g.shape.hidden)


def _softmax_layer(g: _Graph, x: str, layer: int) -> str:
    heads = max(g.shape.hidden // HEAD, KV_HEADS)
    width, kv_width = heads * SOFTMAX_HEAD, KV_HEADS * SOFTMAX_HEAD
    at, weights = f"/model/layers.{layer}/attn", f"model.layers.{layer}.attn"
    qkv = g.product(x, f"{at}/qkv_proj/MatMul", g.shape.hidden, 2 * width + 2 * kv_width)
    parts = [f"{at}/{name}" for name in ("q_and_gate", "k", "v")]
    widths = g.numbers(f"{at}/widths", [2 * width, kv_width, kv_width])
    g.op("Split", qkv, widths, name=f"{at}/qkv_proj/Split", outputs=parts, axis=-1)
    pairs = g.op("Reshape", parts[0], g.numbers(f"{at}/pairs", [0, 0, heads, -1]), name=f"{at}/q_gate/Reshape")
    halves = g.numbers(f"{at}/halves", [SOFTMAX_HEAD] * 2)
    g.op("Split", pairs, halves, name=f"{at}/q_gate/Split", outputs=[f"{at}/q", f"{at}/gate"], axis=-1)
    flat = g.numbers(f"{at}/flat", [0, 0, width])
    q, gate = (g.op("Reshape", f"{at}/{name}", flat, name=f"{at}/{name}/Reshape") for name in ("q", "gate"))
    turned: list[str] = []
    for name, part, count in (("q", q, heads), ("k", parts[1], KV_HEADS)):
        rows = g.op("Reshape", part, g.numbers(f"{at}/{name}_rows", [0, -1, SOFTMAX_HEAD]), name=f"{at}/{name}_norm/in")
        scale = g.ones(f"{weights}.{name}_norm.layernorm.weight", SOFTMAX_HEAD)
        even = g.op("SimplifiedLayerNormalization", rows, scale, name=f"{at}/{name}_norm/norm", epsilon=1e-6, axis=-1)
        shape = g.numbers(f"{at}/{name}_flat", [0, -1, count * SOFTMAX_HEAD])
        even = g.op("Reshape", even, shape, name=f"{at}/{name}_norm/out")
        turned.append(_rotated(g, even, f"{at}/{name}_rotary", count))
    past = [f"past_key_values.{layer}.{name}" for name in ("key", "value")]
    made = [f"{at}/attention", *(f"present.{layer}.{name}" for name in ("key", "value"))]
    inputs = (*turned, parts[2], *past, "seqlens_k", "total_length")
    sizes = {"num_heads": heads, "kv_num_heads": KV_HEADS, "scale": SOFTMAX_HEAD**-0.5}
    g.op("GroupQueryAttention", *inputs, name=f"{at}/GroupQueryAttention", outputs=made, domain=MICROSOFT, **sizes)
    opened = g.op("Sigmoid", gate, name=f"{at}/gate/Sigmoid")
    return g.product(g.op("Mul", made[0], opened, name=f"{at}/gate/Mul"), f"{at}/o_proj/MatMul", width, g.shape.hidden)


def _rotated(g: _Graph, x: str, name: str, heads: int) -> str:
    """Rotary embedding, in fp32 as the builder leaves it."""
    narrow = g.shape.dtype in ("fp16", "bf16")
    wide = g.op("Cast", x, name=f"{name}/cast_in", to=TensorProto.FLOAT) if narrow else x
    sizes = {"rotary_embedding_dim": ROTARY, "num_heads": heads, "mrope_section": [11, 11, 10], "mrope_layout": 1}
    inputs = (wide, "position_ids", "cos_cache", "sin_cache")
    turned = g.op("MRotaryEmbedding", *inputs, name=f"{name}/MRotaryEmbedding", domain=MICROSOFT, **sizes)
    return g.op("Cast", turned, name=f"{name}/cast_out", to=TYPES[g.shape.dtype][0]) if narrow else turned


def _mlp(g: _Graph, x: str, layer: int) -> str:
    at, shape = f"/model/layers.{layer}/mlp", g.shape
    gate = g.product(x, f"{at}/gate_proj/MatMul", shape.hidden, shape.mlp)
    up = g.product(x, f"{at}/up_proj/MatMul", shape.hidden, shape.mlp)
    silu = g.op("Mul", gate, g.op("Sigmoid", gate, name=f"{at}/act_fn/Sigmoid"), name=f"{at}/act_fn/Mul")
    return g.product(g.op("Mul", silu, up, name=f"{at}/Mul"), f"{at}/down_proj/MatMul", shape.mlp, shape.hidden)


def _lengths(g: _Graph) -> None:
    """Of a batch, what GroupQueryAttention wants to know of the mask."""
    at, one = "/model/attn_mask_reformat", g.numbers("one", [1])
    rows = g.op("ReduceSum", "attention_mask", one, name=f"{at}/ReduceSum", keepdims=0)
    less = g.op("Sub", rows, one, name=f"{at}/Sub")
    g.op("Cast", less, name=f"{at}/Sub/Cast", outputs=["seqlens_k"], to=TensorProto.INT32)
    sizes = g.op("Shape", "attention_mask", name=f"{at}/Shape")
    total = g.op("Gather", sizes, g.numbers("second", np.array(1, np.int64)), name=f"{at}/Gather", axis=0)
    g.op("Cast", total, name=f"{at}/Gather/Cast", outputs=["total_length"], to=TensorProto.INT32)


def _ends(shape: Shape) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    """Inputs and outputs."""
    elem, integer = TYPES[shape.dtype][0], TensorProto.INT64
    value, tokens = helper.make_tensor_value_info, ["batch_size", "sequence_length"]
    inputs = [value("input_ids", integer, tokens)]
    inputs.append(value("attention_mask", integer, ["batch_size", "total_sequence_length"]))
    inputs.append(value("position_ids", integer, [3, *tokens]))
    outputs = [value("logits", elem, [*tokens, shape.vocabulary])]
    width = shape.heads * HEAD
    for layer in range(shape.layers):
        if layer % 4 == 3:
            for name in ("key", "value"):
                dims = (["batch_size", KV_HEADS, f"{when}_sequence_length", SOFTMAX_HEAD] for when in ("past", "total"))
                inputs.append(value(f"past_key_values.{layer}.{name}", elem, next(dims)))
                outputs.append(value(f"present.{layer}.{name}", elem, next(dims)))
            continue
        for name, dims in (("conv", [3 * width, TAPS - 1]), ("recurrent", [shape.heads, HEAD, HEAD])):
            inputs.append(value(f"past.{layer}.{name}", elem, ["batch_size", *dims]))
            outputs.append(value(f"present.{layer}.{name}", elem, ["batch_size", *dims]))
    return inputs, outputs


def write(shape: Shape, path: Path) -> int:
    """Writes ``path`` and its weights beside it, as ``path`` with ``.data``.

    Returns:
        The number of bytes of the weights.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_name(f"{path.name}.data")
    with data.open("wb") as file:
        g = _Graph(shape, file, data.name)
        _lengths(g)
        angles = np.outer(np.arange(POSITIONS), 10_000.0 ** (-np.arange(ROTARY // 2) / (ROTARY // 2)))
        for name, curve in (("cos_cache", np.cos), ("sin_cache", np.sin)):
            g.weight(name, curve(angles).astype(np.float32))
        table = g.values("model.embed_tokens.weight", shape.vocabulary, shape.hidden)
        x, more = g.op("Gather", table, "input_ids", name="/model/embed_tokens/Gather"), ""
        for layer in range(shape.layers):
            at, mix = f"/model/layers.{layer}", _softmax_layer if layer % 4 == 3 else _delta_layer
            x, kept = _norm(g, x, more, f"{at}/input_layernorm", f"model.layers.{layer}.input_layernorm.weight")
            mixed = mix(g, x, layer)
            names = f"{at}/post_attention_layernorm", f"model.layers.{layer}.post_attention_layernorm.weight"
            x, kept = _norm(g, kept, mixed, *names)
            x, more = kept, _mlp(g, x, layer)
        x, _ = _norm(g, x, more, "/model/final_norm", "model.final_norm.weight")
        g.product(x, "/lm_head/MatMul", shape.hidden, shape.vocabulary)
        g.nodes[-1].output[0] = "logits"
        size = file.tell()
    inputs, outputs = _ends(shape)
    graph = helper.make_graph(g.nodes, "benchmark", inputs, outputs, g.weights)
    imports = [helper.make_opsetid("", 22), helper.make_opsetid(MICROSOFT, 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return size


def _norm(g: _Graph, x: str, more: str, name: str, weight: str) -> tuple[str, str]:
    """The norm of x and of what is added to it; and that sum."""
    scale = g.ones(weight, g.shape.hidden)
    if not more:
        return g.op("SimplifiedLayerNormalization", x, scale, name=name, axis=-1, epsilon=1e-6), x
    made = [f"{name}/output_0", "", "", f"{name}/output_3"]
    inputs = (x, more, scale)
    g.op("SkipSimplifiedLayerNormalization", *inputs, name=name, outputs=made, domain=MICROSOFT, epsilon=1e-6)
    return made[0], made[3]


def main() -> None:
    """Writes the model that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="MODEL.onnx", type=Path, help="file to write; the weights go beside it")
    parser.add_argument("--dtype", choices=list(TYPES), default="fp32", help="default: %(default)s")
    for name in ("layers", "hidden", "heads", "mlp", "vocabulary", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Shape, name), help="default: %(default)s")
    options = vars(parser.parse_args())
    path = options.pop("path")
    size = write(Shape(**options), path)
    print(f"{path}: {size / 2**20:.0f} MiB of weights beside it")


if __name__ == "__main__":
    main()
