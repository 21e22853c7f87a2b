"""CausalConvWithState through its pattern and IREE, against float64 and ONNX Runtime."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from data import causal_conv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linattn.dialect_patterns.causal_conv.reference import reference
from linattn.dialect_patterns.op import MICROSOFT
from onnx_runtime import run_onnx_runtime
from state_ops import run
from tolerances import check

OP = "CausalConvWithState"


@pytest.mark.parametrize("activation", ["none", "silu", "swish"])
@pytest.mark.parametrize("taps", [1, 2, 4, 9])
def test_kernels_and_activations(taps: int, activation: str) -> None:
    for tokens in (1, 2, 3, 5, 64):
        inputs = causal_conv(2, 6, tokens, taps)
        got = run(OP, inputs, activation=activation)
        check(got, reference(*inputs, activation=activation))
        np.testing.assert_array_equal(got[1], reference(*inputs)[1])  # the state is copied, never rounded


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("open_dims", [False, True])
def test_no_tokens(taps: int, open_dims: bool) -> None:
    inputs = causal_conv(2, 6, 0, taps)
    output, state = run(OP, inputs, open_dims=open_dims)
    assert output.shape == (2, 6, 0)
    np.testing.assert_array_equal(state, inputs[3])


@pytest.mark.parametrize(("bias", "past"), [(False, True), (True, False), (False, False)])
@pytest.mark.parametrize("tokens", [1, 7])
def test_optional_inputs_against_onnx_runtime(bias: bool, past: bool, tokens: int) -> None:
    inputs = causal_conv(2, 6, tokens, 4, bias=bias, past=past)
    got = run(OP, inputs, domain=MICROSOFT, open_dims=False, activation="silu")
    want = run_onnx_runtime(OP, inputs, {"activation": "silu"}, domain=MICROSOFT, version=1, num_outputs=2)
    check(got, tuple(want))


@pytest.mark.parametrize(("dilation", "channels_last"), [(3, 0), (1, 1), (2, 1)])
def test_com_microsoft_layouts_against_onnx_runtime(dilation: int, channels_last: int) -> None:
    x, weight, bias, _ = causal_conv(2, 6, 5, 4)
    past = causal_conv(2, 6, 0, 3 * dilation + 1)[3]
    if channels_last:
        x, past = (a.transpose(0, 2, 1).reshape(2, a.shape[2], 3, 2) for a in (x, past))  # type: ignore[union-attr]
    attributes = {"dilation": dilation, "channels_last": channels_last}
    inputs = [x, weight, bias, past]
    want = run_onnx_runtime(OP, inputs, attributes, domain=MICROSOFT, version=1, num_outputs=2)
    check(run(OP, inputs, domain=MICROSOFT, open_dims=False, **attributes), tuple(want))
    check(want, reference(*inputs, dilation=dilation, channels_last=bool(channels_last)))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit(dtype: Any) -> None:
    for tokens in (1, 2, 10):
        inputs = causal_conv(1, 6, tokens, 4, dtype=dtype)
        check(run(OP, inputs, activation="silu"), reference(*inputs, activation="silu"))


def test_split_is_whole() -> None:
    inputs = causal_conv(1, 6, 11, 4)
    x, weight, bias, state = inputs
    whole, last = run(OP, inputs, activation="silu")
    outputs, start = [], 0
    for size in (1, 1, 2, 0, 7):
        output, state = run(OP, [x[:, :, start : start + size], weight, bias, state], activation="silu")  # type: ignore[index]
        outputs.append(output)
        start += size
    np.testing.assert_array_equal(np.concatenate(outputs, axis=2), whole)
    np.testing.assert_array_equal(state, last)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(batch=st.integers(1, 3), tokens=st.integers(0, 40), seed=st.integers(0, 2**32 - 1), taps=st.sampled_from([2, 4]))
def test_any_call(batch: int, tokens: int, seed: int, taps: int) -> None:
    inputs = causal_conv(batch, 6, tokens, taps, seed=seed)
    check(run(OP, inputs, activation="silu"), reference(*inputs, activation="silu"))


@pytest.mark.vulkan
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_vulkan(dtype: Any) -> None:
    for tokens in (1, 2, 10):
        inputs = causal_conv(2, 6, tokens, 4, dtype=dtype)
        check(run(OP, inputs, target="vulkan", activation="silu"), reference(*inputs, activation="silu"))


@pytest.mark.vulkan
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_vulkan_empty_state(tokens: int) -> None:
    inputs = causal_conv(2, 6, tokens, 1)
    check(run(OP, inputs, target="vulkan", open_dims=False), reference(*inputs))
