"""MatMulNBits on the CPU's matrix unit, against ONNX Runtime: real where this CPU has one, else emulated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from comparing import DTYPES
from harness import DRIVERS, FLAGS, HOST, TARGETS, run_op
from linattn.dialect_patterns.mat_mul_n_bits import fused_amx, simd_plan
from linattn.dialect_patterns.mat_mul_n_bits.contract import MatMulNBits
from linattn.dialect_patterns.mat_mul_n_bits.op import choose
from linattn.dialect_patterns.node import TensorSpec
from linattn.dialect_patterns.op import LoweringOptions
from linattn.dialect_patterns.target import Target
from test_mat_mul_n_bits import check, operands, shape_attributes

from tests.emulated_cpu import AMX, STACK, Tiles

UNIT = replace(HOST, vector_bits=512, features=HOST.features | AMX)


@pytest.fixture(params=["here", "emulated"])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "here":
        if not HOST.features >= AMX:
            pytest.skip(f"emulated only: this CPU lacks {', '.join(sorted(AMX - HOST.features))}")
        return "cpu"
    monkeypatch.setattr(fused_amx, "AmxTiles", Tiles)
    flags = [*FLAGS["cpu"], STACK]
    for table, value in ((TARGETS, UNIT), (FLAGS, flags), (DRIVERS, "cpu")):
        monkeypatch.setitem(table, "emulated", value)
    return "emulated"


# Rows around registers of 16, two of them and workgroups of 64 to 256; 37 blocks are a slab or several and one more;
# 300 columns several workgroups.
@pytest.mark.parametrize(
    ("bits", "block", "zeros", "depth", "columns", "tokens"),
    [
        (4, 32, "", 1184, 300, 70),
        (4, 32, "packed", 1184, 33, 33),
        (4, 32, "", 192, 32, 150),
        (4, 32, "", 1184, 32, 300),
        (4, 256, "", 512, 32, 64),
        (4, 128, "packed", 900, 40, 16),
        (4, 64, "", 64, 32, 64),
        (8, 64, "packed", 328, 41, 40),
        (8, 32, "", 328, 41, 67),
        (2, 64, "packed", 328, 41, 17),
    ],
)
def test_edges(bits: int, block: int, zeros: str, depth: int, columns: int, tokens: int, target: str) -> None:
    attributes = shape_attributes(depth, block, bits, 4, columns)
    inputs = operands(attributes, (1, tokens), zeros=zeros, bias=tokens % 2 == 1)
    inputs[0][0, 0, :block] = 0.0  # a block without a largest value
    check(attributes, inputs, target=target)


def test_blocks_are_counted_in_their_order(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several at once give the same bits as one after the other."""
    attributes = shape_attributes(224, 32, accuracy=4, columns=40)
    run = {"domain": "com.microsoft", "version": 1, "target": target}
    inputs = operands(attributes, (1, 20), zeros="packed")
    (found,) = run_op("MatMulNBits", inputs, attributes, **run)

    def one_by_one(contract: MatMulNBits, machine: Target) -> Any:
        p = simd_plan.amx_plan(contract, machine)
        assert isinstance(p, simd_plan.Plan)
        assert p.counted == 2
        return replace(p, counted=1)

    monkeypatch.setattr(fused_amx, "amx_plan", one_by_one)
    (wanted,) = run_op("MatMulNBits", inputs, attributes, **run)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("rows", "block", "tile", "row_block", "counted"),
    [
        (16, 32, 16, 16, 2),
        (32, 32, 32, 32, 2),
        (33, 32, 16, 64, 2),
        (65, 32, 32, 128, 2),
        (512, 32, 32, 256, 2),
        (None, 32, 32, 256, 2),
        (512, 128, 32, 256, 1),
        (512, 256, 32, 128, 1),
    ],
)
def test_plan(rows: int | None, block: int, tile: int, row_block: int, counted: int) -> None:
    """A workgroup has as many rows as there are, to unpack weights for, and many blocks where they are small."""
    contract = MatMulNBits("m", TensorSpec((rows, 2048), "f32"), 64, 2048, 4, block, "default", False, True)
    p = simd_plan.amx_plan(contract, UNIT)
    assert isinstance(p, simd_plan.Plan)
    assert (p.rows, p.row_block, p.counted) == (tile, row_block, counted)
    assert p.slab % p.counted == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_open_tokens(dtype: Any, target: str) -> None:
    attributes = shape_attributes(64, 32, accuracy=4)
    for tokens in (5, 32, 70):
        check(attributes, operands(attributes, (1, tokens), dtype=dtype), open_axes={0: (0, 1)}, target=target)


def test_a_row_that_is_not_a_number(target: str) -> None:
    """Neither NaN in a row nor what memory beyond the last one holds reaches another row."""
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
    ("rows", "block", "rounds", "reason"),
    [(16, 32, True, ""), (None, 32, True, ""), (15, 32, True, "15 rows"), (64, 16, True, "blocks of 16"),
     (64, 256, True, ""), (64, 32, False, "accuracy_level 4")],
)  # fmt: skip
def test_choice(rows: int | None, block: int, rounds: bool, reason: str) -> None:
    contract = MatMulNBits("m", TensorSpec((rows, 2048), "f32"), 64, 2048, 4, block, "default", False, rounds)
    choice = choose(contract, UNIT, LoweringOptions())
    assert choice.strategy == ("fused_simd" if reason else "fused_amx")
    assert reason in choice.rejected.get("fused_amx", "")
