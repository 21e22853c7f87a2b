"""Writes a model of benchmark_model.py as GGUF: the same weights, for llama.cpp's `llama-bench`.

    python samples/benchmark_model.py build/int4/model.onnx --dtype int4
    python samples/benchmark_gguf.py build/int4/model.onnx build/int4.gguf
    llama-bench -m build/int4.gguf -p 512 -n 64 -t 2

fp32, fp16 and bf16 keep their type, int4 becomes q4_0 with the same integers; `--products q8_0` rounds the products of
the others to 8 bits. The architecture is qwen35, without a vocabulary's texts. Only numpy and onnx are needed.
"""

from __future__ import annotations

import argparse
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from benchmark_model import BLOCK, HEAD, KV_HEADS, POSITIONS, ROTARY, SOFTMAX_HEAD, TAPS
from onnx import numpy_helper

Value = str | float | list[int]
Keys = dict[str, tuple[int, Value]]
ALIGNMENT = 32
# GGUF's number of a tensor's type, and llama.cpp's of a file of mostly that.
TYPES = {"float32": (0, 0), "float16": (1, 1), "q4_0": (2, 2), "q8_0": (8, 7), "bfloat16": (30, 32)}
UINT, INT, FLOAT, STRING, ARRAY = 4, 5, 6, 8, 9
ENDS = {"model.embed_tokens.weight": "token_embd", "model.final_norm.weight": "output_norm", "lm_head": "output"}
LAYERS = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "linear_attn.qkv_proj": "attn_qkv.weight",
    "linear_attn.z_proj": "attn_gate.weight",
    "linear_attn.b_proj": "ssm_beta.weight",
    "linear_attn.a_proj": "ssm_alpha.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.neg_exp_A": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj": "ssm_out.weight",
    "attn.qkv_proj": "attn_qkv.weight",
    "attn.q_norm.layernorm.weight": "attn_q_norm.weight",
    "attn.k_norm.layernorm.weight": "attn_k_norm.weight",
    "attn.o_proj": "attn_output.weight",
    "mlp.gate_proj": "ffn_gate.weight",
    "mlp.up_proj": "ffn_up.weight",
    "mlp.down_proj": "ffn_down.weight",
}


def write(source: Path, output: Path, products: str | None = None) -> str:
    """Writes ``output`` of the model ``source``.

    Args:
        source: What benchmark_model.py wrote.
        output: The GGUF file.
        products: ``q8_0`` to round the products of an fp32, fp16 or bf16 model to 8 bits.

    Returns:
        The type of the products.
    """
    model = onnx.load_model(str(source))
    arrays = {tensor.name: numpy_helper.to_array(tensor, str(source.parent)) for tensor in model.graph.initializer}
    tensors = list(_tensors(arrays, products))
    kind = next(kind for name, kind, _, _ in tensors if name == "output.weight")
    keys = {**_keys(arrays), "general.file_type": (UINT, TYPES[kind][1])}
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys))
    header += b"".join(
        _string(key) + struct.pack("<I", type_) + _value(type_, value) for key, (type_, value) in keys.items()
    )
    offset = 0
    for name, type_name, dims, data in tensors:
        # The innermost dimension comes first.
        header += _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims[::-1], TYPES[type_name][0], offset)
        offset += len(data) + -len(data) % ALIGNMENT
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("wb") as file:
        for data in (header, *(data for *_, data in tensors)):
            file.write(data + b"\0" * (-len(data) % ALIGNMENT))
    return kind


