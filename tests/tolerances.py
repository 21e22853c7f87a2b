"""The one table of how far results may be from the reference (NUMERICS section 8)."""

from __future__ import annotations

import numpy as np

# max|d| / max|reference|, by element type of the tensor; everything inside is f32.
BENIGN = {"float32": 2e-5, "float16": 1e-3, "bfloat16": 8e-3}
# The same on data that amplifies roundings: identical keys, beta 2, growing states.
HARD = {"float32": 2e-4, "float16": 1e-3, "bfloat16": 8e-3}


def error(got: np.ndarray, want: np.ndarray) -> float:
    """max|d| / max|want|; NaN where ``got`` is not finite and ``want`` is."""
    assert got.shape == want.shape, f"{got.shape} instead of {want.shape}"
    if not want.size:
        return 0.0
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30))


def check(got: list[np.ndarray], want: tuple[np.ndarray, ...], *, hard: bool = False) -> None:
    """Output and state against the reference, each within the limit of its own type."""
    limits = HARD if hard else BENIGN
    for name, one, other in zip(("output", "present_state"), got, want, strict=True):
        limit, found = limits[one.dtype.name], error(one, other)
        assert found <= limit, f"{name}: error {found:.1e}, limit {limit:.0e}"  # NaN fails too


# Logits of a whole model, relative norm, by what it computes in.
MODEL_LOGITS = {"f32": 1e-4, "f16": 1e-2, "bf16": 1e-1, "int4": 1e-2}
# MatMulNBits with accuracy_level 4 rounds activations to int8: with embeddings that differ by 1e-7 ONNX Runtime's own
# logits move by 0.7e-2 to 1.6e-2 at 64 tokens and 1.6e-2 to 2.0e-2 at 200, as soon as one rounding flips. On a CPU
# without AVX-512, ONNX Runtime 1.32 itself leaves the shipped reference by 1.4e-2 (64), 1.6e-2 (65), 1.7e-2 (200).
INT4_OWN_NOISE = 3e-2


def relative_norm(got: np.ndarray, want: np.ndarray) -> float:
    """|d| / |want| over all elements."""
    assert got.shape == want.shape, f"{got.shape} instead of {want.shape}"
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
