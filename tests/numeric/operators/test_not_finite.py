"""NotFinite against numpy: NaN and infinities of both signs, the largest numbers, all axes that are kept."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from harness import run_op
from linattn.dialect_patterns.not_finite import NOT_FINITE
from linattn.dialect_patterns.op import INTERNAL

SPECIAL = (np.nan, -np.nan, np.inf, -np.inf)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("target", ["cpu", pytest.param("lavapipe", marks=pytest.mark.vulkan)])
def test_counts(dtype: Any, target: str) -> None:
    rng, limit = np.random.default_rng(0), float(ml_dtypes.finfo(dtype).max)
    x = (rng.standard_normal((3, 5, 7, 37)) * 100).astype(dtype)
    x[0, 0, 0, :4] = limit, -limit, 0.0, -0.0
    for number, value in enumerate(SPECIAL * 3):
        x[1 + number % 2, number % 5, number % 7, 3 * number] = value
    for kept in (1, 3):
        (found,) = run_op(NOT_FINITE, [x], {"kept": kept}, domain=INTERNAL, version=1, target=target)
        want = (~np.isfinite(x.astype(np.float32))).sum(axis=tuple(range(kept, 4)))
        np.testing.assert_array_equal(found, want)
        assert want.sum() == len(SPECIAL) * 3