def _keys(arrays: dict[str, np.ndarray]) -> Keys:
    vocabulary, hidden = arrays["model.embed_tokens.weight"].shape
    layers = sum(name.endswith(".input_layernorm.weight") for name in arrays)
    gate = next(array for name, array in arrays.items() if ".mlp.gate_proj.MatMul.weight" in name)
    heads = next(array for name, array in arrays.items() if name.endswith(".dt_bias")).size
    sizes = {
        "context_length": POSITIONS,
        "embedding_length": hidden,
        "block_count": layers,
        "feed_forward_length": gate.shape[1] if gate.ndim == 2 else gate.shape[0],
        "vocab_size": vocabulary,
        "attention.head_count": max(hidden // HEAD, KV_HEADS),
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": SOFTMAX_HEAD,
        "attention.value_length": SOFTMAX_HEAD,
        "rope.dimension_count": ROTARY,
        "ssm.conv_kernel": TAPS,
        "ssm.inner_size": heads * HEAD,
        "ssm.state_size": HEAD,
        "ssm.time_step_rank": heads,
        "ssm.group_count": heads,
        "full_attention_interval": 4,
    }
    keys: Keys = {"general.architecture": (STRING, "qwen35"), "general.name": (STRING, "benchmark")}
    for name, size in sizes.items():
        keys[f"qwen35.{name}"] = UINT, size
    keys["qwen35.attention.layer_norm_rms_epsilon"] = (FLOAT, 1e-6)
    keys["qwen35.rope.freq_base"] = (FLOAT, 10_000.0)
    keys["qwen35.rope.dimension_sections"] = (ARRAY, [11, 11, 10, 0])
    keys["tokenizer.ggml.model"] = (STRING, "none")
    return keys


def _tensors(arrays: dict[str, np.ndarray], products: str | None) -> Iterator[tuple[str, str, tuple[int, ...], bytes]]:
    """Names, types, dimensions with the innermost last, and bytes."""
    for name, array in arrays.items():
        base = re.sub(r"\.MatMul\.weight(_Q4)?$", "", name)
        product, layer = base != name, re.match(r"model\.layers\.(\d+)\.(.*)", base)
        if layer and layer[2] in LAYERS:
            target = f"blk.{layer[1]}.{LAYERS[layer[2]]}"
        elif base in ENDS:
            target = f"{ENDS[base]}.weight"
        else:  # scales, the biases of convolutions, which are zero, and the graph's own numbers
            continue
        if name.endswith("_Q4"):
            scales = arrays[name.removesuffix("_Q4") + "_scales"]
            yield target, "q4_0", (array.shape[0], array.shape[1] * BLOCK), _four_bits(array, scales)
        elif product:
            rows = np.ascontiguousarray(array.T)
            if products and rows.shape[0] >= BLOCK:
                yield target, products, rows.shape, _eight_bits(rows)
            else:
                yield target, rows.dtype.name, rows.shape, rows.tobytes()
        else:  # ggml wants norms, gates and the taps of convolutions in f32
            values = array.squeeze()
            values = values if target == "token_embd.weight" else values.astype(np.float32)
            yield target, values.dtype.name, values.shape, values.tobytes()


def _four_bits(packed: np.ndarray, scales: np.ndarray) -> bytes:
    """q4_0: a block's elements j and j + 16 share a byte, in ONNX 2 j and 2 j + 1 do."""
    elements = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], BLOCK)
    halves = elements[..., : BLOCK // 2] | elements[..., BLOCK // 2 :] << 4
    return _blocks(scales.reshape(packed.shape[:2]), halves)


def _eight_bits(rows: np.ndarray) -> bytes:
    """q8_0: the largest of a block is 127."""
    blocks = rows.astype(np.float32).reshape(rows.shape[0], -1, BLOCK)
    scales = np.abs(blocks).max(-1) / 127
    whole = np.rint(blocks / np.where(scales == 0, 1, scales)[..., None])
    return _blocks(scales, whole.astype(np.int8).view(np.uint8))


def _blocks(scales: np.ndarray, elements: np.ndarray) -> bytes:
    return np.concatenate([scales.astype("<f2")[..., None].view(np.uint8), elements], -1).tobytes()


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _value(kind: int, value: Value) -> bytes:
    if isinstance(value, list):
        return struct.pack(f"<IQ{len(value)}i", INT, len(value), *value)
    if isinstance(value, str):
        return _string(value)
    return struct.pack("<f" if kind == FLOAT else "<I", value)


def main() -> None:
    """Writes the GGUF file that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="MODEL.onnx", type=Path, help="a model of benchmark_model.py")
    parser.add_argument("output", metavar="OUT.gguf", type=Path)
    parser.add_argument("--products", choices=["q8_0"], help="round products to 8 bits")
    options = parser.parse_args()
    kind = write(options.source, options.output, options.products)
    print(f"{options.output}: products in {kind}")


if __name__ == "__main__":
    main()
