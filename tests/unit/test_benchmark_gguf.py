"""The benchmarks' model as GGUF: llama.cpp's names and dimensions, and the weights of the ONNX file, read back here."""

from __future__ import annotations

import importlib
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

SAMPLES = Path(__file__).parents[2] / "samples"
HIDDEN, HEADS, MLP, VOCABULARY = 256, 2, 288, 320
WIDTH, TAPS, SOFTMAX = 128 * HEADS, 4, 2 * 256 * 2 + 2 * 2 * 256
DTYPES = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 30: np.dtype(ml_dtypes.bfloat16)}
FORMATS = {4: "<I", 6: "<f"}

# What llama.cpp's qwen35 asks for, as it writes it: the innermost dimension first (src/models/qwen35.cpp of 0c1e57098).
DELTA = {
    "attn_qkv.weight": (HIDDEN, 3 * WIDTH),
    "attn_gate.weight": (HIDDEN, WIDTH),
    "ssm_conv1d.weight": (TAPS, 3 * WIDTH),
    "ssm_dt.bias": (HEADS,),
    "ssm_a": (HEADS,),
    "ssm_beta.weight": (HIDDEN, HEADS),
    "ssm_alpha.weight": (HIDDEN, HEADS),
    "ssm_norm.weight": (128,),
    "ssm_out.weight": (WIDTH, HIDDEN),
}
ATTENTION = {
    "attn_qkv.weight": (HIDDEN, SOFTMAX),
    "attn_output.weight": (2 * 256, HIDDEN),
    "attn_q_norm.weight": (256,),
    "attn_k_norm.weight": (256,),
}
EVERY = {
    "attn_norm.weight": (HIDDEN,),
    "post_attention_norm.weight": (HIDDEN,),
    "ffn_gate.weight": (HIDDEN, MLP),
    "ffn_up.weight": (HIDDEN, MLP),
    "ffn_down.weight": (MLP, HIDDEN),
}


