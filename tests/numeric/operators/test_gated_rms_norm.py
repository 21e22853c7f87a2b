"""GatedRMSNorm against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from comparing import DTYPES, MICROSOFT, assert_matches, normal
from harness import node_for, spec
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_with_open_tokens(dtype: Any):
    check(operands(dtype), open_axes={0: (0, 1), 2: (0, 1)})


def test_open_heads():
    check(operands(), open_axes={0: (0, 1, 2), 2: (0, 1, 2)})


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
