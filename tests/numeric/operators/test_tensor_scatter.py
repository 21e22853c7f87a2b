"""TensorScatter against ONNX Runtime; every element is one of its inputs, so results are equal."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from comparing import normal
from harness import node_for, run_op, spec
from linattn.dialect_patterns.tensor_scatter.contract import parse
from linattn.runtime.errors import UnsupportedModelError
from onnx_runtime import run_onnx_runtime

OP, ROWS, NEW = "TensorScatter", 7, 3


def operands(shape: tuple[int, ...], axis: int, indices: list[int] | None, dtype: Any) -> list[np.ndarray]:
    new = list(shape)
    new[axis] = NEW
    inputs = [normal(*shape, dtype=dtype), normal(*new, dtype=dtype)]
    return inputs if indices is None else [*inputs, np.array(indices)]


def check(inputs: list[np.ndarray], attributes: dict[str, Any], **run: Any) -> None:
    (got,) = run_op(OP, inputs, attributes, **run)
    wide = [a.astype(np.float32) if a.dtype != np.int64 else a for a in inputs]
    (want,) = run_onnx_runtime(OP, wide, attributes)
    assert got.dtype == inputs[0].dtype
    assert np.array_equal(got.astype(np.float32), want)


@pytest.mark.parametrize(
    ("shape", "axis", "indices", "mode", "dtype"),
    [
        ((2, 3, ROWS, 4), -2, [0, 4], "linear", np.float32),
        ((2, 3, ROWS, 4), 2, [5, 6], "circular", np.float16),
        ((2, ROWS, 8), 1, [2, 4], "linear", ml_dtypes.bfloat16),
        ((2, ROWS, 8), 1, None, "linear", np.float32),
        ((1, 4, ROWS), -1, [19], "circular", np.float32),
    ],
)
def test_places(shape: tuple[int, ...], axis: int, indices: list[int] | None, mode: str, dtype: Any):
    check(operands(shape, axis, indices, dtype), {"axis": axis, "mode": mode})


def test_open_rows():
    check(operands((2, 3, ROWS, 4), 2, [1, 4], np.float32), {}, open_axes={0: (2,), 1: (2,)})


@pytest.mark.parametrize("index", [-2, 6, 1 << 40, -(1 << 62)])
def test_what_does_not_fit_is_not_written(index: int):
    inputs = operands((1, ROWS, 4), 1, [index], np.float32)
    (got,) = run_op(OP, inputs, {"axis": 1})
    want = inputs[0].copy()
    for row in range(NEW):
        if 0 <= index + row < ROWS:
            want[0, index + row] = inputs[1][0, row]
    assert np.array_equal(got, want)


@pytest.mark.vulkan
@pytest.mark.parametrize(("target", "dtype"), [("vulkan", np.float32), ("lavapipe", np.float16)])
def test_vulkan(target: str, dtype: Any):
    check(operands((2, 3, ROWS, 4), 2, [5, 0], dtype), {"mode": "circular"}, target=target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axis": 0}, "attribute 'axis', got 0, expected an axis of 2x3x7x4xf32, not the first"),
        ({"mode": "wrap"}, "attribute 'mode', got 'wrap', expected 'linear' or 'circular'"),
        ({"axis": 3}, "input 'update' has the wrong shape"),
    ],
)
def test_invalid(change: dict[str, Any], message: str):
    inputs = [spec(array) for array in operands((2, 3, ROWS, 4), 2, [0, 4], np.float32)]
    with pytest.raises(UnsupportedModelError, match=message):
        parse(node_for("", OP, 24, inputs, change, 1))
