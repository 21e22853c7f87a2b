"""GatedRMSNorm against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from comparing import DTYPES, MICROSOFT, assert_matches, normal
from harness import lowered, node_for, spec
from linattn.dialect_patterns.norms import gated_rms_norm
from linattn.runtime.errors import UnsupportedModelError


def operands(dtype: Any = np.float32) -> list[np.ndarray]:
    gate = 8 * normal(2, 3, 4 * 32 + 1)[..., :-1]
    return [normal(2, 3, 4 * 32, dtype=dtype), normal(32, dtype=dtype), gate.astype(dtype)]


def check(inputs: list[np.ndarray], attributes: dict[str, Any] | None = None, **run: Any) -> None:
    assert_matches("GatedRMSNorm", inputs, attributes, domain=MICROSOFT, version=1, **run)


@pytest.mark.parametrize("activation", ["swish", "sigmoid"])
def test_activations(activation: str):
    check(operands(), {"activation": activation, "epsilon": 1e-6})


@pytest.mark.parametrize("target", ["cpu512", pytest.param("lavapipe", marks=pytest.mark.vulkan)])
def test_epsilon(target: str):
    """Heads as small as its root, where it is half of what is divided by, and one of zeros, which stays zeros."""
    inputs = operands()
    inputs[0] *= 1e-3
    inputs[0][0, 0, :32] = 0.0
    check(inputs, {"epsilon": 1e-6}, target=target)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_with_open_tokens(dtype: Any):
    check(operands(dtype), open_axes={0: (0, 1), 2: (0, 1)})


def test_open_heads():
    check(operands(), open_axes={0: (0, 1, 2), 2: (0, 1, 2)})


@pytest.mark.parametrize(
    ("tokens", "heads", "size", "dtype", "target", "activation"),
    [
        (9, 3, 128, np.float32, "cpu512", "silu"),
        (1, 1, 128, np.float16, "cpu512", "sigmoid"),
        (70, 2, 256, ml_dtypes.bfloat16, "cpu256", "silu"),  # of three workgroups
        (3, 5, 20, np.float32, "cpu128", "sigmoid"),
    ],
)
def test_one_kernel_on_a_cpu(tokens: int, heads: int, size: int, dtype: Any, target: str, activation: str):
    width = heads * size
    gate = (8 * normal(1, tokens, width + 1)[..., :-1]).astype(dtype)
    inputs = [normal(1, tokens, width, dtype=dtype), normal(size, dtype=dtype), gate]
    found = str(lowered(MICROSOFT, "GatedRMSNorm", 1, [spec(a) for a in inputs], {}, 1, target))
    assert "rms_fused_simd" in found
    assert "linalg" not in found
    check(inputs, {"activation": activation, "epsilon": 1e-6}, target=target)


@pytest.mark.vulkan
def test_vulkan():
    check(operands(), target="vulkan")


def test_invalid():
    x, scale, gate = (spec(array) for array in operands())
    wrong = node_for(MICROSOFT, "GatedRMSNorm", 1, [x, scale, gate], {"activation": "relu"}, 1)
    with pytest.raises(UnsupportedModelError, match="attribute 'activation', got 'relu', expected silu or swish"):
        gated_rms_norm.parse(wrong)
    wrong = node_for(MICROSOFT, "GatedRMSNorm", 1, [x, spec(normal(30)), gate], {}, 1)
    with pytest.raises(UnsupportedModelError, match="got 128, expected a multiple of 30"):
        gated_rms_norm.parse(wrong)
