"""The GPU kernels of chunks on a Vulkan device with subgroups (lavapipe in CI), against float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from data import DATA, HARD_DATA, Shape, linear_attention
from linattn.dialect_patterns.linear_attention.reference import reference
from linattn.dialect_patterns.op import MICROSOFT, LoweringOptions
from state_ops import run
from tolerances import check, error

CHUNKS = LoweringOptions(strategy="fused_simt_chunks")
RECURRENT = LoweringOptions(strategy="recurrent")
pytestmark = [pytest.mark.vulkan, pytest.mark.xdist_group("vulkan")]
RULES = [
    Shape(rule, q_heads=2, dk=32, dv=16) for rule in ("linear", "gated", "delta", "gated_delta")
]  # fmt: skip


def run_chunks(shape: Shape, inputs: list[np.ndarray | None], **options: Any) -> list[np.ndarray]:
    return run("LinearAttention", inputs, target="lavapipe", options=CHUNKS, **options, **shape.attributes)


def expected(shape: Shape, inputs: list[np.ndarray | None], **attributes: Any) -> tuple[np.ndarray, np.ndarray]:
    return reference(*inputs, q_num_heads=shape.q_heads, kv_num_heads=shape.kv_heads, **attributes)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", RULES, ids=lambda s: s.rule)
def test_rules_on_any_data(shape: Shape) -> None:
    for seed, (batch, tokens) in enumerate([(1, 1), (2, 15), (1, 16), (1, 17), (3, 33), (1, 64), (2, 130)]):
        inputs = linear_attention(shape, batch, tokens, seed=seed)
        check(run_chunks(shape, inputs), expected(shape, inputs))
    for data in DATA:  # -inf, positive and extreme decays among them
        inputs = linear_attention(shape, 1, 150, name=data)
        check(run_chunks(shape, inputs), expected(shape, inputs), hard=data in HARD_DATA)
