"""GatherBlockQuantized against ONNX Runtime (which has no bf16: against the reference there)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from comparing import MICROSOFT, TOLERANCE, assert_matches, normal, relative_error
from harness import node_for, run_op, spec
from linattn.dialect_patterns.gather_block_quantized.contract import parse
from linattn.dialect_patterns.gather_block_quantized.reference import reference
from linattn.runtime.errors import UnsupportedModelError

OP, ROWS = "GatherBlockQuantized", 37
IDS = np.array([[0, 36, 5], [-1, 5, -37]])


def attributes(bits: int = 4, block: int = 32) -> dict[str, int]:
    return {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}


def operands(
    bits: int, block: int, depth: int, *, zeros: bool = False, dtype: Any = np.float32, inner: tuple[int, ...] = ()
) -> list[np.ndarray]:
    rng = np.random.default_rng(depth)
    blocks, lead = -(-depth // block), (ROWS, *inner)
    data = rng.integers(0, 256, (*lead, depth * bits // 8)).astype(np.uint8)
    inputs = [data, IDS, (0.1 * normal(*lead, blocks)).astype(dtype)]
    return [*inputs, rng.integers(0, 256, (*lead, -(-blocks * bits // 8))).astype(np.uint8)] if zeros else inputs


def check(inputs: list[np.ndarray], attrs: dict[str, int], **run: Any) -> None:
    assert_matches(OP, inputs, attrs, domain=MICROSOFT, version=1, constants=[0, 2, *range(3, len(inputs))], **run)


# 72: the last block is not full; 20, 70: rows, and 37 of them, that are not whole words.
@pytest.mark.parametrize(
    ("bits", "block", "depth", "zeros"),
    [
        (4, 16, 64, False),
        (4, 32, 72, True),
        (4, 128, 256, True),
        (4, 256, 256, False),
        (4, 16, 20, True),
        (8, 32, 96, True),
        (8, 64, 70, False),
        (2, 16, 80, True),
    ],
)
def test_bits_blocks_and_edges(bits: int, block: int, depth: int, zeros: bool):
    check(operands(bits, block, depth, zeros=zeros), attributes(bits, block))


@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 3)])
@pytest.mark.parametrize("ids", [np.int32, np.int64])
def test_indices_of_any_shape(shape: tuple[int, ...], ids: Any):
    inputs = operands(4, 32, 64)
    inputs[1] = np.resize(IDS, shape).astype(ids)
    check(inputs, attributes())


def test_more_axes():
    check(operands(4, 32, 64, zeros=True, inner=(3, 2)), attributes() | {"quantize_axis": -1})


def test_outside_the_table_is_0_as_in_onnx_runtime():
    inputs = operands(4, 32, 64)
    inputs[1] = np.array([37, -38, 1 << 40, -(1 << 62), 3])
    check(inputs, attributes())


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtypes_with_open_tokens(dtype: Any):
    inputs = operands(4, 32, 72, zeros=True, dtype=dtype)
    (got,) = run_op(OP, inputs, attributes(), domain=MICROSOFT, version=1, open_axes={1: (0, 1)})
    assert got.dtype == dtype
    assert relative_error(got, reference(*inputs, bits=4, block_size=32)) < TOLERANCE[got.dtype.name]


@pytest.mark.vulkan
@pytest.mark.parametrize(
    ("target", "bits", "depth", "dtype"),
    [
        ("vulkan", 4, 72, np.float32),  # without 8-bit storage; 37 rows of 2 bytes of zero points are no whole words
        ("vulkan", 4, 20, np.float32),
        ("lavapipe", 8, 64, np.float16),
        ("lavapipe", 4, 72, ml_dtypes.bfloat16),
    ],
)
def test_vulkan(target: str, bits: int, depth: int, dtype: Any):
    inputs = operands(bits, 32, depth, zeros=True, dtype=dtype)
    (got,) = run_op(OP, inputs, attributes(bits), domain=MICROSOFT, version=1, target=target)
    assert relative_error(got, reference(*inputs, bits=bits, block_size=32)) < TOLERANCE[got.dtype.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "attribute 'bits', got 3, expected 2, 4 or 8"),
        ({"block_size": 8}, "attribute 'block_size', got 8, expected a power of two from 16 on"),
        ({"gather_axis": 1}, "attribute 'gather_axis', got 1, expected 0"),
        ({"quantize_axis": 0}, "attribute 'quantize_axis', got 0, expected 1"),
        ({"quantize_axis": 7}, "attribute 'quantize_axis', got 7, expected 1"),
        ({"block_size": 64}, r"input 'scales' has the wrong shape, got 37x2xf32, expected \[37,1\]"),
        ({"axis": 0}, "unknown attribute 'axis'"),
    ],
)
def test_invalid(change: dict[str, int], message: str):
    inputs = [spec(array) for array in operands(4, 32, 64)]
    with pytest.raises(UnsupportedModelError, match=message):
        parse(node_for(MICROSOFT, OP, 1, inputs, attributes() | change, 1))
