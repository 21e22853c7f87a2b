"""Strategy fused_amx of softmax attention, against float64: real where this CPU has a matrix unit, else emulated."""

from __future__ import annotations

from dataclasses import replace

import pytest
from attention_runs import CAPACITY, ManyRows
from harness import DRIVERS, FLAGS, HOST, TARGETS
from linattn.dialect_patterns.attention import amx_kernel
from linattn.dialect_patterns.attention import strategies as attention_strategies
from linattn.dialect_patterns.attention.core import AttentionShape, Heads

from tests.emulated_cpu import AMX, STACK, Tiles

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
    monkeypatch.setitem(TARGETS, target, replace(UNIT, fast_math=dtype == "f32"))
    case = ManyRows(tokens, heads, kv_heads, size, window, softcap, smooth, dtype)
    assert "attention_fused_amx" in case.check(target, POSITIONS)


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
