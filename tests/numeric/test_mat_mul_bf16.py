"""Products by AVX512_BF16, by AMX and by Arm's BF16, against float64: real where this CPU has them, else emulated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from linattn.dialect_patterns.mat_mul.contract import MatMul
from linattn.dialect_patterns.mat_mul.op import choose
from linattn.dialect_patterns.mat_mul.simd_layout import PairLayout
from linattn.dialect_patterns.node import TensorSpec
from linattn.dialect_patterns.op import LoweringOptions
from linattn.dialect_patterns.target import Target
from linattn.frontend.cli import main
from linattn.frontend.compile import CompileOptions, compile_model
from linattn.runtime import Program
from test_mat_mul import SHAPES, build, build_joined, check, inputs_of

from tests.emulated_cpu import AMX, ARM, PAIRS, emulate
from tests.harness import HOST
from tests.tolerances import BENIGN, error

BF16 = ml_dtypes.bfloat16
# Rows around registers of 16, blocks of 32 and chunks of 6 of these; K around blocks of 320; N around panels of 32.
UNIT = [
    *((rows, 64, 40) for rows in (16, 17, 31, 32, 33, 48, 65)),
    *((33, depth, 33) for depth in (32, 320, 352, 640, 1056)),
    *((64, 128, columns) for columns in (1, 16, 31, 32, 64, 100)),
    (400, 704, 72),
    # What is left of K: an odd one, a word, all but one; after one block and several.
    *((20, depth, 33) for depth in (33, 34, 63, 335, 690)),
]
# Fewer rows than a register has, the last of them too.
FEW = [
    *((rows, 64, 40) for rows in (1, 2, 8, 12, 13, 15)),
    *((1, depth, 33) for depth in (32, 352, 1056)),
    *((3, 128, columns) for columns in (1, 16, 31, 32, 100)),
]
PAIRED = [*SHAPES, (9, 65, 20), (1, 77, 40), (2, 31, 9), (1, 1, 3), (13, 1, 5)]
# Those of pairs that are not for the matrix unit.
EVEN = [s for s in PAIRED if s[1] % 2 == 0 and (s[0] < 16 or s[1] % 32)] + [(5, 34, 70), (40, 130, 33), (26, 1058, 40)]
# Rows around tiles of 8 to 12 and chunks of 48 of these; K around words, two of them and blocks of 512 words; N around
# panels of 8.
SQUARES = [
    *((rows, 64, 20) for rows in (9, 12, 13, 40)),
    *((7, depth, 9) for depth in (1, 2, 3, 4, 5, 6, 33, 1022, 1023, 1024, 1026, 2051)),
    *((11, 130, columns) for columns in (4, 7, 8)),
    (391, 1030, 12),
]
SLOW_PAIRS = PAIRS | {"amx-tile"}
AMX_CPU = Target("cpu", vector_bits=512, features=AMX)


@pytest.mark.parametrize("how", ["here", "emulated"])
@pytest.mark.parametrize(
    ("features", "shapes", "kernel", "dtype", "math"),
    [
        (PAIRS, PAIRED, b"mat_mul_fused_simd", BF16, "fast"),
        (SLOW_PAIRS, EVEN, b"mat_mul_fused_simd", BF16, "fast"),
        (ARM, SQUARES, b"_v128_squares", BF16, "fast"),
        (ARM, [(1, 33, 9), (2, 130, 20), (6, 64, 8)], b"_v128_pairs", BF16, "fast"),
        (AMX, UNIT, b"mat_mul_fused_amx_bf16_", BF16, "fast"),
        (AMX, FEW, b"_v512_amx", BF16, "fast"),
        (AMX, UNIT, b"mat_mul_fused_amx_f16_by_bf16_", np.float16, "fast"),
        (AMX, UNIT, b"mat_mul_fused_amx_f16_", np.float16, "strict"),
        (AMX, UNIT, b"mat_mul_fused_amx_f32_", np.float32, "fast"),
    ],
    ids=["avx512_bf16", "widened", "arm", "arm-few", "amx", "amx-few", "amx-f16-fast", "amx-f16", "amx-f32"],
)
def test_products(
    how: str,
    features: frozenset[str],
    shapes: list[tuple[int, int, int]],
    kernel: bytes,
    dtype: type,
    math: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if how == "emulated":
        emulate(monkeypatch, features)
    elif not features <= HOST.features:
        pytest.skip(f"emulated only: this CPU lacks {', '.join(sorted(features - HOST.features))}")
    elif HOST.features >= AMX > features:
        pytest.skip("emulated only: this CPU has a matrix unit, and takes that")
    model = build(shapes, dtype)
    compiled = compile_model(model, CompileOptions(math=math))
    assert compiled.module.count(kernel) >= len(shapes)
    assert (b"_by_bf16_" in compiled.module) == (b"_by_bf16_" in kernel)
    assert (b"_pairs" in compiled.module) == (features == PAIRS or b"_pairs" in kernel)
    assert (b"_widened" in compiled.module) == (features == SLOW_PAIRS)
    # Rows that are rounded to bf16 leave the product of f16 with its error.
    check(Program.load(compiled.module), model, shapes, dtype, BF16 if b"_by_bf16_" in kernel else dtype)


def test_products_of_one_value_are_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the matrix unit too, gated pairs among them."""
    emulate(monkeypatch, AMX)
    model, feeds, expected = build_joined(BF16, depths=64)
    compiled = compile_model(model, CompileOptions())
    assert compiled.module.count(b"_v512_amx") >= len(feeds)
    found = Program.load(compiled.module).run(feeds)
    for name, right in expected.items():
        assert error(found[name], right) <= BENIGN["bfloat16"], name


