"""GatedAdd against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from comparing import DTYPES, MICROSOFT, assert_matches, normal
from harness import node_for, spec
from linattn.dialect_patterns.experts import gated_add
from linattn.runtime.errors import UnsupportedModelError


def operands(dtype: Any = np.float32) -> list[np.ndarray]:
    return [normal(2, 3, 40, dtype=dtype), normal(2, 3, 41)[..., :40].astype(dtype), normal(2, 3, 1, dtype=dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_with_open_tokens(dtype: Any):
    open_axes = {i: (0, 1) for i in range(3)}
    assert_matches("GatedAdd", operands(dtype), domain=MICROSOFT, version=1, open_axes=open_axes)


def test_no_projection():
    inputs = [*operands(), normal(1, 1)]
    node = node_for(MICROSOFT, "GatedAdd", 1, [spec(array) for array in inputs], {}, 1)
    with pytest.raises(UnsupportedModelError, match="input 'gate_weight' is not supported"):
        gated_add.parse(node)


@pytest.mark.vulkan
def test_vulkan():
    assert_matches("GatedAdd", operands(), domain=MICROSOFT, version=1, target="vulkan")
