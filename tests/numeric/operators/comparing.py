"""Compares one operator, run through its pattern and IREE, with ONNX Runtime's result in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from harness import run_op
from onnx_runtime import run_onnx_runtime

from tests.tolerances import BENIGN as TOLERANCE

MICROSOFT = "com.microsoft"
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


def widen(array: np.ndarray | None) -> np.ndarray | None:
    return array.astype(np.float32) if array is not None and array.dtype.name in ("float16", "bfloat16") else array


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """max|d| / max|ref|; differing shapes and values that are not finite fail."""
    assert got.shape == want.shape
    got, want = got.astype(np.float64), want.astype(np.float64)
    assert np.isfinite(got).all()
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)) if want.size else 0.0


def assert_matches(
    op_type: str,
    inputs: Sequence[np.ndarray | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    domain: str = "",
    version: int = 24,
    num_outputs: int = 1,
    used: Sequence[bool] | None = None,
    constants: Sequence[int] = (),
    **run: Any,
) -> None:
    """``run`` goes to the harness: target, open_axes."""
    common: dict[str, Any] = {"domain": domain, "version": version, "num_outputs": num_outputs, "used": used}
    got = run_op(op_type, inputs, attributes, **common, **run)
    want = run_onnx_runtime(op_type, [widen(a) for a in inputs], attributes, constants=constants, **common)
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert relative_error(ours, theirs) < TOLERANCE[ours.dtype.name]
