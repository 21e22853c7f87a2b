"""MRotaryEmbedding against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from comparing import DTYPES, MICROSOFT, assert_matches, normal
from harness import node_for, spec
from linattn.dialect_patterns.rotary import m_rotary_embedding
from linattn.runtime.errors import UnsupportedModelError

B, T, H, D, POSITIONS = 2, 5, 4, 32, 48
PACKED, HEADS = (B, T, H * D), (B, H, T, D)
IDS = np.random.default_rng(0).integers(0, POSITIONS, (3, B, T))
QWEN = {"num_heads": H, "rotary_embedding_dim": 16, "mrope_section": [3, 3, 2], "mrope_layout": 1}
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "as Qwen3.5": (PACKED, QWEN),
    "sections in runs": (PACKED, QWEN | {"mrope_layout": 0}),
    "interleaved pairs": (PACKED, QWEN | {"interleaved": 1}),
    "whole heads": (PACKED, {"num_heads": H, "mrope_section": [8, 5, 3], "mrope_layout": 1}),
    "heads first": (HEADS, {"mrope_section": [6, 5, 5], "mrope_layout": 1}),
    "scaled": (PACKED, QWEN | {"scale": 1.5}),
}


def operands(shape: tuple[int, ...], attributes: dict[str, Any], dtype: Any = np.float32) -> list[np.ndarray]:
    phase = 3 * normal(POSITIONS, sum(attributes["mrope_section"]))
    return [normal(*shape, dtype=dtype), IDS, np.cos(phase).astype(dtype), np.sin(phase).astype(dtype)]


def check(shape: tuple[int, ...], attributes: dict[str, Any], dtype: Any = np.float32, **run: Any) -> None:
    inputs = operands(shape, attributes, dtype)
    assert_matches("MRotaryEmbedding", inputs, attributes, domain=MICROSOFT, version=1, **run)


@pytest.mark.parametrize("case", CASES)
def test_layouts(case: str):
    check(*CASES[case])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_with_open_tokens(dtype: Any):
    check(PACKED, QWEN, dtype, open_axes={0: (0, 1), 1: (1, 2)})


@pytest.mark.vulkan
def test_vulkan():
    check(PACKED, QWEN, target="vulkan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mrope_section": [3, 3, 3]}, r"attribute 'mrope_section', got \[3, 3, 3\], expected three counts with sum 8"),
        ({"mrope_layout": 2}, "attribute 'mrope_layout', got 2, expected 0 or 1"),
        ({"is_packed_batching": 1}, "attribute 'is_packed_batching', got 1, expected 0"),
    ],
)
def test_invalid(change: dict[str, Any], message: str):
    inputs = [spec(array) for array in operands(PACKED, QWEN)]
    with pytest.raises(UnsupportedModelError, match=message):
        m_rotary_embedding.parse(node_for(MICROSOFT, "MRotaryEmbedding", 1, inputs, QWEN | change, 1))
