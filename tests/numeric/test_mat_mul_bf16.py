"""Products of bf16 by AVX512_BF16 and by AMX, against float64: real where this CPU has them, else emulated."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from linattn.dialect_patterns.mat_mul.contract import MatMul
from linattn.dialect_patterns.mat_mul.op import choose
from linattn.dialect_patterns.mat_mul.simd_layout import PairLayout
from linattn.dialect_patterns.node import TensorSpec
from linattn.dialect_patterns.op import LoweringOptions
from linattn.dialect_patterns.target import Target
from linattn.frontend.compile import CompileOptions, compile_model
from linattn.runtime import Program
from test_mat_mul import SHAPES, build, check, inputs_of

from tests.emulated_cpu import AMX, PAIRS, emulate
from tests.harness import HOST

BF16 = ml_dtypes.bfloat16
# Rows around registers of 16, blocks of 32 and chunks of 6 of these; K around blocks of 320; N around panels of 32.
UNIT = [
    *((rows, 64, 40) for rows in (16, 17, 31, 32, 33, 48, 65)),
    *((33, depth, 33) for depth in (32, 320, 352, 640, 1056)),
    *((64, 128, columns) for columns in (1, 16, 31, 32, 64, 100)),
    (400, 704, 72),
]
PAIRED = [*SHAPES, (9, 65, 20), (1, 77, 40), (2, 31, 9), (1, 1, 3), (13, 1, 5)]
AMX_CPU = Target("cpu", vector_bits=512, features=AMX)


@pytest.mark.parametrize("how", ["here", "emulated"])
@pytest.mark.parametrize(
    ("features", "shapes", "kernel"),
    [(PAIRS, PAIRED, b"mat_mul_fused_simd"), (AMX, UNIT, b"mat_mul_fused_amx")],
    ids=["avx512_bf16", "amx"],
)
def test_products(
    how: str,
    features: frozenset[str],
    shapes: list[tuple[int, int, int]],
    kernel: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if how == "emulated":
        emulate(monkeypatch, features)
    elif not features <= HOST.features:
        pytest.skip(f"emulated only: this CPU lacks {', '.join(sorted(features - HOST.features))}")
    model = build(shapes, BF16)
    compiled = compile_model(model, CompileOptions())
    assert compiled.module.count(kernel) >= len(shapes)
    assert (b"_pairs" in compiled.module) == (features == PAIRS)
    check(Program.load(compiled.module), model, shapes, BF16)


def test_rows_that_are_not_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN and inf stay in their row, and a zero beyond an odd K meets neither."""
    emulate(monkeypatch, AMX)
    shapes = [(40, 64, 33), (3, 31, 9), (20, 31, 9)]
    model = build(shapes, BF16)
    program = Program.load(compile_model(model, CompileOptions()).module)
    feeds = inputs_of(shapes, BF16)
    clean = program.run(feeds)
    for array in feeds.values():
        array[1], array[2, -1] = np.nan, np.inf
    found = program.run(feeds)
    for name, y in found.items():
        assert np.isnan(y[1].astype(np.float32)).all()
        assert not np.isfinite(y[2].astype(np.float32)).any()
        for row in (0, *range(3, len(y))):
            np.testing.assert_array_equal(y[row], clean[name][row])


@pytest.mark.parametrize(("depth", "columns"), [(1, 5), (6, 32), (7, 33), (4, 70)])
def test_pairs(depth: int, columns: int) -> None:
    weights = np.random.default_rng(depth).standard_normal((depth, columns)).astype(BF16)
    packed = PairLayout(32, 32).pack(weights)
    assert packed.shape == (-(-columns // 32), -(-depth // 2), 32)
    halves = packed.view(np.uint16).view(BF16).reshape(*packed.shape, 2)
    found = halves.transpose(1, 3, 0, 2).reshape(packed.shape[1] * 2, -1)
    np.testing.assert_array_equal(found[:depth, :columns], weights)
    assert not found[depth:].astype(np.float32).any()
    assert not found[:, columns:].astype(np.float32).any()


@pytest.mark.parametrize(
    ("rows", "depth", "dtype", "target", "strategy", "reason"),
    [
        (64, 64, "bf16", AMX_CPU, "fused_amx", ""),
        (15, 64, "bf16", AMX_CPU, "fused_simd", "15 rows"),
        (None, 64, "bf16", AMX_CPU, "fused_simd", "an open number of rows"),
        (64, 48, "bf16", AMX_CPU, "fused_simd", "32 does not divide K=48"),
        (64, 64, "f16", AMX_CPU, "fused_simd", "no matrix unit for f16"),
        (64, 64, "bf16", Target("cpu", vector_bits=512, features=PAIRS), "fused_simd", "no matrix unit"),
        (64, 64, "bf16", Target("cpu", vector_bits=256), "fused_simd", "no matrix unit"),
    ],
)
def test_choice(rows: int | None, depth: int, dtype: str, target: Target, strategy: str, reason: str) -> None:
    contract = MatMul("m", TensorSpec((rows, depth), dtype), TensorSpec((depth, 64), dtype), True)
    choice = choose(contract, target, LoweringOptions())
    assert choice.strategy == strategy
    assert reason in choice.rejected.get("fused_amx", "")
