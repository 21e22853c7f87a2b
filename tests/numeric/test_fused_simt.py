"""The fused GPU kernels on a Vulkan device (lavapipe in CI: no subgroup operations), against float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from data import DATA, HARD_DATA, Shape, causal_conv, linear_attention
from linattn.dialect_patterns.causal_conv.reference import reference as conv_reference
from linattn.dialect_patterns.linear_attention.reference import reference
from linattn.dialect_patterns.op import MICROSOFT, LoweringOptions
from state_ops import run
from tolerances import check, error

FUSED = LoweringOptions(strategy="fused_simt")
RECURRENT = LoweringOptions(strategy="recurrent")
pytestmark = [pytest.mark.vulkan, pytest.mark.xdist_group("vulkan")]
RULES = [
    Shape("linear"), Shape("gated"), Shape("gated", "key"), Shape("delta", beta="shared"), Shape("gated_delta"),
    Shape("gated_delta", "key"),
]  # fmt: skip


def name_of(shape: Any) -> str:
    return f"{shape.rule}-{shape.decay}" if isinstance(shape, Shape) else str(shape)


def run_fused(shape: Shape, inputs: list[np.ndarray | None], **options: Any) -> list[np.ndarray]:
    return run("LinearAttention", inputs, target="vulkan", options=FUSED, **options, **shape.attributes)


def expected(shape: Shape, inputs: list[np.ndarray | None]) -> tuple[np.ndarray, np.ndarray]:
    return reference(*inputs, q_num_heads=shape.q_heads, kv_num_heads=shape.kv_heads)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", RULES, ids=name_of)
def test_rules_on_any_data(shape: Shape) -> None:
    for seed, (batch, tokens) in enumerate([(1, 1), (2, 2), (1, 5), (3, 33)]):
        inputs = linear_attention(shape, batch, tokens, seed=seed)
        check(run_fused(shape, inputs), expected(shape, inputs))
    for data in DATA:  # -inf, positive and extreme decays among them
        inputs = linear_attention(shape, 1, 40, name=data)
        check(run_fused(shape, inputs), expected(shape, inputs), hard=data in HARD_DATA)


def test_no_worse_than_the_f32_recurrence() -> None:
    shape = Shape("gated_delta", dk=64, dv=32)
    for data in ("silu", "near"):
        inputs = linear_attention(shape, 1, 200, name=data)
        want = expected(shape, inputs)
        recurrent = run("LinearAttention", inputs, target="cpu", options=RECURRENT, **shape.attributes)
        for ours, theirs, right in zip(run_fused(shape, inputs), recurrent, want, strict=True):
            assert error(ours, right) <= 2 * max(error(theirs, right), 1e-7)


@pytest.mark.parametrize("tokens", [64, 63])
def test_sums_in_memory_take_turns(tokens: int) -> None:
    """Sums of neighbouring blocks do not share memory: on an H200 outputs of some odd tokens were others' sums."""
    shape = Shape("gated", q_heads=16, k_heads=16, kv_heads=16, dk=32, dv=16)
    inputs = linear_attention(shape, 8, tokens)
    check(run_fused(shape, inputs), expected(shape, inputs))


@pytest.mark.parametrize("heads", [(4, 1, 1), (4, 1, 2), (2, 1, 4)], ids=str)
def test_heads(heads: tuple[int, int, int]) -> None:
    q_heads, k_heads, kv_heads = heads
    shape = Shape(q_heads=q_heads, k_heads=k_heads, kv_heads=kv_heads, dk=32, dv=16)
    inputs = linear_attention(shape, 2, 9)
    check(run_fused(shape, inputs, domain=MICROSOFT), expected(shape, inputs))


@pytest.mark.parametrize("sizes", [(128, 128), (80, 96), (256, 24), (6, 10)], ids=str)
def test_head_sizes(sizes: tuple[int, int]) -> None:
    shape = Shape("gated_delta", q_heads=2, dk=sizes[0], dv=sizes[1])
    inputs = linear_attention(shape, 1, 7)
    check(run_fused(shape, inputs), expected(shape, inputs))


@pytest.mark.parametrize(
    ("dtype", "state_dtype"), [(np.float16, None), (ml_dtypes.bfloat16, np.float32), (np.float32, np.float16)]
)
def test_16_bit(dtype: Any, state_dtype: Any) -> None:
    shape = Shape(dk=32)
    for tokens in (1, 20):
        inputs = linear_attention(shape, 2, tokens, dtype=dtype, state_dtype=state_dtype)
        got = run_fused(shape, inputs)
        assert [x.dtype for x in got] == [dtype, state_dtype or dtype]
        check(got, expected(shape, inputs))


def test_static_sizes_and_no_past_state() -> None:
    shape = Shape()
    for tokens in (0, 1, 6):
        inputs = linear_attention(shape, 2, tokens, past=False)
        check(run_fused(shape, inputs, open_dims=False), expected(shape, inputs))


@pytest.mark.parametrize("open_dims", [True, False])
def test_more_states_than_workgroups_along_y(open_dims: bool) -> None:
    shape = Shape("gated", q_heads=1, k_heads=1, kv_heads=1, dk=4, dv=4)
    inputs = linear_attention(shape, 70_000, 1)
    check(run_fused(shape, inputs, open_dims=open_dims), expected(shape, inputs))


def test_split_is_whole() -> None:
    shape = Shape("gated_delta", "key")
    inputs = linear_attention(shape, 1, 12)
    whole, last = run_fused(shape, inputs)
    outputs, state = [], inputs[3]
    for start, stop in ((0, 1), (1, 3), (3, 12)):
        part = [x if i == 3 or x is None else x[:, start:stop] for i, x in enumerate(inputs)]
        part[3] = state
        output, state = run_fused(shape, part)
        outputs.append(output)
    assert error(np.concatenate(outputs, axis=1), whole.astype(np.float64)) < 1e-6
    assert error(state, last.astype(np.float64)) < 1e-6  # type: ignore[arg-type]


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_causal_conv(taps: int, dtype: Any) -> None:
    for batch, tokens in ((1, 1), (2, 2), (1, 3), (2, 65)):
        inputs = causal_conv(batch, 6, tokens, taps, dtype=dtype)
        got = run("CausalConvWithState", inputs, target="vulkan", options=FUSED, activation="silu")
        check(got, conv_reference(*inputs, activation="silu"))  # type: ignore[arg-type]
        np.testing.assert_array_equal(got[1].astype(np.float64), conv_reference(*inputs)[1])  # type: ignore[arg-type]


@pytest.mark.parametrize(("dilation", "channels_last", "past"), [(3, 0, False), (1, 1, True), (2, 1, True)])
def test_causal_conv_layouts(dilation: int, channels_last: int, past: bool) -> None:
    x, weight, bias, _ = causal_conv(2, 6, 5, 4)
    state = causal_conv(2, 6, 0, 3 * dilation + 1)[3] if past else None
    if channels_last:
        x, state = (a.transpose(0, 2, 1).reshape(2, a.shape[2], 3, 2) if a is not None else a for a in (x, state))  # type: ignore[union-attr]
    attributes = {"dilation": dilation, "channels_last": channels_last}
    inputs = [x, weight, bias, state]
    got = run(
        "CausalConvWithState", inputs, target="vulkan", domain=MICROSOFT, open_dims=False, options=FUSED, **attributes
    )
    check(got, conv_reference(*inputs, dilation=dilation, channels_last=bool(channels_last)))  # type: ignore[arg-type]
