"""SimplifiedLayerNormalization against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import pytest
from comparing import DTYPES, MICROSOFT, assert_matches, normal
from linattn.dialect_patterns.registry import find_op

ATTRIBUTES = {"axis": -1, "epsilon": 1e-6, "stash_type": 1}


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_with_open_tokens(dtype: Any):
    inputs = [normal(2, 3, 64, dtype=dtype), normal(64, dtype=dtype)]
    run: dict[str, Any] = {"version": 21, "num_outputs": 2, "open_axes": {0: (0, 1)}}
    assert_matches("SimplifiedLayerNormalization", inputs, ATTRIBUTES, **run)


def test_without_inverse_deviation():
    inputs = [normal(2, 3, 64), normal(64)]
    assert_matches("SimplifiedLayerNormalization", inputs, ATTRIBUTES, version=21)


def test_both_domains():
    assert find_op("", "SimplifiedLayerNormalization", 24)
    assert find_op(MICROSOFT, "SimplifiedLayerNormalization", 1)


@pytest.mark.vulkan
def test_vulkan():
    inputs = [normal(1, 5, 64), normal(64)]
    assert_matches("SimplifiedLayerNormalization", inputs, ATTRIBUTES, version=21, target="vulkan", num_outputs=2)
