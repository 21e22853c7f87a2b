"""Strategy fused_simd of softmax attention over a cache of fixed capacity, at the edges of its passes of 64 keys."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from attention_runs import CAPACITY, CapacityRun, attend, error, to_device
from harness import WIDTHS
from linattn.dialect_patterns.attention import strategies as attention_strategies
from linattn.dialect_patterns.attention.core import AttentionShape, Heads
from linattn.dialect_patterns.node import TensorSpec
from linattn.dialect_patterns.target import Target

from tests.tolerances import BENIGN as TOLERANCE

POSITIONS = (0, 1, 54, 55, 56, 62, 63, 64, 65, 119, 120, 127, 128, 191)
NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "size", "window", "softcap", "dtype", "target"),
    [
        (1, 6, 2, 20, None, 0.0, np.float32, "cpu"),
        (1, 2, 2, 64, 70, 0.0, np.float32, "cpu"),
        (9, 6, 2, 64, None, 0.0, np.float32, "cpu"),
        (5, 8, 1, 32, 66, 3.0, np.float32, "cpu"),
        (9, 4, 2, 64, None, 0.0, np.float16, "cpu"),
        (2, 12, 1, 64, None, 0.0, ml_dtypes.bfloat16, "cpu"),
        *((3, 4, 2, 24, 70, 3.0, np.float32, width) for width in WIDTHS),
        *((9, 3, 1, 80, None, 0.0, np.float32, width) for width in WIDTHS),
    ],
)
def test_positions(
    tokens: int, heads: int, kv_heads: int, size: int, window: int | None, softcap: float, dtype: type, target: str
) -> None:
    """What lies behind the position is NaN and is neither read nor weighed."""
    random, batch, scale = np.random.default_rng(tokens + heads), 2, 0.3
    name = np.dtype(dtype).name
    specs = [TensorSpec((batch, tokens, heads * size), NAMES[name])]
    specs += [TensorSpec((batch, kv_heads, CAPACITY, size), NAMES[name])] * 2

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(dtype)

    cache = [normal(batch, kv_heads, CAPACITY, size) for _ in range(2)]
    lengths, total = np.zeros(batch, np.int32), np.array(CAPACITY + tokens, np.int32)
    new = [normal(batch, tokens, heads * size), *(normal(batch, tokens, kv_heads * size) for _ in range(2))]
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": scale, "softcap": softcap}
    if window is not None:
        attributes["local_window_size"] = window
    run = CapacityRun(
        "GroupQueryAttention", "com.microsoft", 1, [*new, *cache, lengths, total], specs, attributes, (3, 4), target
    )
    for position in POSITIONS:
        caches = []
        for past in cache:
            poisoned = past.copy()
            poisoned[:, :, position:] = np.nan
            caches.append(to_device(poisoned, target))
        new = [normal(*array.shape) for array in new]
        got = run.step([*new, None, None, lengths, total], caches, position)
        for b in range(batch):
            q = new[0][b].astype(np.float64).reshape(tokens, heads, size)
            rows = [x[b].astype(np.float64).reshape(tokens, kv_heads, size).transpose(1, 0, 2) for x in new[1:]]
            past = [c[b, :, :position].astype(np.float64) for c in cache]
            keys, values = (np.concatenate(pair, 1) for pair in zip(past, rows, strict=True))
            want = attend(q, keys, values, position, window, softcap, scale).reshape(tokens, -1)
            assert error(got[b], want) <= TOLERANCE[name], f"position {position}"


@pytest.mark.parametrize(
    ("heads", "tokens", "target", "reason"),
    [
        (Heads(1, 4, 2, 64, 64), None, Target("cpu", vector_bits=256), "open"),
        (Heads(1, 4, 2, 30, 64), 1, Target("cpu", vector_bits=256), "dk=30"),
        (Heads(1, 4, 2, 64, 8000), 1, Target("cpu", vector_bits=256), "does not fit"),
    ],
)
def test_what_the_portable_form_does(heads: Heads, tokens: int | None, target: Target, reason: str) -> None:
    choice = attention_strategies.choose(AttentionShape(heads, tokens, 99, False, True, "f32"), "node", target)
    assert choice.strategy == "linalg"
    assert reason in choice.rejected["fused_simd"]


def test_a_window_reads_the_window() -> None:
    """At position 4000 a step with a window of 128 keys comes near none but the pass of 64 keys where they begin."""
    heads, kv_heads, size, rows, position, window = 16, 4, 128, 4096, 4000, 128
    rng = np.random.default_rng(0)
    new = [rng.standard_normal((1, 1, n * size)).astype(np.float32) for n in (heads, kv_heads, kv_heads)]
    cache = [rng.standard_normal((1, kv_heads, rows, size)).astype(np.float32) for _ in range(2)]
    inputs = [*new, *cache, np.zeros(1, np.int32), np.zeros((), np.int32)]
    specs = [TensorSpec((1, 1, heads * size), "f32"), *[TensorSpec((1, kv_heads, rows, size), "f32")] * 2]
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "local_window_size": window}
    run = CapacityRun("GroupQueryAttention", "com.microsoft", 1, inputs, specs, attributes, (3, 4), "cpu")
    for past in cache:  # 0 times NaN is NaN: whatever reads them cannot hide it
        past[:, :, : position + 1 - window - 64] = np.nan
    y = run.step([*new, None, None, *inputs[5:]], [to_device(a, "cpu") for a in cache], position)
    q, *rest = (a.reshape(1, -1, size) for a in new)
    keys, values = (
        np.concatenate([past[0, :, :position], x.reshape(kv_heads, 1, size)], 1)
        for past, x in zip(cache, rest, strict=True)
    )
    want = attend(q, keys, values, position, window, 0.0, size**-0.5)
    assert error(y.reshape(want.shape), want) < TOLERANCE["float32"]


CACHED = AttentionShape(Heads(1, 4, 2, 64, 64), 1, 99, masked=False, causal=True, dtype="f32")


@pytest.mark.parametrize(
    ("change", "subgroup", "strategy", "reason"),
    [
        ({}, 32, "fused_simt", ""),
        ({}, 0, "fused_simt_tiles", "subgroup"),
        ({"masked": True}, 32, "fused_simt", ""),
        ({"causal": False}, 32, "linalg", "causal"),
        ({"length": 5}, 32, "fused_simt_tiles", "10 queries"),
        ({"keys": None}, 32, "linalg", "open"),
        ({"heads": Heads(1, 4, 2, 66, 64)}, 32, "linalg", "66"),
    ],
)
def test_what_gpus_do(change: dict[str, object], subgroup: int, strategy: str, reason: str) -> None:
    target = Target("cuda", is_gpu=True, subgroup_size=subgroup)
    choice = attention_strategies.choose(replace(CACHED, **change), "node", target)  # type: ignore[arg-type]
    assert choice.strategy == strategy
    assert reason in choice.rejected.get("fused_simt", "")


@pytest.mark.parametrize(("dtype", "strategy"), [("f32", "fused_simt_tiles"), ("f16", "linalg")])
def test_prompts_where_there_are_matrix_units(dtype: str, strategy: str) -> None:
    target = Target("cuda", is_gpu=True, subgroup_size=32, matrix_units=True)
    choice = attention_strategies.choose(replace(CACHED, length=64, dtype=dtype), "node", target)
    assert choice.strategy == strategy
    assert ("matrix units" in choice.rejected.get("fused_simt_tiles", "")) == (strategy == "linalg")
