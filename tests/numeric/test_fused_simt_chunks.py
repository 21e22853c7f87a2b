"""The GPU kernels of chunks on a Vulkan device with subgroups (lavapipe in CI), against float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from data import DATA, HARD_DATA, Shape, linear_attention
from linattn.dialect_patterns.emit import simt_kernel
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


@pytest.mark.parametrize("shape", [RULES[1], RULES[3]], ids=lambda s: s.rule)
def test_growth_of_an_empty_state(shape: Shape) -> None:
    inputs = linear_attention(shape, 1, 40, past=False)
    decay = np.array(inputs[4])
    decay[:, 16:32] = 7.0  # e^112 over a chunk
    inputs[4] = decay
    inputs[1][:, :31] = 0.0  # type: ignore[index]
    check(run_chunks(shape, inputs), expected(shape, inputs))


def test_a_reset_is_a_fresh_start() -> None:
    inputs = linear_attention(RULES[3], 1, 20)
    decay = np.array(inputs[4])
    decay[:, 0] = -np.inf
    old = run_chunks(RULES[3], [*inputs[:4], decay, inputs[5]])
    fresh = run_chunks(RULES[3], [*inputs[:3], np.zeros_like(inputs[3]), decay, inputs[5]])
    for a, b in zip(old, fresh, strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_worse_than_the_f32_recurrence() -> None:
    shape = Shape("gated_delta", q_heads=2, dk=64, dv=32)
    for data in ("silu", "near", "steps", "reset"):
        inputs = linear_attention(shape, 1, 300, name=data)
        want = expected(shape, inputs)
        recurrent = run("LinearAttention", inputs, target="cpu", options=RECURRENT, **shape.attributes)
        for ours, theirs, right in zip(run_chunks(shape, inputs), recurrent, want, strict=True):
            assert error(ours, right) <= 2 * max(error(theirs, right), 1e-7)


@pytest.mark.parametrize("heads", [(1, 1, 2), (2, 2, 4), (2, 1, 4)], ids=str)
def test_several_value_heads_of_a_query_head(heads: tuple[int, int, int]) -> None:
    shape = Shape(q_heads=heads[0], k_heads=heads[1], kv_heads=heads[2], dk=32, dv=16)
    inputs = linear_attention(shape, 2, 19)
    check(run_chunks(shape, inputs, domain=MICROSOFT), expected(shape, inputs))


@pytest.mark.parametrize("sizes", [(128, 128), (96, 48)], ids=str)
def test_head_sizes(sizes: tuple[int, int]) -> None:
    shape = Shape("gated_delta", beta="shared", q_heads=2, dk=sizes[0], dv=sizes[1])
    inputs = linear_attention(shape, 1, 35)
    check(run_chunks(shape, inputs, open_dims=False), expected(shape, inputs))


@pytest.mark.parametrize(
    ("dtype", "state_dtype"), [(np.float16, None), (ml_dtypes.bfloat16, np.float32), (np.float32, np.float16)]
)
def test_16_bit(dtype: Any, state_dtype: Any) -> None:
    inputs = linear_attention(RULES[3], 2, 40, dtype=dtype, state_dtype=state_dtype)
    got = run_chunks(RULES[3], inputs)
    assert [x.dtype for x in got] == [dtype, state_dtype or dtype]
    check(got, expected(RULES[3], inputs))


def test_split_is_whole() -> None:
    shape = RULES[3]
    inputs = linear_attention(shape, 1, 50)
    whole, last = run_chunks(shape, inputs)
    outputs, state = [], inputs[3]
    for start, stop in ((0, 1), (1, 18), (18, 50)):
        part = [x if i == 3 or x is None else x[:, start:stop] for i, x in enumerate(inputs)]
        part[3] = state
        output, state = run_chunks(shape, part)
        outputs.append(output)
    assert error(np.concatenate(outputs, axis=1), whole.astype(np.float64)) < 1e-6
    assert error(state, last.astype(np.float64)) < 1e-6  # type: ignore[arg-type]


def test_a_scale_and_no_past_state() -> None:
    inputs = linear_attention(RULES[2], 2, 20, past=False)
    check(run_chunks(RULES[2], inputs, scale=0.5), expected(RULES[2], inputs, scale=0.5))


def test_more_chunks_than_workgroups_along_y(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simt_kernel, "MAX_GROUPS", 8)
    shape = Shape("gated", q_heads=1, k_heads=1, kv_heads=1, dk=32, dv=16)
    inputs = linear_attention(shape, 13, 20)  # 13 states, 26 chunks, in rows of 8
    check(run_chunks(shape, inputs, open_dims=False), expected(shape, inputs))
