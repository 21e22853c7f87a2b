"""MatMulNBits as bf16 on the CPU's matrix unit, against float64: real where this CPU has one, else emulated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from harness import DRIVERS, FLAGS, HOST, TARGETS, run_op
from linattn.dialect_patterns.mat_mul_n_bits import fused_amx_bf16, simd_plan
from linattn.dialect_patterns.mat_mul_n_bits.contract import MatMulNBits
from linattn.dialect_patterns.mat_mul_n_bits.op import choose
from linattn.dialect_patterns.node import TensorSpec
from linattn.dialect_patterns.op import LoweringOptions
from test_mat_mul_n_bits import operands, shape_attributes

from tests.emulated_cpu import AMX, STACK, Tiles
from tests.tolerances import BENIGN, error

UNIT = replace(HOST, vector_bits=512, features=HOST.features | AMX, fast_math=True)
BF16 = ml_dtypes.bfloat16


@pytest.fixture(params=["here", "emulated"])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    real = request.param == "here"
    if real and not HOST.features >= AMX:
        pytest.skip(f"emulated only: this CPU lacks {', '.join(sorted(AMX - HOST.features))}")
    if not real:
        monkeypatch.setattr(fused_amx_bf16, "AmxTiles", Tiles)
    flags = [*FLAGS["cpu"], STACK]
    for table, value in ((TARGETS, UNIT), (FLAGS, flags), (DRIVERS, "cpu")):
        monkeypatch.setitem(table, "unit", value)
    return "unit"


def weights_of(attributes: dict[str, int], inputs: list[np.ndarray | None]) -> np.ndarray:
    """The dequantised weights [K, N] in float64."""
    columns, bits, depth = attributes["N"], attributes["bits"], attributes["K"]
    _, packed, scales, zeros = inputs[:4]

    def apart(array: np.ndarray) -> np.ndarray:
        fields = [(array >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        return np.stack(fields, -1).reshape(columns, -1).astype(np.float64)

    blocks = scales.shape[1]
    zero = 1 << bits - 1 if zeros is None else apart(zeros)[:, :blocks] if zeros.dtype == np.uint8 else zeros
    zero = np.broadcast_to(zero, scales.shape).astype(np.float64)
    values = apart(packed).reshape(columns, blocks, -1)
    found = (values - zero[:, :, None]) * scales.astype(np.float64)[:, :, None]
    return found.reshape(columns, -1)[:, :depth].T


# Rows around registers of 32 and chunks of 128; several slabs of blocks; a last panel that begins earlier.
@pytest.mark.parametrize(
    ("bits", "block", "zeros", "depth", "columns", "tokens", "dtype"),
    [
        (4, 32, "", 1184, 300, 70, np.float32),
        (4, 32, "packed", 352, 33, 33, BF16),
        (4, 32, "", 64, 32, 150, np.float16),
        (4, 64, "packed", 896, 40, 16, np.float32),
        (8, 64, "packed", 320, 41, 31, np.float32),
        (2, 64, "float", 320, 41, 17, BF16),
    ],
)
def test_edges(
    bits: int, block: int, zeros: str, depth: int, columns: int, tokens: int, dtype: Any, target: str
) -> None:
    accuracy = 0 if dtype is BF16 else 4
    attributes = shape_attributes(depth, block, bits, accuracy, columns)
    inputs = operands(attributes, (1, tokens), zeros=zeros, bias=tokens % 2 == 1, dtype=dtype)
    choice = choose(contract(tokens, block, depth, columns, bits, zeros, dtype), UNIT, LoweringOptions())
    assert choice.strategy == "fused_amx_bf16"
    (found,) = run_op("MatMulNBits", inputs, attributes, domain="com.microsoft", version=1, target=target)
    wanted = inputs[0].astype(np.float64) @ weights_of(attributes, [*inputs, None][:4])
    if len(inputs) > 5:
        wanted = wanted + inputs[5].astype(np.float64)
    assert error(found, wanted) <= BENIGN["bfloat16"]


def contract(
    tokens: int | None, block: int, depth: int, columns: int, bits: int, zeros: str, dtype: Any
) -> MatMulNBits:
    name = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[np.dtype(dtype).name]
    rounds = dtype is not BF16
    spec = TensorSpec((tokens, depth), name)
    return MatMulNBits("m", spec, columns, depth, bits, block, zeros or "default", False, rounds)


@pytest.mark.parametrize("tokens", [5, 32, 70])
def test_open_tokens(tokens: int, target: str) -> None:
    attributes = shape_attributes(64, 32, accuracy=4)
    inputs = operands(attributes, (1, tokens))
    run = {"domain": "com.microsoft", "version": 1, "target": target, "open_axes": {0: (0, 1)}}
    (found,) = run_op("MatMulNBits", inputs, attributes, **run)
    wanted = inputs[0].astype(np.float64) @ weights_of(attributes, [*inputs, None][:4])
    assert error(found, wanted) <= BENIGN["bfloat16"]


def test_a_row_that_is_not_a_number(target: str) -> None:
    """Reaches no other row."""
    attributes = shape_attributes(64, 32, accuracy=4)
    inputs = operands(attributes, (1, 20))
    run = {"domain": "com.microsoft", "version": 1, "target": target}
    (clean,) = run_op("MatMulNBits", inputs, attributes, **run)
    inputs[0][0, 3] = np.nan
    (found,) = run_op("MatMulNBits", inputs, attributes, **run)
    others = [row for row in range(20) if row != 3]
    assert np.isnan(found[0, 3]).all()
    np.testing.assert_array_equal(found[0, others], clean[0, others])


@pytest.mark.parametrize(
    ("rows", "block", "dtype", "rounds", "fast", "strategy", "reason"),
    [
        (16, 32, "f32", True, True, "fused_amx_bf16", ""),
        (None, 32, "f16", True, True, "fused_amx_bf16", ""),
        (64, 32, "bf16", False, False, "fused_amx_bf16", ""),
        (64, 32, "f32", True, False, "fused_amx", "bf16 only with --math fast"),
        (64, 32, "f32", False, True, "fused_simd", "A is f32, and stays as it is"),
        (15, 32, "f32", True, True, "fused_simd", "15 rows"),
        (64, 16, "f32", True, True, "fused_simd", "blocks of 32 or more"),
        (64, 128, "f32", True, True, "fused_amx", "faster in int8"),
        (64, 128, "bf16", False, False, "fused_amx_bf16", ""),
    ],
)
def test_choice(rows: int | None, block: int, dtype: str, rounds: bool, fast: bool, strategy: str, reason: str) -> None:
    asked = MatMulNBits("m", TensorSpec((rows, 2048), dtype), 64, 2048, 4, block, "default", False, rounds)
    choice = choose(asked, replace(UNIT, fast_math=fast), LoweringOptions())
    assert choice.strategy == strategy
    assert reason in choice.rejected.get("fused_amx_bf16", "")


@pytest.mark.parametrize(("rows", "block", "row_block"), [(16, 32, 32), (33, 32, 64), (512, 32, 256), (None, 64, 256)])
def test_plan(rows: int | None, block: int, row_block: int) -> None:
    """As many rows as there are share unpacked weights, and the rest of the stack is for these."""
    asked = MatMulNBits("m", TensorSpec((rows, 2048), "f32"), 64, 2048, 4, block, "default", False, True)
    p = simd_plan.amx_bf16_plan(asked)
    assert isinstance(p, simd_plan.Plan)
    assert p.row_block == row_block
