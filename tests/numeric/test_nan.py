"""NaN and inf in one token: tokens before it, other batch rows and other heads are bit-equal to a run without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from data import Shape, causal_conv, linear_attention
from harness import WIDTHS
from linattn.dialect_patterns.op import LoweringOptions
from state_ops import run

VALUES = (np.nan, np.inf, -np.inf)
INPUTS = {"query": 0, "key": 1, "value": 2, "decay": 4, "beta": 5}
VULKAN = pytest.mark.vulkan


@dataclass(frozen=True)
class Case:
    """One kernel.

    Attributes:
        strategy: Which.
        target: Where it runs.
        shape: What it computes; as many key as key/value heads.
        tokens: Of the call.
        open_dims: Whether the kernel is for any number of tokens.
    """

    strategy: str
    target: str
    shape: Shape
    tokens: int
    open_dims: bool = True

    @property
    def positions(self) -> list[int]:
        """Places in a chunk of 16, its ends among them, and in the next ones, which are shorter."""
        places = (0, 1, 2, 3, 8, 14, 15, 16, 18, 20) if self.target.startswith("cpu") else (1, 6, 15, 16, 32)
        places = (0,) if self.tokens == 1 else places
        return [t for t in places if t < self.tokens]


HEADS = {"q_heads": 2, "dk": 16, "dv": 32}
CASES = [
    Case("fused_simd", "cpu", Shape(**HEADS), 21),
    Case("fused_simd", "cpu128", Shape(**HEADS), 21),
    Case("fused_simd", "cpu", Shape("gated_delta", "key", **HEADS), 21),
    Case("fused_simd", "cpu", Shape("gated", "head", q_heads=4, dk=16, dv=32), 21),
    Case("fused_simd", "cpu", Shape(**HEADS), 4, open_dims=False),
    Case("fused_simd", "cpu", Shape("gated_delta", "key", **HEADS), 4, open_dims=False),
    Case("fused_simt", "lavapipe", Shape(**HEADS), 7),
    Case("fused_simt", "vulkan", Shape("gated_delta", "key", **HEADS), 7),
    Case("fused_simt", "lavapipe", Shape(q_heads=2, dk=64, dv=32), 1, open_dims=False),
    Case("fused_simt_chunks", "lavapipe", Shape(q_heads=2, dk=32, dv=32), 33),
    Case("fused_simt_chunks", "lavapipe", Shape("gated", q_heads=2, dk=32, dv=32), 18),
]


def names(case: Case) -> str:
    return f"{case.strategy}-{case.target}-{case.shape.rule}-{case.shape.decay}-{case.tokens}"


def run_case(case: Case, inputs: list[np.ndarray | None]) -> list[np.ndarray]:
    return run(
        "LinearAttention", inputs, target=case.target, open_dims=case.open_dims,
        options=LoweringOptions(strategy=case.strategy), **case.shape.attributes,
    )  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c.target.startswith("cpu") else VULKAN) for c in CASES], ids=names
)
def test_linear_attention(case: Case) -> None:
    """The last head of batch row 1 gets the value."""
    inputs = linear_attention(case.shape, 2, case.tokens)
    output, state = run_case(case, inputs)
    own = case.shape.q_heads // case.shape.kv_heads * case.shape.dv  # columns of the output of the last state
    for name, index in INPUTS.items():
        for value in VALUES if inputs[index] is not None else ():
            for t in case.positions:
                poisoned = list(inputs)
                poisoned[index] = np.array(inputs[index])
                poisoned[index][1, t, -1] = value
                got, got_state = run_case(case, poisoned)
                what = f"{value} in {name} of token {t}"
                np.testing.assert_array_equal(got[0], output[0], err_msg=f"{what}: another row")
                np.testing.assert_array_equal(got_state[0], state[0], err_msg=f"{what}: another row's state")
                np.testing.assert_array_equal(got[1, :t], output[1, :t], err_msg=f"{what}: an earlier token")
                np.testing.assert_array_equal(got[1, :, :-own], output[1, :, :-own], err_msg=f"{what}: another head")
                np.testing.assert_array_equal(got_state[1, :-1], state[1, :-1], err_msg=f"{what}: another head's state")


@pytest.mark.parametrize("target", [*WIDTHS, pytest.param("vulkan", marks=VULKAN)])
@pytest.mark.parametrize("tokens", [1, 21])
def test_causal_conv(target: str, tokens: int) -> None:
    """In a token or the past state of one channel: it reaches the next three tokens of that channel."""
    inputs = causal_conv(2, 8, tokens, 4)
    options: dict[str, Any] = {"target": target, "open_dims": False, "activation": "silu"}
    clean = run("CausalConvWithState", inputs, **options)
    padded = np.zeros((2, 8, 3 + tokens))
    for value in VALUES[: 3 if target in WIDTHS else 1]:
        for t in range(3 + tokens):
            poisoned = [np.array(x) for x in inputs]
            (poisoned[3] if t < 3 else poisoned[0])[1, 5, t if t < 3 else t - 3] = value
            reached = np.zeros(padded.shape, bool)
            reached[1, 5, t : t + 4] = True
            output, state = run("CausalConvWithState", poisoned, **options)
            kept = ~reached[:, :, 3:]
            np.testing.assert_array_equal(output[kept], clean[0][kept], err_msg=f"{value} in token {t - 3}")
            kept = np.ones((2, 8, 3), bool)
            kept[1, 5] = np.arange(tokens, tokens + 3) != t
            np.testing.assert_array_equal(state[kept], clean[1][kept], err_msg=f"{value} in token {t - 3}")
