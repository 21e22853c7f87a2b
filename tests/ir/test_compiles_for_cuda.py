"""What the strategies emit also compiles for CUDA; nothing is run, so no device is needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from data import Shape, causal_conv, linear_attention
from harness import TARGETS, compile_module, lowered
from iree.compiler.api import Session
from linattn.dialect_patterns.op import LoweringOptions
from linattn.dialect_patterns.target import Target
from state_ops import specs_of

FLAGS = ["--iree-hal-target-device=cuda", "--iree-cuda-target=sm_89", "--iree-input-type=none"]


@pytest.fixture(autouse=True)
def _cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "cuda", Target("cuda", is_gpu=True, subgroup_size=32, matrix_units=True))


def compiles(op_type: str, inputs: list[np.ndarray | None], attributes: dict[str, Any], open_dims: bool) -> bool:
    session = Session()
    session.set_flags(*FLAGS)
    specs = specs_of(op_type, inputs, open_dims)
    options = LoweringOptions(chunk_size=16)
    module = lowered("", op_type, 27, specs, attributes, 2, "cuda", options, session.context)
    return len(compile_module(module, session, "cuda")) > 0


@pytest.mark.parametrize(
    ("shape", "tokens", "open_dims", "dtype"),
    [
        (Shape(), 1, False, np.float16),
        (Shape(), 40, False, np.float16),
        (Shape("gated_delta", "key"), 40, True, np.float32),
        (Shape("gated"), 40, True, np.float32),
    ],
)
def test_linear_attention(shape: Shape, tokens: int, open_dims: bool, dtype: Any) -> None:
    inputs = linear_attention(shape, 1, tokens, dtype=dtype)
    assert compiles("LinearAttention", inputs, shape.attributes, open_dims)


@pytest.mark.parametrize("open_dims", [False, True])
def test_causal_conv(open_dims: bool) -> None:
    assert compiles("CausalConvWithState", causal_conv(1, 6, 5, 4, dtype=np.float16), {}, open_dims)
