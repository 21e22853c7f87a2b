"""Attention of few and of many queries over a cache on a Vulkan device (lavapipe in CI), against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import harness
import matrices
import numpy as np
import pytest
from attention_runs import CapacityRun, error, to_device, to_host
from harness import DTYPES
from linattn.dialect_patterns.attention import fused_mma
from linattn.dialect_patterns.node import TensorSpec
from races import races_in

from tests.tolerances import BENIGN as TOLERANCE

pytestmark = [pytest.mark.vulkan, pytest.mark.xdist_group("vulkan")]
TARGET = "lavapipe"


def attention(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, first: int, left: int | None, softcap: float
) -> np.ndarray:
    """[B, T, Hq*d] from q [B, T, Hq, d] and caches [B, Hkv, M, d], in float64."""
    batch, tokens, heads, size = q.shape
    group, y = heads // keys.shape[1], np.zeros(q.shape)
    for b, t, h in np.ndindex(batch, tokens, heads):
        seen = slice(0 if left is None else max(first + t - left, 0), first + t + 1)
        scores = keys[b, h // group, seen].astype(np.float64) @ q[b, t, h].astype(np.float64) / np.sqrt(size)
        scores = np.tanh(scores / softcap) * softcap if softcap else scores
        weights = np.exp(scores - scores.max())
        y[b, t, h] = weights @ values[b, h // group, seen].astype(np.float64) / weights.sum()
    return y.reshape(batch, tokens, heads * size)


@pytest.mark.parametrize(
    ("kernel", "dtype", "batch", "heads", "tokens", "size", "rows", "attributes", "positions"),
    [
        ("fused_simt_parts", np.float32, 1, (4, 2), 1, 64, 300, {}, (0, 1, 63, 299)),
        ("fused_simt_parts", np.float16, 2, (8, 2), 2, 32, 128, {}, (0, 5, 126)),
        (
            "fused_simt_parts",
            np.float16,
            1,
            (8, 2),
            1,
            256,
            1024,
            {"local_window_size": 17, "softcap": 20.0},
            (0, 5, 900),
        ),
        ("fused_simt_parts", np.float32, 1, (2, 2), 5, 12, 33, {"local_window_size": 3}, (0, 28)),
        ("fused_simt_parts, cold code", np.float32, 1, (4, 2), 2, 32, 300, {"local_window_size": 90}, (0, 1, 63, 298)),
        ("fused_simt_tiles", np.float32, 1, (4, 2), 64, 64, 300, {}, (0, 1, 63, 236)),
        ("fused_simt_tiles", np.float16, 2, (8, 2), 33, 32, 128, {}, (0, 5, 95)),
        (
            "fused_simt_tiles",
            np.float32,
            1,
            (4, 1),
            70,
            256,
            512,
            {"local_window_size": 17, "softcap": 20.0},
            (0, 5, 401),
        ),
        ("fused_simt_tiles", np.float32, 1, (2, 2), 9, 80, 40, {"local_window_size": 3}, (0, 31)),
        ("fused_simt_tiles", np.float32, 1, (4, 1), 8, 32, 1024, {}, (0, 130, 1016)),
        ("fused_simt_tiles", np.float32, 1, (2, 1), 40, 32, 512, {"local_window_size": 200}, (0, 30, 472)),
        ("fused_mma", np.float16, 1, (4, 2), 64, 64, 300, {}, (0, 1, 63, 236)),
        ("fused_mma", np.float16, 2, (4, 2), 33, 32, 128, {"softcap": 20.0}, (0, 5, 95)),
        ("fused_mma", np.float16, 1, (2, 1), 40, 96, 512, {"local_window_size": 200}, (0, 30, 472)),
        ("fused_mma", np.float16, 1, (4, 1), 8, 32, 1024, {}, (0, 130, 1016)),  # parts of the keys
    ],
)
def test_positions(
    kernel: str, dtype: Any, batch: int, heads: tuple[int, int], tokens: int, size: int, rows: int,
    attributes: dict[str, Any], positions: tuple[int, ...], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    kernel, _, code = kernel.partition(", ")
    if code:
        monkeypatch.setitem(harness.TARGETS, TARGET, replace(harness.TARGETS[TARGET], cold_code=True))
    if kernel == "fused_mma":
        monkeypatch.setitem(harness.TARGETS, TARGET, matrices.TARGET)
        matrices.emulate(monkeypatch, fused_mma)
    rng = np.random.default_rng(rows)
    count, kv = heads
    q, k, v = (rng.standard_normal((batch, tokens, h * size)).astype(dtype) for h in (count, kv, kv))
    past = [rng.standard_normal((batch, kv, rows, size)).astype(dtype) for _ in range(2)]
    name = DTYPES[np.dtype(dtype).name]
    outputs = [TensorSpec((batch, tokens, count * size), name)] + [TensorSpec((batch, kv, rows, size), name)] * 2
    inputs = [q, k, v, *past, np.zeros(batch, np.int32), np.zeros((), np.int32)]
    given = {"num_heads": count, "kv_num_heads": kv, **attributes}
    run = CapacityRun("GroupQueryAttention", "com.microsoft", 1, inputs, outputs, given, (3, 4), TARGET)
    assert f"attention_{kernel}" in run.lowered
    assert races_in(run.lowered) == []
    for first in positions:
        caches = [to_device(cache, TARGET) for cache in past]
        inputs[5], inputs[6] = np.full(batch, first + tokens - 1, np.int32), np.array(first + tokens, np.int32)
        got = run.step(inputs, caches, first)
        filled = [cache.copy() for cache in past]
        for cache, new in zip(filled, (k, v), strict=True):
            cache[:, :, first : first + tokens] = new.reshape(batch, tokens, kv, size).transpose(0, 2, 1, 3)
        for cache, want in zip(caches, filled, strict=True):
            assert error(to_host(cache, TARGET, np.dtype(dtype)), want) == 0
        left = attributes["local_window_size"] - 1 if "local_window_size" in attributes else None
        want = attention(q.reshape(batch, tokens, count, size), *filled, first, left, attributes.get("softcap", 0.0))
        assert error(got, want) <= TOLERANCE[np.dtype(dtype).name]
