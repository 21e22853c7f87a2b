"""LpNormalization against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from comparing import DTYPES, assert_matches, normal
from harness import node_for, spec
from linattn.dialect_patterns.norms import lp_normalization
from linattn.runtime.errors import UnsupportedModelError


def operand(dtype: Any = np.float32) -> np.ndarray:
    x = 300 * normal(2, 5, 4, 16)  # squares overflow float16
    x[1, 2] = 0.0
    return x.astype(dtype)


def check(x: np.ndarray, attributes: dict[str, Any], **run: Any) -> None:
    assert_matches("LpNormalization", [x], attributes, version=22, **run)


@pytest.mark.parametrize(("p", "axis"), [(1, -1), (2, 1)])
def test_norms(p: int, axis: int):
    check(operand(), {"axis": axis, "p": p})


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_with_open_tokens(dtype: Any):
    check(operand(dtype), {"axis": -1, "p": 2}, open_axes={0: (0, 1)})


@pytest.mark.vulkan
def test_vulkan():
    check(operand(), {"axis": -1, "p": 2}, target="vulkan", open_axes={0: (0, 1)})


def test_invalid():
    with pytest.raises(UnsupportedModelError, match="attribute 'p', got 3, expected 1 or 2"):
        lp_normalization.parse(node_for("", "LpNormalization", 22, [spec(normal(2, 3))], {"p": 3}, 1))