@pytest.mark.parametrize("how", ["here", "emulated"])
@pytest.mark.parametrize(
    ("features", "dtype", "kernel"),
    [
        (AMX, BF16, b"mat_mul_fused_amx"),
        (AMX, np.float16, b"mat_mul_fused_amx"),
        (AMX, np.float32, b"mat_mul_fused_amx"),
        (ARM, BF16, b"_v128_squares"),
    ],
    ids=["bf16", "f16", "f32", "arm"],
)
def test_open_rows(
    how: str, features: frozenset[str], dtype: type, kernel: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of rows is known at run time only: none of the unit's registers, or of a tile's rows, may be full."""
    if how == "emulated":
        emulate(monkeypatch, features)
    elif not features <= HOST.features:
        pytest.skip(f"emulated only: this CPU lacks {', '.join(sorted(features - HOST.features))}")
    kinds = [(0, 352, 33)]
    model = build(kinds, dtype, "rows")
    compiled = compile_model(model, CompileOptions(math="fast" if dtype == np.float32 else "strict"))
    assert kernel in compiled.module
    program = Program.load(compiled.module)
    for rows in (1, 16, 33, 400):
        check(program, model, [(rows, *kind[1:]) for kind in kinds], dtype)


@pytest.mark.parametrize(
    ("features", "dtype"),
    [(AMX, BF16), (AMX, np.float16), (AMX, np.float32), (ARM, BF16)],
    ids=["bf16", "f16", "f32", "arm"],
)
def test_rows_that_are_not_numbers(features: frozenset[str], dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN and inf stay in their row, inf is no NaN but with fast math, and a zero beyond an odd K meets neither."""
    emulate(monkeypatch, features)
    shapes = [(40, 64, 33), (3, 31, 9), (20, 31, 9), (9, 30, 9)]
    model = build(shapes, dtype)
    program = Program.load(compile_model(model, CompileOptions(math="fast")).module)
    feeds = inputs_of(shapes, dtype)
    clean = program.run(feeds)
    for array in feeds.values():
        array[1], array[2, -1] = np.nan, np.inf
    found = program.run(feeds)
    for name, y in found.items():
        assert np.isnan(y[1].astype(np.float32)).all()
        assert not np.isfinite(y[2].astype(np.float32)).any()
        assert dtype == np.float32 or np.isinf(y[2].astype(np.float32)).all()
        for row in (0, *range(3, len(y))):
            np.testing.assert_array_equal(y[row], clean[name][row])


def test_fast_math_is_for_the_matrix_unit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    onnx.save(build([(16, 32, 8)], np.float32), tmp_path / "model.onnx")
    arguments = [str(tmp_path / "model.onnx"), "-o", str(tmp_path / "m.vmfb")]
    assert main([*arguments, "--math", "exact"]) == 2
    assert "--math: not understood, got 'exact', expected strict or fast" in capsys.readouterr().err
    for features, changed in (("x86-64-v3", False), ("sapphirerapids", True)):
        assert main([*arguments, "--math", "fast", "--cpu-features", features]) == 0
        said = capsys.readouterr()
        assert ("MatMul: fused_amx, " in said.out + said.err) == changed
        assert ("--math fast changes nothing here" in said.out + said.err) != changed


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
        (None, 64, "bf16", AMX_CPU, "fused_amx", ""),
        (64, 48, "bf16", AMX_CPU, "fused_amx", ""),
        (64, 31, "bf16", AMX_CPU, "fused_simd", "K=31 does not fill a register of 32"),
        (64, 64, "f16", AMX_CPU, "fused_amx", ""),
        (64, 64, "f32", AMX_CPU, "fused_simd", "--math fast"),
        (64, 64, "f32", replace(AMX_CPU, fast_math=True), "fused_amx", ""),
        (64, 64, "f16", Target("cpu", vector_bits=512, features=PAIRS), "fused_simd", ""),
        (64, 64, "bf16", Target("cpu", vector_bits=512, features=PAIRS), "fused_simd", ""),
        (64, 64, "bf16", Target("cpu", vector_bits=256), "fused_simd", ""),
    ],
)
def test_choice(rows: int | None, depth: int, dtype: str, target: Target, strategy: str, reason: str) -> None:
    contract = MatMul("m", TensorSpec((rows, depth), dtype), TensorSpec((depth, 64), dtype), True)
    choice = choose(contract, target, LoweringOptions())
    assert choice.strategy == strategy
    assert reason in choice.rejected.get("fused_amx", "")


@pytest.mark.parametrize(
    ("rows", "bits", "features", "reason"),
    [
        (2, 512, PAIRS, ", bf16 in pairs"),
        (2, 512, AMX, ", on the matrix unit"),
        (2, 512, SLOW_PAIRS, ", pairs of bf16 in f32"),
        (2, 128, ARM, ", bf16 in pairs"),
        (7, 128, ARM, ", bf16 in 2 x 2 pairs"),
        (2, 256, PAIRS, ""),
        (7, 128, PAIRS, ""),
    ],
)
def test_the_reason_names_how(rows: int, bits: int, features: frozenset[str], reason: str) -> None:
    contract = MatMul("m", TensorSpec((rows, 64), "bf16"), TensorSpec((64, 64), "bf16"), True)
    choice = choose(contract, Target("cpu", vector_bits=bits, features=features), LoweringOptions())
    assert choice.reason == f"{rows} rows by packed weights in one kernel{reason}"
