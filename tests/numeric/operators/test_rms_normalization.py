"""RMSNormalization against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from comparing import DTYPES, assert_matches, normal
from harness import node_for, spec
from linattn.dialect_patterns.norms import rms_normalization
from linattn.runtime.errors import UnsupportedModelError

CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "last": ((2, 3, 64), (64,), {"axis": -1, "epsilon": 1e-6, "stash_type": 1}),
    "two axes": ((2, 3, 4, 16), (4, 16), {"axis": 2}),
    "all axes": ((3, 16), (3, 16), {"axis": 0}),
    "scale of rows": ((2, 5, 16), (5, 1), {"axis": 1}),
    "one dimension": ((33,), (33,), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_shapes(case: str):
    shape, scale, attributes = CASES[case]
    assert_matches("RMSNormalization", [normal(*shape), normal(*scale)], attributes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_with_open_tokens(dtype: Any):
    # 300 squared overflows float16: sums must be float32
    inputs = [300 * normal(2, 3, 64).astype(dtype), normal(64, dtype=dtype)]
    assert_matches("RMSNormalization", inputs, open_axes={0: (0, 1)})


def test_open_normalised_dimension():
    assert_matches("RMSNormalization", [normal(2, 3, 48), normal(48)], open_axes={0: (0, 1, 2)})


@pytest.mark.vulkan
def test_vulkan():
    assert_matches("RMSNormalization", [normal(2, 3, 64), normal(64)], target="vulkan", open_axes={0: (0, 1)})


@pytest.mark.parametrize(
    ("attributes", "scale", "message"),
    [
        ({"axis": 3}, normal(8), "attribute 'axis', got 3, expected -3 to 2"),
        ({"stash_type": 10}, normal(8), "attribute 'stash_type', got 10"),
        ({"gain": 1}, normal(8), "unknown attribute 'gain'"),
        ({}, normal(7), "input 'scale' does not broadcast to 'X', got 7xf32"),
        ({}, np.ones(8, np.int64), "input 'scale' has an unsupported type, got i64"),
    ],
)
def test_invalid(attributes: dict[str, Any], scale: np.ndarray, message: str):
    inputs = [spec(normal(2, 3, 8)), spec(scale)]
    with pytest.raises(UnsupportedModelError, match=message):
        rms_normalization.parse(node_for("", "RMSNormalization", 23, inputs, attributes, 1))
