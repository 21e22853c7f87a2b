"""SkipSimplifiedLayerNormalization against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from comparing import DTYPES, MICROSOFT, assert_matches, normal
from harness import lowered, node_for, spec
from linattn.dialect_patterns.norms import skip_simplified_layer_normalization
from linattn.runtime.errors import UnsupportedModelError

OP = "SkipSimplifiedLayerNormalization"
B, T, N = 2, 5, 64


def operands(*, bias: bool = False, dtype: Any = np.float32) -> list[np.ndarray | None]:
    rest = [normal(N + 1, dtype=dtype)[:N]] if bias else []
    return [
        normal(B, T, N, dtype=dtype),
        normal(B, T, N + 1, dtype=dtype)[..., :N].copy(),
        normal(N, dtype=dtype),
        *rest,
    ]


def check(inputs: list[np.ndarray | None], **run: Any) -> None:
    assert_matches(OP, inputs, {"epsilon": 1e-6}, domain=MICROSOFT, version=1, **run)


@pytest.mark.parametrize(("used", "bias"), [((1,), False), ((1, 0, 0, 0), True), ((1, 0, 0, 1), False)])
def test_outputs(used: tuple[int, ...], bias: bool):
    check(operands(bias=bias), num_outputs=len(used), used=[bool(u) for u in used])


@pytest.mark.parametrize("target", ["cpu512", pytest.param("lavapipe", marks=pytest.mark.vulkan)])
def test_epsilon(target: str):
    """Rows as small as its root, where it is half of what is divided by, and a row of zeros, which stays zeros."""
    inputs = [1e-3 * normal(B, T, N), 1e-3 * normal(B, T, N + 1)[..., :N], normal(N)]
    inputs[0][0, 0] = inputs[1][0, 0] = 0.0
    check(inputs, target=target)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_with_open_tokens(dtype: Any):
    axes = {0: (0, 1), 1: (0, 1)}
    check(operands(bias=True, dtype=dtype), num_outputs=4, used=[True, False, False, True], open_axes=axes)


@pytest.mark.parametrize(("shape", "opened"), [((1, T, N), True), ((T, N), False), ((T, N), True)])
def test_broadcast_skip(shape: tuple[int, ...], opened: bool):
    inputs = operands()
    inputs[1] = normal(*shape)
    check(inputs, open_axes={0: (0, 1), 1: (len(shape) - 2,)} if opened else None)


def test_rows_without_a_batch():
    check([normal(T, N), normal(T, N + 1)[:, :N].copy(), normal(N)], open_axes={0: (0,), 1: (0,)})


@pytest.mark.vulkan
def test_vulkan():
    check(operands(bias=True), num_outputs=4, used=[True, False, False, True], target="vulkan")


@pytest.mark.vulkan
@pytest.mark.parametrize(
    ("size", "dtype", "machine", "bias"),
    [
        (64, np.float16, "lavapipe", True),
        (1100, np.float32, "lavapipe", False),
        (12, np.float32, "lavapipe", False),
        (1100, np.float32, "vulkan", True),  # without subgroup operations, nor 16-bit storage
        (12, np.float32, "vulkan", False),
    ],
)
def test_one_kernel(size: int, dtype: Any, machine: str, bias: bool):
    inputs = [normal(2, 3, size, dtype=dtype), normal(2, 3, size + 1, dtype=dtype)[..., :size].copy(),
              normal(size, dtype=dtype), *([normal(size + 1, dtype=dtype)[:size].copy()] if bias else [])]  # fmt: skip
    specs = [spec(a) for a in inputs]
    assert "rms_fused_simt" in str(lowered(MICROSOFT, OP, 1, specs, {}, 4, machine, used=[True, False, False, True]))
    check(inputs, num_outputs=4, used=[True, False, False, True], target=machine)
    check(inputs, target=machine)


@pytest.mark.parametrize(
    ("rows", "size", "dtype", "machine", "bias", "one"),
    [
        (11, 64, np.float16, "cpu512", True, True),  # four rows at once, and three
        (5, 1024, np.float32, "cpu512", False, True),  # four vectors at once
        (3, 528, ml_dtypes.bfloat16, "cpu256", True, True),  # vectors one by one
        (90, 448, np.float32, "cpu128", False, True),  # of three workgroups
        (6, 12, np.float32, "cpu512", False, True),
        (6, 10, np.float32, "cpu512", True, False),
    ],
)
def test_one_kernel_on_a_cpu(rows: int, size: int, dtype: Any, machine: str, bias: bool, one: bool):
    inputs = [normal(1, rows, size, dtype=dtype), normal(1, rows, size + 1, dtype=dtype)[..., :size].copy(),
              normal(size, dtype=dtype), *([normal(size + 1, dtype=dtype)[:size].copy()] if bias else [])]  # fmt: skip
    specs = [spec(a) for a in inputs]
    found = str(lowered(MICROSOFT, OP, 1, specs, {}, 4, machine, used=[True, False, False, True]))
    assert ("rms_fused_simd" in found) is one
    assert ("linalg" in found) is not one
    check(inputs, num_outputs=4, used=[True, False, False, True], target=machine)
    if one:
        check(inputs, target=machine)


@pytest.mark.parametrize(
    ("change", "used", "message"),
    [
        ({}, (True, True), "output 'mean' is not supported"),
        ({1: normal(B, T + 1, N)}, (True,), "input 'skip' has the wrong shape, got 2x6x64xf32"),
        ({2: normal(N).astype(np.float16)}, (True,), "input 'gamma' has an unsupported type, got f16, expected f32"),
    ],
)
def test_invalid(change: dict[int, np.ndarray], used: tuple[bool, ...], message: str):
    inputs = [spec(change.get(i, array)) for i, array in enumerate(operands())]
    with pytest.raises(UnsupportedModelError, match=message):
        skip_simplified_layer_normalization.parse(node_for(MICROSOFT, OP, 1, inputs, {}, len(used), used))
