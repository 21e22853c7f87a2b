"""One token of the fused GPU kernel where there are subgroup operations, against float64 (lavapipe: subgroups of 8)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from data import DATA, HARD_DATA, Shape, linear_attention
from harness import TARGETS, spec
from linattn.dialect_patterns.linear_attention.contract import parse
from linattn.dialect_patterns.linear_attention.fused_simt_plan import plan_for
from linattn.dialect_patterns.linear_attention.reference import reference
from linattn.dialect_patterns.node import Node
from linattn.dialect_patterns.op import MICROSOFT, LoweringOptions
from state_ops import run
from tolerances import check

FUSED = LoweringOptions(strategy="fused_simt")
F16, BF16, F32 = np.float16, ml_dtypes.bfloat16, np.float32
pytestmark = [pytest.mark.vulkan, pytest.mark.xdist_group("vulkan")]


def check_step(shape: Shape, inputs: list[np.ndarray | None], hard: bool = False) -> None:
    got = run(
        "LinearAttention", inputs, target="lavapipe", domain=MICROSOFT, open_dims=False, options=FUSED,
        **shape.attributes,
    )  # fmt: skip
    want = reference(*inputs, q_num_heads=shape.q_heads, kv_num_heads=shape.kv_heads)  # type: ignore[arg-type]
    check(got, want, hard=hard)


def sharing(shape: Shape, inputs: list[np.ndarray | None]) -> int:
    """Subgroups that share a column."""
    node = Node("test", MICROSOFT, "LinearAttention", 1, tuple(map(spec, inputs)), 2, shape.attributes)
    plan = plan_for(parse(node), TARGETS["lavapipe"])
    assert plan is not None
    return plan.sharing


@pytest.mark.parametrize(
    "shape",
    [
        Shape("linear", dk=64, dv=32), Shape("gated", dk=64, dv=32), Shape("gated", "key", dk=64, dv=32),
        Shape("delta", beta="shared", dk=64, dv=32), Shape("gated_delta", dk=64, dv=32),
        Shape("gated_delta", "key", dk=64, dv=32),
    ],
    ids=lambda shape: f"{shape.rule}-{shape.decay}",
)  # fmt: skip
def test_rules_on_any_data(shape: Shape) -> None:
    for name in DATA:  # -inf, positive and extreme decays among them
        inputs = linear_attention(shape, 1, 1, name=name, seed=3)
        assert sharing(shape, inputs) > 1
        check_step(shape, inputs, hard=name in HARD_DATA)


@pytest.mark.parametrize(
    ("heads", "size", "dtype", "state_dtype", "batch", "subgroups"),
    [
        ((2, 2, 2), (128, 128), F16, F32, 1, 16),
        ((4, 1, 1), (64, 64), F16, None, 1, 8),  # four queries read a state
        ((50, 50, 50), (32, 64), F16, None, 1, 4),  # enough states for wider parts
        ((2, 1, 4), (64, 20), BF16, F32, 2, 8),  # inverse GQA; the last columns are not a whole tile
        ((1, 1, 1), (256, 36), F32, F16, 1, 32),
        ((1, 1, 1), (8, 4), F32, None, 1, 1),
        ((1, 1, 1), (12, 6), F32, None, 1, 1),  # does not divide so
        ((1, 1, 1), (24, 8), F32, None, 1, 1),
    ],
    ids=str,
)
def test_sizes(
    heads: tuple[int, int, int], size: tuple[int, int], dtype: Any, state_dtype: Any, batch: int, subgroups: int
) -> None:
    shape = Shape(q_heads=heads[0], k_heads=heads[1], kv_heads=heads[2], dk=size[0], dv=size[1])
    for past in (True, False):
        inputs = linear_attention(shape, batch, 1, dtype=dtype, state_dtype=state_dtype, past=past)
        assert sharing(shape, inputs) == subgroups
        check_step(shape, inputs)
