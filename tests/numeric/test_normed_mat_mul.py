"""An RMS norm and the products of it in one kernel on a Vulkan device with subgroup operations, against float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from harness import run_op
from tolerances import BENIGN, error

F16, BF16 = np.float16, ml_dtypes.bfloat16


@pytest.mark.vulkan
@pytest.mark.xdist_group("vulkan")
@pytest.mark.parametrize(
    ("dtype", "depth", "columns", "gated", "skip", "total"),
    [
        (np.float32, 64, (36, 4, 132), False, True, True),  # columns that do not fill the last tile
        (F16, 256, (1100, 16), False, True, True),
        (F16, 256, (2100, 2100), True, True, True),
        (BF16, 128, (20,), False, True, False),
        (np.float32, 448, (64,), False, False, False),  # seven groups a thread
        (F16, 192, (40, 40), True, False, False),
    ],
    ids=str,
)
def test_norm_and_products(
    dtype: Any, depth: int, columns: tuple[int, ...], gated: bool, skip: bool, total: bool
) -> None:
    rng = np.random.default_rng(depth)
    x, more = ((rng.standard_normal((1, 1, depth)) * 3).astype(dtype) for _ in range(2))
    gamma = rng.uniform(0.5, 2, depth).astype(dtype)
    weights = [(rng.standard_normal((depth, count)) * 0.3).astype(dtype) for count in columns]
    attributes = {"epsilon": 0.25, "gated": int(gated), "with_skip": int(skip), "with_sum": int(total)}
    count = (1 if gated else len(columns)) + total
    inputs = [x, gamma, *([more] if skip else []), *weights]
    what = {"domain": "linattn", "version": 1, "num_outputs": count, "target": "lavapipe"}
    got = run_op("NormedMatMul", inputs, attributes, **what)
    added = x.astype(np.float64) + (more.astype(np.float64) if skip else 0)
    norm = added / np.sqrt(np.mean(added**2) + 0.25) * gamma.astype(np.float64)
    want = [norm @ weight.astype(np.float64) for weight in weights]
    if gated:
        want = [want[0] / (1 + np.exp(-want[0])) * want[1]]
    for y, right in zip(got, [*want, *([added] if total else [])], strict=True):
        assert y.dtype == dtype
        assert error(y, right) <= BENIGN[np.dtype(dtype).name]


@pytest.mark.vulkan
@pytest.mark.xdist_group("vulkan")
@pytest.mark.parametrize(
    ("dtype", "heads", "size", "columns", "silu"),
    [
        (F16, 4, 128, 36, True),  # a head of more vectors than a subgroup has threads
        (np.float32, 3, 64, 40, False),
        (BF16, 16, 8, 20, True),  # two vectors a head
    ],
    ids=str,
)
def test_gated_norm_by_heads_and_a_product(dtype: Any, heads: int, size: int, columns: int, silu: bool) -> None:
    rng = np.random.default_rng(size)
    x, gate = ((rng.standard_normal((1, 1, heads * size)) * 3).astype(dtype) for _ in range(2))
    gate[0, 0, :2] = -100, 100
    scale, weight = (
        rng.uniform(0.5, 2, size).astype(dtype),
        (rng.standard_normal((heads * size, columns))).astype(dtype),
    )
    attributes = {"epsilon": 0.25, "multiplies_gate": int(silu)}
    what = {"domain": "linattn", "version": 1, "target": "lavapipe"}
    (got,) = run_op("HeadNormedMatMul", [x, scale, gate, weight], attributes, **what)
    apart, z = x.astype(np.float64).reshape(heads, size), gate.astype(np.float64).ravel()
    norm = apart / np.sqrt(np.mean(apart**2, -1, keepdims=True) + 0.25) * scale.astype(np.float64)
    opened = (z if silu else 1) * (1 + np.tanh(z / 2)) / 2
    assert got.dtype == dtype
    want = (norm.ravel() * opened) @ weight.astype(np.float64)
    assert error(got[0, 0], want) <= BENIGN[np.dtype(dtype).name]


@pytest.mark.vulkan
@pytest.mark.xdist_group("vulkan")
def test_rows_of_zeros_and_of_what_is_no_number() -> None:
    """The former are zeros; an infinity among others makes NaN, as it does apart."""
    gamma, weight = np.ones(64, np.float32), np.eye(64, dtype=np.float32)
    for value, want in ((0.0, 0.0), (np.inf, np.nan), (np.nan, np.nan)):
        x = np.zeros((1, 1, 64), np.float32)
        x[0, 0, 5] = value
        attributes = {"epsilon": 1e-6, "gated": 0, "with_skip": 0, "with_sum": 0}
        (y,) = run_op("NormedMatMul", [x, gamma, weight], attributes, domain="linattn", version=1, target="lavapipe")
        np.testing.assert_array_equal(y[0, 0, 5], np.float32(want))
