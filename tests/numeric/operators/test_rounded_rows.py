"""The rounded A of MatMulNBits (accuracy_level 4), read off products by weights that are an identity.

Rows are made of numbers a hair beside the halves of a block's step: what is rounded is x * (127 / max |x|), itself
rounded to f32 before, as ONNX Runtime, the CPU's kernels and CUDA's do it. One multiply-add with the magic number
behind it, as NVIDIA's Vulkan driver makes of the two, or a quotient that is off by a unit in the last place, sends
many of them the other way.
"""

from __future__ import annotations

from typing import Any

import matrices
import numpy as np
import pytest
from comparing import MICROSOFT
from harness import TARGETS, run_op
from linattn.dialect_patterns.mat_mul_n_bits import fused_mma
from linattn.dialect_patterns.op import LoweringOptions
from onnx_runtime import run_onnx_runtime
from test_mat_mul_n_bits import OP, shape_attributes

BLOCK, DEPTH = 32, 128
vulkan = [pytest.mark.vulkan, pytest.mark.xdist_group("vulkan")]


def near_halves(rows: int, depth: int) -> np.ndarray:
    """f32 [rows, depth]: in each block of numbers near the halves of its step one that is the largest."""
    rng = np.random.default_rng(rows)
    largest = rng.uniform(0.5, 4.0, (rows, depth // BLOCK, 1)).astype(np.float32)
    halves = rng.integers(-126, 126, (rows, depth // BLOCK, BLOCK)) + 0.5
    x = (halves / inverse(largest).astype(np.float64)).astype(np.float32)
    x = np.where(rng.random(x.shape) < 0.5, x, np.nextafter(x, np.float32(0)))
    x[..., 7:8] = largest
    return x.reshape(rows, depth)


def inverse(largest: np.ndarray) -> np.ndarray:
    return np.float32(127) / largest


def whole(x: np.ndarray, how: Any = np.float32) -> np.ndarray:
    """The whole numbers of ``x`` [rows, depth], of products in that type."""
    blocks = x.reshape(len(x), -1, BLOCK)
    factor = inverse(np.abs(blocks).max(-1, keepdims=True))
    return np.rint(blocks.astype(how) * factor.astype(how)).reshape(x.shape)


def read_off(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The whole numbers that a product with an identity was made of."""
    blocks = x.reshape(len(x), -1, BLOCK).astype(np.float64)
    steps = np.abs(blocks).max(-1, keepdims=True) / 127
    found = y.astype(np.float64).reshape(blocks.shape) / steps
    assert np.abs(found - np.rint(found)).max() < 1e-2
    return np.rint(found).reshape(x.shape)


def identity(depth: int, columns: int) -> list[np.ndarray]:
    """Weights of 4 bits and their scales: column n is 1 at n, 0 elsewhere."""
    fields = np.full((columns, depth), 8, np.uint8)
    fields[np.arange(columns), np.arange(columns)] = 9
    packed = (fields[:, 0::2] | fields[:, 1::2] << 4).reshape(columns, -1, BLOCK // 2)
    return [packed, np.ones((columns, depth // BLOCK), np.float32)]


def check(rows: int, columns: int = DEPTH, target: str = "cpu", **run: Any) -> None:
    x, seen = near_halves(rows, DEPTH), columns // BLOCK * BLOCK
    want = whole(x)
    assert (want != whole(x, np.float64)).mean() > 0.1, "the numbers would not tell one rounding from two"
    attributes, inputs = shape_attributes(DEPTH, BLOCK, 4, 4, columns), [x[None], *identity(DEPTH, columns)]
    (y,) = run_op(OP, inputs, attributes, domain=MICROSOFT, version=1, target=target, **run)
    np.testing.assert_array_equal(read_off(y[0, :, :seen], x[:, :seen]), want[:, :seen])


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("strategy", [None, "dequantised"])
def test_cpu(rows: int, strategy: str | None) -> None:
    check(rows, options=LoweringOptions(strategy))


@pytest.mark.parametrize("rows", [1, 40])
def test_onnx_runtime(rows: int) -> None:
    """It rounds so, whatever is said here."""
    x, attributes = near_halves(rows, DEPTH), shape_attributes(DEPTH, BLOCK, 4, 4, DEPTH)
    inputs = [x[None], *identity(DEPTH, DEPTH)]
    common: dict[str, Any] = {"domain": MICROSOFT, "version": 1, "num_outputs": 1, "used": None}
    (y,) = run_onnx_runtime(OP, inputs, attributes, constants=[1, 2], **common)
    np.testing.assert_array_equal(read_off(y[0], x), whole(x))


class TestGpu:
    pytestmark = vulkan

    # One row and a few in one kernel, which rounds by itself where it has shuffles; many in tiles; the portable form.
    @pytest.mark.parametrize("target", ["vulkan", "lavapipe"])
    @pytest.mark.parametrize(("rows", "columns"), [(1, 128), (5, 128), (40, 128), (40, 97)])
    def test_f32(self, rows: int, columns: int, target: str) -> None:
        check(rows, columns, target)

    def test_matrix_units(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(TARGETS, "lavapipe", matrices.TARGET)
        matrices.emulate(monkeypatch, fused_mma)
        check(40, target="lavapipe")