class Reader:
    """The file's keys, and its tensors as type, dimensions and bytes from there on."""

    def __init__(self, path: Path) -> None:
        self._data, self._at = path.read_bytes(), 0
        magic, version, tensors, keys = self._take("<4sIQQ")
        assert (magic, version) == (b"GGUF", 3)
        self.keys = {self._text(): self._value(self._take("<I")[0]) for _ in range(keys)}
        found: dict[str, Any] = {}
        for _ in range(tensors):
            name, (count,) = self._text(), self._take("<I")
            found[name] = self._take(f"<{count}Q"), *self._take("<IQ")
        start = self._at + -self._at % 32
        assert all(offset % 32 == 0 for _, _, offset in found.values())
        self.tensors = {n: (kind, dims, self._data[start + offset :]) for n, (dims, kind, offset) in found.items()}

    def _take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return values

    def _text(self) -> str:
        (size,) = self._take("<Q")
        self._at += size
        return self._data[self._at - size : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind == 8:
            return self._text()
        if kind == 9:
            of, count = self._take("<IQ")
            assert of == 5
            return self._take(f"<{count}i")
        return self._take(FORMATS[kind])[0]

    def array(self, name: str) -> np.ndarray:
        """The tensor's values as a matrix, the innermost dimension last."""
        kind, dims, data = self.tensors[name]
        count = int(np.prod(dims))
        if kind in DTYPES:
            return np.frombuffer(data, DTYPES[kind], count).reshape(dims[::-1])
        size = {2: 18, 8: 34}[kind]
        blocks = np.frombuffer(data, np.uint8, count // 32 * size).reshape(-1, size)
        scales, rest = blocks[:, :2].copy().view("<f2").astype(np.float32), blocks[:, 2:]
        # q4_0: 16 low halves, then their high ones; q8_0: 32 numbers with a sign.
        numbers = np.concatenate([rest & 15, rest >> 4], 1) - 8.0 if kind == 2 else rest.view(np.int8)
        return (numbers * scales).reshape(dims[::-1])


@pytest.fixture
def gguf(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SAMPLES)
    return importlib.import_module("benchmark_gguf")


def written(gguf: ModuleType, folder: Path, dtype: str, products: str | None = None) -> tuple[Reader, dict[str, Any]]:
    model = importlib.import_module("benchmark_model")
    shape = model.Shape(hidden=HIDDEN, heads=HEADS, mlp=MLP, vocabulary=VOCABULARY, dtype=dtype)
    model.write(shape, folder / "model.onnx")
    gguf.write(folder / "model.onnx", folder / "model.gguf", products)
    weights = onnx.load(folder / "model.onnx").graph.initializer
    return Reader(folder / "model.gguf"), {tensor.name: numpy_helper.to_array(tensor) for tensor in weights}


def test_names_dimensions_and_keys(gguf: ModuleType, tmp_path: Path) -> None:
    file, _ = written(gguf, tmp_path, "fp16")
    wanted: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (HIDDEN, VOCABULARY),
        "output.weight": (HIDDEN, VOCABULARY),
    }
    wanted["output_norm.weight"] = (HIDDEN,)
    for layer in range(4):
        own = EVERY | (ATTENTION if layer == 3 else DELTA)
        wanted |= {f"blk.{layer}.{name}": dims for name, dims in own.items()}
    assert {name: dims for name, (_, dims, _) in file.tensors.items()} == wanted
    sizes = {"ssm.inner_size": WIDTH, "ssm.time_step_rank": HEADS, "ssm.state_size": 128, "ssm.conv_kernel": TAPS}
    sizes |= {"attention.head_count": 2, "attention.head_count_kv": 2, "attention.key_length": 256}
    sizes |= {"feed_forward_length": MLP, "vocab_size": VOCABULARY, "block_count": 4, "embedding_length": HIDDEN}
    assert {name: file.keys[f"qwen35.{name}"] for name in sizes} == sizes
    assert file.keys["qwen35.rope.dimension_sections"] == (11, 11, 10, 0)
    assert (file.keys["general.architecture"], file.keys["tokenizer.ggml.model"]) == ("qwen35", "none")


@pytest.mark.parametrize(("dtype", "kind", "mostly"), [("fp32", 0, 0), ("fp16", 1, 1), ("bf16", 30, 32)])
def test_weights_keep_their_type(dtype: str, kind: int, mostly: int, gguf: ModuleType, tmp_path: Path) -> None:
    """Products too narrow for blocks, taps and norms as well; what is no product is in f32, but for the embeddings."""
    file, weights = written(gguf, tmp_path, dtype)
    assert file.keys["general.file_type"] == mostly
    for layer, part, name in ((0, "linear_attn.qkv_proj", "attn_qkv"), (3, "attn.o_proj", "attn_output")):
        assert file.tensors[f"blk.{layer}.{name}.weight"][0] == kind
        product = weights[f"model.layers.{layer}.{part}.MatMul.weight"]
        assert np.array_equal(file.array(f"blk.{layer}.{name}.weight"), product.T)
    assert np.array_equal(file.array("token_embd.weight"), weights["model.embed_tokens.weight"])
    taps = weights["model.layers.1.linear_attn.conv1d.weight"][:, 0].astype(np.float32)
    assert np.array_equal(file.array("blk.1.ssm_conv1d.weight"), taps)
    kept = {"token_embd.weight", "output.weight"}
    assert {k for n, (k, dims, _) in file.tensors.items() if len(dims) == 1 or "conv1d" in n} == {0}
    assert {file.tensors[name][0] for name in kept} == {kind}


def test_four_bits_are_the_same_integers(gguf: ModuleType, tmp_path: Path) -> None:
    file, weights = written(gguf, tmp_path, "int4")
    assert file.keys["general.file_type"] == 2
    for name, at in (("output.weight", "lm_head"), ("blk.2.ffn_down.weight", "model.layers.2.mlp.down_proj")):
        packed, scales = (weights[f"{at}.MatMul.weight_{part}"] for part in ("Q4", "scales"))
        numbers = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], 32) - 8.0
        wanted = numbers * scales.astype(np.float16).astype(np.float32)[..., None]
        assert file.tensors[name][0] == 2
        assert np.array_equal(file.array(name), wanted.reshape(packed.shape[0], -1))
    assert file.tensors["blk.0.ssm_beta.weight"][0] == 0


def test_eight_bits_round_to_the_nearest(gguf: ModuleType, tmp_path: Path) -> None:
    file, weights = written(gguf, tmp_path, "fp32", "q8_0")
    product = weights["model.layers.0.mlp.gate_proj.MatMul.weight"].T
    found = file.array("blk.0.ffn_gate.weight")
    steps = np.abs(product).reshape(product.shape[0], -1, 32).max(-1) / 127
    # Half a step, and what f16 takes from the scale of the largest.
    allowed = np.repeat(steps, 32, 1) * (0.5 + 127 * 2.0**-11)
    assert (np.abs(found - product) <= allowed).all()
    assert file.keys["general.file_type"] == 7
