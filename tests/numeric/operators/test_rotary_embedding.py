"""RotaryEmbedding of both domains against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from comparing import DTYPES, MICROSOFT, assert_matches, normal
from harness import node_for, spec
from linattn.dialect_patterns.rotary import rotary_embedding
from linattn.runtime.errors import UnsupportedModelError

B, T, H, D, POSITIONS = 2, 5, 4, 16, 32
PACKED, HEADS = (B, T, H * D), (B, H, T, D)
IDS = np.random.default_rng(0).integers(0, POSITIONS, (B, T))


def angles(rotated: int, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    phase = 3 * normal(POSITIONS, rotated // 2)
    return np.cos(phase).astype(dtype), np.sin(phase).astype(dtype)


def onnx_operands(shape: tuple[int, ...], rotated: int, ids: bool, dtype: Any = np.float32) -> list[np.ndarray]:
    cos, sin = angles(rotated, dtype)
    x = normal(*shape, dtype=dtype)
    return [x, cos, sin, IDS] if ids else [x, cos[IDS], sin[IDS]]


def onnx_axes(shape: tuple[int, ...], ids: bool) -> dict[int, tuple[int, ...]]:
    tokens = (0, 1) if len(shape) == 3 else (0, 2)
    return {0: tokens, 3: (0, 1)} if ids else {0: tokens, 1: (0, 1), 2: (0, 1)}


@pytest.mark.parametrize(
    ("interleaved", "rotated", "shape", "ids"),
    [
        (0, D, PACKED, False),
        (0, 6, PACKED, False),
        (0, 6, HEADS, True),
        (1, D, HEADS, False),
        (1, 6, PACKED, True),
        (1, 6, HEADS, False),
    ],
)
def test_onnx(interleaved: int, rotated: int, shape: tuple[int, ...], ids: bool):
    # ONNX Runtime wants num_heads wherever rotary_embedding_dim is given
    attributes = {"interleaved": interleaved, "num_heads": H, "rotary_embedding_dim": 0 if rotated == D else rotated}
    axes = onnx_axes(shape, ids) if interleaved else None
    assert_matches("RotaryEmbedding", onnx_operands(shape, rotated, ids), attributes, version=23, open_axes=axes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_onnx_dtypes(dtype: Any):
    attributes = {"num_heads": H, "rotary_embedding_dim": 6}
    inputs = onnx_operands(PACKED, 6, True, dtype)
    assert_matches("RotaryEmbedding", inputs, attributes, version=23, open_axes=onnx_axes(PACKED, True))


def test_onnx_open_heads():
    inputs = onnx_operands(PACKED, 6, False)
    attributes = {"num_heads": H, "rotary_embedding_dim": 6}
    assert_matches("RotaryEmbedding", inputs, attributes, version=23, open_axes={0: (0, 1, 2), 1: (0, 1), 2: (0, 1)})


@pytest.mark.parametrize(
    ("shape", "rotated", "ids"),
    [(PACKED, D, IDS), (PACKED, 6, np.array([7])), (HEADS, D, np.array([7]))],
    ids=["whole heads", "part of the heads", "heads first"],
)
def test_microsoft(shape: tuple[int, ...], rotated: int, ids: np.ndarray):
    attributes = {"num_heads": H, "rotary_embedding_dim": rotated} if rotated != D else {}
    inputs = [normal(*shape), ids, *angles(rotated)]
    assert_matches("RotaryEmbedding", inputs, attributes, domain=MICROSOFT, version=1)


def test_microsoft_interleaved_with_open_tokens():
    inputs = [normal(*PACKED), IDS, *angles(D)]
    axes = {0: (0, 1), 1: (0, 1)}
    assert_matches("RotaryEmbedding", inputs, {"interleaved": 1}, domain=MICROSOFT, version=1, open_axes=axes)


@pytest.mark.vulkan
@pytest.mark.parametrize("ids", [False, True])
def test_vulkan(ids: bool):
    attributes = {"num_heads": H, "rotary_embedding_dim": 6}
    assert_matches("RotaryEmbedding", onnx_operands(PACKED, 6, ids), attributes, version=23, target="vulkan")


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "attribute 'num_heads' is missing; a three-dimensional 'X' needs it"),
        ({"num_heads": 3}, "got 64, expected a multiple of 3"),
        ({"num_heads": H, "rotary_embedding_dim": 8}, "last dimension of the cosine input, got 3, expected 4"),
        ({"num_heads": H, "rotary_embedding_dim": 18}, "attribute 'rotary_embedding_dim', got 18"),
        ({"num_heads": H, "rotary_embedding_dim": 6, "scale": 2.0}, "unknown attribute 'scale'"),
    ],
)
def test_invalid_onnx(attributes: dict[str, Any], message: str):
    inputs = [spec(array) for array in onnx_operands(PACKED, 6, True)]
    with pytest.raises(UnsupportedModelError, match=message):
        rotary_embedding.parse_onnx(node_for("", "RotaryEmbedding", 23, inputs, attributes, 1))


@pytest.mark.parametrize("attributes", [{"is_packed_batching": 1}, {"scale": 2.0}])
def test_invalid_microsoft(attributes: dict[str, Any]):
    inputs = [spec(array) for array in (normal(*PACKED), IDS, *angles(D))]
    with pytest.raises(UnsupportedModelError, match=f"attribute '{next(iter(attributes))}'"):
        rotary_embedding.parse_microsoft(node_for(MICROSOFT, "RotaryEmbedding", 1, inputs, attributes, 1))
