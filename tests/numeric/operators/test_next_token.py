"""NextToken against numpy: ties, zeros of both signs, infinities and NaN of both signs, blocks that do not fill."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from harness import compile_for_cuda, node_for, run_op, spec
from linattn.dialect_patterns import next_token
from linattn.dialect_patterns.node import TensorSpec
from linattn.dialect_patterns.op import INTERNAL
from linattn.runtime.errors import UnsupportedModelError


def rows(vocabulary: int, dtype: Any) -> np.ndarray:
    """A case a row, [rows, 1, V]."""
    rng, last = np.random.default_rng(vocabulary), vocabulary - 1
    found = [rng.standard_normal(vocabulary) * 10 for _ in range(3)]
    found += [rng.integers(-2, 3, vocabulary), rng.integers(-1, 1, vocabulary), -np.abs(found[0]) - 1]
    found += [np.full(vocabulary, value) for value in (0.0, -0.0, -np.inf, np.inf, 3.0, -3.0)]
    for places in ((0,), (last,), (vocabulary // 2, last), (last // 3,), (min(64, last), min(65, last))):
        for value in (20.0, np.inf, 0.0):
            row = -np.abs(rng.standard_normal(vocabulary)) - 1
            row[list(places)] = value
            found.append(row)
    zeros = np.full(vocabulary, -1.0)
    zeros[last // 2], zeros[last] = -0.0, 0.0
    found.append(zeros)
    for nan in (np.nan, -np.nan):
        for place in (0, last // 2, last):
            row = rng.standard_normal(vocabulary)
            row[place], row[last // 3] = nan, np.inf
            found.append(row)
    return np.array(found).astype(dtype)[:, None]


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "target"),
    [
        (1, np.float32, "cpu"),
        (256, np.float16, "cpu"),
        (5003, ml_dtypes.bfloat16, "cpu"),
        (32000, np.float32, "cpu"),
        pytest.param(
            5003, ml_dtypes.bfloat16, "vulkan", marks=pytest.mark.vulkan
        ),  # without subgroups, nor f16 storage
        pytest.param(32000, np.float32, "vulkan", marks=pytest.mark.vulkan),
        pytest.param(256, np.float16, "lavapipe", marks=pytest.mark.vulkan),
        pytest.param(32000, np.float16, "lavapipe", marks=pytest.mark.vulkan),
        pytest.param(1280, np.float32, "lavapipe", marks=pytest.mark.vulkan),
        pytest.param(5003, ml_dtypes.bfloat16, "lavapipe", marks=pytest.mark.vulkan),
    ],
)
def test_as_argmax(vocabulary: int, dtype: Any, target: str) -> None:
    logits = rows(vocabulary, dtype)
    (got,) = run_op(next_token.NEXT_TOKEN, [logits], domain=INTERNAL, version=1, target=target)
    wide = logits.astype(np.float32)
    want = np.where(np.isnan(wide).any(-1), -1, wide.argmax(-1))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("vocabulary", "kernels"), [(32_000, 1), (248_320, 2)])
def test_kernels_on_cuda(vocabulary: int, kernels: int) -> None:
    """IREE's own were five, two of them of a single warp; and its reductions of signed integers chose -1 always."""
    code = compile_for_cuda(INTERNAL, next_token.NEXT_TOKEN, 1, [TensorSpec((1, 1, vocabulary), "f16")])
    assert code.count(b".entry") == kernels
    assert code.count(b"shfl.sync") > 0
    assert code.count(b".maxntid 1024") + code.count(b".reqntid 1024") >= 1


def test_what_cannot_be_chosen_from() -> None:
    node = node_for(INTERNAL, next_token.NEXT_TOKEN, 1, [spec(np.zeros((1, 1, 4), np.int64))], {}, 1)
    with pytest.raises(UnsupportedModelError, match="input 'logits' cannot be chosen from"):
        next_token.parse(node)
