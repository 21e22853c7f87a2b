"""LinearAttention with the convolution before it in one kernel, against the same in float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from harness import run_op
from linattn.dialect_patterns.linear_attention.reference import reference
from tolerances import check, error

F16, F32, BF16 = np.float16, np.float32, ml_dtypes.bfloat16


def unit(rows: np.ndarray, size: int) -> np.ndarray:
    heads = rows.reshape(*rows.shape[:-1], -1, size)
    return (heads / np.linalg.norm(heads, axis=-1, keepdims=True)).reshape(rows.shape)


@pytest.mark.vulkan
@pytest.mark.xdist_group("vulkan")
@pytest.mark.parametrize(
    ("heads", "size", "dtype", "batch", "taps", "activation", "bias", "gates"),
    [
        ((2, 2, 2), (128, 128), F16, 1, 4, "silu", True, True),
        ((4, 2, 2), (32, 16), F32, 2, 4, "silu", True, True),  # several queries a state
        ((2, 2, 4), (64, 20), BF16, 1, 3, "none", False, True),  # inverse GQA, columns that do not fill the last tile
        ((2, 1, 2), (16, 8), F32, 2, 2, "silu", False, False),  # a key of two states
    ],
    ids=str,
)
def test_all_in_one(
    heads: tuple[int, int, int], size: tuple[int, int], dtype: Any, batch: int, taps: int, activation: str, bias: bool,
    gates: bool,
) -> None:  # fmt: skip
    (hq, hk, hv), (dk, dv) = heads, size
    widths = hq * dk, hk * dk, hv * dv
    channels, rng = sum(widths), np.random.default_rng(dk)

    def values(*dims: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(dims) * scale).astype(dtype)

    x, past_conv = values(batch, channels, 1), values(batch, channels, taps - 1)
    weight, shift = values(channels, 1, taps, scale=0.5), values(channels) if bias else None
    past, a, b = values(batch, hv, dk, dv), values(batch, 1, hv), values(batch, 1, hv)
    rates = rng.standard_normal(hv).astype(F32), -rng.uniform(0, 2, hv).astype(F32)
    decay, beta = -abs(a.astype(np.float64)), b.astype(np.float64)
    left = [a, b, *rates]
    if gates:
        decay, beta = rates[1] * np.logaddexp(0, a.astype(np.float64) + rates[0]), 1 / (1 + np.exp(-beta))
    else:
        left = [-abs(a), b]
    got = run_op(
        "ConvolvedLinearAttention",
        [x, weight, shift, past_conv, past, *left],
        {"q_num_heads": hq, "kv_num_heads": hv, "key_heads": hk, "query_norm": 1, "key_norm": 1, "scale": 0.7,
         "activation": activation},
        domain="linattn",
        version=1,
        num_outputs=3,
        target="lavapipe",
    )  # fmt: skip
    padded = np.concatenate([past_conv, x], -1).astype(np.float64)
    mixed = (padded * weight[:, 0].astype(np.float64)).sum(-1) + (0 if shift is None else shift.astype(np.float64))
    mixed = mixed / (1 + np.exp(-mixed)) if activation == "silu" else mixed
    query, key, value = np.split(mixed[:, None], np.cumsum(widths)[:2], -1)
    want = reference(
        unit(query, dk), unit(key, dk), value, past, decay, beta, q_num_heads=hq, kv_num_heads=hv, scale=0.7
    )
    check(got[:2], want)
    assert error(got[2], padded[..., 1:]) == 0
