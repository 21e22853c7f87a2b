"""Strategy fused_simd of softmax attention for 32 query rows of a key head and more, at the edges of its 48 keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
from attention_runs import CAPACITY, ManyRows
from harness import DRIVERS, FLAGS, HOST, TARGETS, WIDTHS
from linattn.dialect_patterns.mat_mul import simd_pairs

from tests.emulated_cpu import AMX, PAIRS, dot

POSITIONS = (0, 1, 39, 48, 55, 100, CAPACITY)


def check(case: ManyRows, target: str, kernel: str) -> None:
    assert f"attention_fused_simd_{kernel}_{case.dtype}_q" in case.check(target, POSITIONS)


# 36, 72 and 68 rows of a key head; panels of one vector's columns and of two; a number of tokens that 32 rows cut.
@pytest.mark.parametrize(
    ("case", "target"),
    [
        (ManyRows(9, 8, 2, 64, None, 0.0, False, "f32"), "cpu512"),
        *((ManyRows(18, 4, 1, 48, 40, 3.0, False, "f32"), width) for width in WIDTHS),
        (ManyRows(34, 2, 1, 64, 33, 0.0, False, "f16"), "cpu512"),
        (ManyRows(34, 2, 1, 64, None, 0.0, True, "bf16"), "cpu256"),
    ],
)
def test_positions(case: ManyRows, target: str) -> None:
    check(case, target, "many")


@pytest.mark.parametrize(
    "case",
    [
        ManyRows(9, 8, 2, 64, None, 0.0, False, "bf16"),
        ManyRows(34, 2, 1, 32, None, 3.0, True, "bf16"),
        ManyRows(8, 4, 1, 256, 33, 0.0, False, "bf16"),
    ],
)
def test_pairs(case: ManyRows, monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX512_BF16 multiplies pairs of bf16: real where this CPU has it, else emulated."""
    if not HOST.features >= PAIRS:
        monkeypatch.setattr(simd_pairs, "dot", dot)
    machine = replace(HOST, vector_bits=512, features=(HOST.features | PAIRS) - AMX | PAIRS)
    for table, value in ((TARGETS, machine), (FLAGS, FLAGS["cpu"]), (DRIVERS, "cpu")):
        monkeypatch.setitem(table, "pairs", value)
    check(case, "pairs", "many_pairs")
