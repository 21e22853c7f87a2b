"""Strategy fused_amx of softmax attention, against float64: real where this CPU has a matrix unit, else emulated."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from attention_runs import CapacityRun, error, to_device
from harness import DRIVERS, FLAGS, HOST, TARGETS
from linattn.dialect_patterns.attention import amx_kernel
from linattn.dialect_patterns.attention import strategies as attention_strategies
from linattn.dialect_patterns.attention.core import AttentionShape, Heads
from linattn.dialect_patterns.node import TensorSpec
from test_attention_simd import attend

from tests.emulated_cpu import AMX, STACK, Tiles
from tests.tolerances import BENIGN

DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
CAPACITY = 200
POSITIONS = (0, 1, 15, 31, 32, 55, 64, 119, CAPACITY)
UNIT = replace(HOST, vector_bits=512, features=HOST.features | AMX)


@pytest.fixture(params=["here", "emulated"])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    real = request.param == "here"
    if real and not HOST.features >= AMX:
        pytest.skip(f"emulated only: this CPU lacks {', '.join(sorted(AMX - HOST.features))}")
    if not real:
        monkeypatch.setattr(amx_kernel, "AmxTiles", Tiles)
    flags = [*FLAGS["cpu"], STACK]
    for table, value in ((TARGETS, UNIT), (FLAGS, flags), (DRIVERS, "cpu")):
        monkeypatch.setitem(table, "unit", value)
    return "unit"


def rows(array: np.ndarray, kv_heads: int) -> np.ndarray:
    """[T, Hkv * d] as [Hkv, T, d]."""
    return array.astype(np.float64).reshape(len(array), kv_heads, -1).transpose(1, 0, 2)


# 18, 72 and 16 rows of a key head; heads of two and of four words of the unit; the largest head. Types in one term and
# in two.
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "size", "window", "softcap", "smooth", "dtype"),
    [
        (9, 4, 2, 64, None, 0.0, False, "bf16"),
        (18, 8, 2, 32, 40, 3.0, False, "bf16"),
        (16, 2, 2, 128, None, 0.0, True, "bf16"),
        (4, 4, 1, 256, 33, 0.0, False, "bf16"),
        (18, 8, 2, 32, 40, 3.0, False, "f16"),
        (4, 4, 1, 256, None, 0.0, False, "f16"),
        (9, 4, 2, 64, 33, 0.0, False, "f32"),
    ],
)
def test_positions(
    tokens: int,
    heads: int,
    kv_heads: int,
    size: int,
    window: int | None,
    softcap: float,
    smooth: bool,
    dtype: str,
    target: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What lies behind the position is NaN and is neither read nor weighed; a NaN that is seen spoils who sees it."""
    random, scale, kind = np.random.default_rng(tokens + heads), 0.3, DTYPES[dtype]
    limit = BENIGN[np.dtype(kind).name]
    monkeypatch.setitem(TARGETS, target, replace(UNIT, fast_math=dtype == "f32"))
    specs = [TensorSpec((1, tokens, heads * size), dtype), *[TensorSpec((1, kv_heads, CAPACITY, size), dtype)] * 2]

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(kind)

    cache = [normal(1, kv_heads, CAPACITY, size) for _ in range(2)]
    lengths, total = np.zeros(1, np.int32), np.array(CAPACITY + tokens, np.int32)
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": scale, "softcap": softcap}
    if smooth:
        attributes["smooth_softmax"] = 1
    if window is not None:
        attributes["local_window_size"] = window
    new = [normal(1, tokens, heads * size), *(normal(1, tokens, kv_heads * size) for _ in range(2))]
    inputs = [*new, *cache, lengths, total]
    run = CapacityRun("GroupQueryAttention", "com.microsoft", 1, inputs, specs, attributes, (3, 4), target)
    for position in (min(position, CAPACITY - tokens) for position in POSITIONS):
        past = [array.copy() for array in cache]
        for array in past:
            array[:, :, position:] = np.nan
        got = run.step([*new, None, None, lengths, total], [to_device(array, target) for array in past], position)
        q = new[0][0].astype(np.float64).reshape(tokens, heads, size)
        held = [array[0, :, :position].astype(np.float64) for array in past]
        keys, values = (np.concatenate([a, rows(x[0], kv_heads)], 1) for a, x in zip(held, new[1:], strict=True))
        if smooth:  # a key more, of score 0 and value 0, before all others
            keys, values = (np.concatenate([np.zeros_like(x[:, :1]), x], 1) for x in (keys, values))
        want = attend(q, keys, values, position + smooth, window, softcap, scale).reshape(tokens, -1)
        assert error(got[0], want) <= limit, f"position {position}"
    spoilt, at = [array.copy() for array in new], tokens - 2
    spoilt[2][0, at, 0] = np.nan  # the first column of the first head's value
    again = run.step([*spoilt, None, None, lengths, total], [to_device(array, target) for array in past], position)
    group, first = heads // kv_heads, again[0].reshape(tokens, heads, size)
    assert np.isnan(first[at:, :group, 0].astype(np.float32)).all()
    clean = got[0].reshape(tokens, heads, size)
    for found, wanted in ((first[:at], clean[:at]), (first[:, group:], clean[:, group:])):
        assert error(found, wanted) <= limit
    np.testing.assert_array_equal(first[at:, :group, 32:], clean[at:, :group, 32:])


SHAPE = AttentionShape(Heads(1, 8, 2, 256, 256), 64, 4096, masked=False, causal=True, dtype="bf16")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"length": 4}, ""),
        ({"length": 3}, "less than 16 rows"),
        ({"dtype": "f16"}, ""),
        ({"dtype": "f32"}, "--math fast"),
        ({"masked": True}, "bias"),
        ({"keys": None}, "open"),
        ({"keys": 20}, "20 keys"),
        ({"heads": Heads(1, 8, 2, 288, 256)}, "heads of 288"),
        ({"heads": Heads(1, 8, 2, 64, 48)}, "heads of 64 and 48"),
    ],
)
def test_choice(change: dict[str, object], reason: str) -> None:
    choice = attention_strategies.choose(replace(SHAPE, **change), "node", UNIT)  # type: ignore[arg-type]
    assert choice.strategy == ("fused_simd" if reason else "fused_amx")
    assert reason in choice.rejected.get("fused_amx", "")
