"""LinearAttention with the norms and gates before it in one kernel, against the same in float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from harness import run_op
from linattn.dialect_patterns.linear_attention.reference import reference
from tolerances import check

F16, BF16 = np.float16, ml_dtypes.bfloat16


def unit(rows: np.ndarray, size: int) -> np.ndarray:
    """Each head divided by its length; of length zero it stays."""
    heads = rows.astype(np.float64).reshape(*rows.shape[:-1], -1, size)
    length = np.linalg.norm(heads, axis=-1, keepdims=True)
    return (heads / np.where(length == 0, 1, length)).reshape(rows.shape)


@pytest.mark.vulkan
@pytest.mark.xdist_group("vulkan")
@pytest.mark.parametrize(
    ("heads", "size", "dtype", "batch", "norms", "gates"),
    [
        ((2, 2, 2), (128, 128), F16, 1, (1, 1), True),
        ((4, 2, 2), (32, 16), np.float32, 2, (1, 1), True),  # several queries a state
        ((2, 2, 4), (64, 20), BF16, 1, (1, 1), True),  # inverse GQA
        ((2, 1, 2), (16, 8), np.float32, 1, (0, 1), True),
        ((1, 1, 1), (6, 5), np.float32, 1, (1, 0), False),
        ((3, 3, 3), (1, 4), np.float32, 1, (1, 1), False),  # signs
        ((2, 2, 2), (8, 8), F16, 1, (0, 0), True),
    ],
    ids=str,
)
def test_norms_and_gates(
    heads: tuple[int, int, int], size: tuple[int, int], dtype: Any, batch: int, norms: tuple[int, int], gates: bool
) -> None:
    (q_heads, k_heads, kv_heads), (dk, dv) = heads, size
    rng = np.random.default_rng(dk)

    def values(*dims: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(dims) * scale).astype(dtype)

    query, key = values(batch, 1, q_heads * dk, scale=3), values(batch, 1, k_heads * dk, scale=0.4)
    query[..., :dk] = 0
    if k_heads > 1:
        key[..., -dk:] = 0
    value, past = values(batch, 1, kv_heads * dv), values(batch, kv_heads, dk, dv)
    a, b = values(batch, 1, kv_heads, scale=6), values(batch, 1, kv_heads, scale=3)
    a[0, 0, 0], b[0, 0, 0] = 80, -90  # far out
    bias, rate = rng.standard_normal(kv_heads).astype(np.float32), -rng.uniform(0, 2, kv_heads).astype(np.float32)
    wide = a.astype(np.float64), b.astype(np.float64)
    decay, beta = (rate * np.logaddexp(0, wide[0] + bias), 1 / (1 + np.exp(-wide[1]))) if gates else (-abs(a), b)
    left = [a, b, bias, rate] if gates else [decay, beta]
    got = run_op(
        "GatedLinearAttention",
        [query, key, value, past, *left],
        {"q_num_heads": q_heads, "kv_num_heads": kv_heads, "query_norm": norms[0], "key_norm": norms[1], "scale": 0.7},
        domain="linattn",
        version=1,
        num_outputs=2,
        target="lavapipe",
    )
    want = reference(
        unit(query, dk) if norms[0] else query,
        unit(key, dk) if norms[1] else key,
        value,
        past,
        decay,
        beta,
        q_num_heads=q_heads,
        kv_num_heads=kv_heads,
        scale=0.7,
    )
    check(got, want)
