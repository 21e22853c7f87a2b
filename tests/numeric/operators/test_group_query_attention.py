"""GroupQueryAttention against ONNX Runtime on the CPU, with a growing past and with a cache of fixed capacity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from attention_runs import CapacityRun, capacity_module, error, run_open, stream_ir, to_device, to_host
from harness import node_for, spec
from linattn.dialect_patterns.attention import group_query as group_query_attention
from linattn.dialect_patterns.node import TensorSpec
from linattn.runtime.errors import UnsupportedModelError
from onnx_runtime import run_onnx_runtime

from tests.tolerances import BENIGN as TOLERANCE

HQ, HKV, D = 4, 2, 16
COUNTS = {"num_heads": HQ, "kv_num_heads": HKV}
OP = {"domain": "com.microsoft", "version": 1, "num_outputs": 3}
Inputs = list[np.ndarray | None]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def inputs_for(tokens: int, past: int, lengths: Sequence[int], packed: bool = False) -> Inputs:
    """``lengths``: how many of the past's rows are valid in each row of the batch."""
    batch = len(lengths)
    new: Inputs = [normal(batch, tokens, n * D) for n in (HQ, HKV, HKV)]
    if packed:
        new = [np.concatenate(new, -1), None, None]
    last = np.array([n + tokens - 1 for n in lengths], np.int32)
    caches = [normal(batch, HKV, past, D), normal(batch, HKV, past, D) * 2]
    return [*new, *caches, last, np.array(past + tokens, np.int32)]


def rotary(inputs: Inputs, columns: int = D // 2) -> Inputs:
    angles = np.arange(32)[:, None] * 0.7 ** np.arange(columns)
    return [*inputs, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)]


def ids(inputs: Inputs, position_ids: list[list[int]]) -> Inputs:
    return [*inputs, np.array(position_ids)]


def bias(inputs: Inputs, batch: int, heads: int) -> Inputs:
    return [*inputs, None, None, None, normal(batch, heads, inputs[0].shape[1], int(inputs[6]))]


def norms(inputs: Inputs) -> Inputs:
    """With weights for the norm of each head of queries and keys, as inputs 14 and 15."""
    return [*inputs, *[None] * (14 - len(inputs)), normal(D) + 1, normal(D) / 2 + 1]


def sinks(inputs: Inputs) -> Inputs:
    """With head_sink as input 11."""
    return [*inputs, *[None] * (11 - len(inputs)), normal(HQ) * 3]


def scalar_length(inputs: Inputs) -> Inputs:
    inputs[5] = inputs[5].reshape(())
    return inputs


CASES: dict[str, tuple[Inputs, dict[str, Any]]] = {
    "prompt": (inputs_for(5, 0, [0, 0]), {}),
    "decode": (inputs_for(1, 7, [7]), {"scale": 0.3}),
    "decode-ragged": (inputs_for(1, 7, [7, 0, 3]), {}),
    "chunk": (inputs_for(5, 7, [7]), {"softcap": 2.0}),
    "chunk-shorter": (inputs_for(3, 7, [4]), {}),
    "scalar-length": (scalar_length(inputs_for(3, 7, [7])), {"do_rotary": 0}),
    "window": (inputs_for(5, 7, [7]), {"local_window_size": 3}),
    "packed-rotary": (rotary(inputs_for(1, 7, [7, 4], packed=True)), {"do_rotary": 1}),
    "rotary-interleaved": (rotary(inputs_for(3, 7, [7])), {"do_rotary": 1, "rotary_interleaved": 1}),
    "rotary-ids": (ids(rotary(inputs_for(3, 7, [7])), [[9, 10, 12]]), {"do_rotary": 1}),
    "norms": (norms(inputs_for(3, 7, [7])), {}),
    "packed-norms-rotary": (
        norms(rotary(inputs_for(1, 7, [7, 4], packed=True))),
        {"do_rotary": 1, "qk_norm_epsilon": 0.1, "rotary_embedding_dim": D},
    ),
    "bias": (bias(inputs_for(1, 7, [7, 7]), 1, HQ), {}),
    "sinks": (sinks(inputs_for(5, 7, [7])), {"softcap": 2.0, "local_window_size": 4, "smooth_softmax": 0}),
    "sinks-bias": (sinks(bias(inputs_for(2, 3, [3]), 1, HQ)), {}),
    "smooth": (inputs_for(1, 7, [7, 0, 3]), {"smooth_softmax": 1}),
}


def normed(inputs: Inputs, epsilon: float) -> Inputs:
    """The inputs of the same attention without norms: every head of queries and keys is normalised already."""
    packed, (q_weight, k_weight) = inputs[1] is None, inputs[14:]

    def norm(x: np.ndarray, heads: int, weight: np.ndarray) -> np.ndarray:
        by_head = x.reshape(*x.shape[:2], heads, D).astype(np.float64)
        scaled = by_head / np.sqrt((by_head**2).mean(-1, keepdims=True) + epsilon) * weight
        return scaled.reshape(x.shape).astype(np.float32)

    if not packed:
        return [norm(inputs[0], HQ, q_weight), norm(inputs[1], HKV, k_weight), *inputs[2:14]]
    q, k, v = np.split(inputs[0], [HQ * D, (HQ + HKV) * D], axis=-1)
    return [np.concatenate([norm(q, HQ, q_weight), norm(k, HKV, k_weight), v], -1), *inputs[1:14]]


def reference(inputs: Inputs, attributes: dict[str, Any]) -> list[np.ndarray]:
    inputs = [*inputs[:5], np.atleast_1d(inputs[5]), *inputs[6:]]  # ONNX Runtime 1.32 takes no scalar here
    # What mobius writes and ONNX Runtime does not know; a buffer that it would make too small to compare.
    attributes = {n: a for n, a in attributes.items() if n not in ("rotary_embedding_dim", "sliding_window_cache")}
    if len(inputs) > 14:  # its CPU kernel has no norms either: they come before it, in numpy
        inputs, attributes = (
            normed(inputs, attributes.get("qk_norm_epsilon", 1e-6)),
            {**attributes, "qk_norm_epsilon": 0.0},
        )
    return run_onnx_runtime("GroupQueryAttention", inputs, {**COUNTS, **attributes}, **OP)


@pytest.mark.parametrize("case", CASES)
def test_against_onnx_runtime(case):
    inputs, attributes = CASES[case]
    got = run_open("GroupQueryAttention", inputs, {**COUNTS, **attributes}, **OP)
    for g, w in zip(got, reference(inputs, attributes), strict=True):
        assert error(g, w) < TOLERANCE["float32"]


def test_padded_prompt():
    """Rows of a prompt may end early; what they give beyond their end is unspecified."""
    inputs = inputs_for(5, 0, [0, 0])
    inputs[5] = np.array([4, 2], np.int32)
    got, want = run_open("GroupQueryAttention", inputs, COUNTS, **OP), reference(inputs, {})
    assert error(got[0][0], want[0][0]) < TOLERANCE["float32"]
    assert error(got[0][1, :3], want[0][1, :3]) < TOLERANCE["float32"]
    assert error(got[1][1, :, :3], want[1][1, :, :3]) == 0


@pytest.mark.parametrize("case", ["chunk", "sinks"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_types(dtype, case):
    inputs, attributes = CASES[case]
    floats = [a is not None and a.dtype == np.float32 for a in inputs]
    inputs = [a.astype(dtype) if f else a for a, f in zip(inputs, floats, strict=True)]
    wide = [a.astype(np.float32) if f else a for a, f in zip(inputs, floats, strict=True)]
    got = run_open("GroupQueryAttention", inputs, {**COUNTS, **attributes}, **OP)
    for g, w in zip(got, reference(wide, attributes), strict=True):
        assert g.dtype == dtype
        assert error(g, w) < TOLERANCE[np.dtype(dtype).name]


@pytest.mark.parametrize(
    ("case", "dtype"), [("prompt", np.float32), ("decode-ragged", np.float32), ("decode-ragged", np.float16)]
)
def test_open_dimensions(case, dtype):
    floats = [a is not None and a.dtype == np.float32 for a in CASES[case][0]]
    inputs = [a.astype(dtype) if f else a for a, f in zip(CASES[case][0], floats, strict=True)]
    wide = [a.astype(np.float32) if f else a for a, f in zip(inputs, floats, strict=True)]
    axes = {0: (0, 1), 1: (0, 1, 2), 2: (0, 1, 2), 3: (0, 1, 2, 3), 4: (0, 1, 2, 3), 5: (0,)}  # all but a query's size
    got = run_open("GroupQueryAttention", inputs, COUNTS, axes, **OP)
    for g, w in zip(got, reference(wide, {}), strict=True):
        assert error(g, w) < TOLERANCE[np.dtype(dtype).name]


@pytest.mark.vulkan
@pytest.mark.parametrize("case", ["decode-ragged", "rotary-interleaved", "packed-norms-rotary", "sinks", "smooth"])
def test_on_vulkan(case):
    inputs, attributes = CASES[case]
    got = run_open("GroupQueryAttention", inputs, {**COUNTS, **attributes}, target="vulkan", **OP)
    for g, w in zip(got, reference(inputs, attributes), strict=True):
        assert error(g, w) < TOLERANCE["float32"]


# ---- a cache of fixed capacity ----
B, M = 2, 16
SHAPES = (B, HKV, M, D)


def outputs_for(tokens: int) -> list[TensorSpec]:
    return [TensorSpec(shape, "f32") for shape in ((B, tokens, HQ * D), SHAPES, SHAPES)]


def check_capacity(attributes: dict[str, Any], target: str, with_sinks: bool = False) -> None:
    """Steps equal ONNX Runtime on the whole sequence; the caller's buffers hold the keys and values."""
    steps = (5, 5, 1, 1) if target == "cpu" else (5, 1, 1)
    whole = inputs_for(sum(steps), 0, [0, 0])
    if attributes.get("do_rotary"):
        whole = rotary(whole)
    if with_sinks:
        whole = sinks(whole)
    want = reference(whole, attributes)
    stale = [np.full(SHAPES, 3, np.float32), np.full(SHAPES, 2, np.float32)]  # what an earlier sequence left behind
    caches, position = [to_device(a, target) for a in stale], 0
    runs: dict[int, CapacityRun] = {}
    for tokens in steps:
        part = slice(position, position + tokens)
        last = np.full(B, position + tokens - 1, np.int32)
        inputs = [*(a[:, part] for a in whole[:3]), *stale, last, np.array(M, np.int32), *whole[7:]]
        if tokens not in runs:
            runs[tokens] = CapacityRun("GroupQueryAttention", "com.microsoft", 1, inputs, outputs_for(tokens),
                                       {**COUNTS, **attributes}, (3, 4), target)  # fmt: skip
        got = runs[tokens].step(inputs, caches, position)
        position += tokens
        assert error(got, want[0][:, part]) < TOLERANCE["float32"]
        for cache, rows, before in zip(caches, want[1:], stale, strict=True):
            host = to_host(cache, target, np.dtype(np.float32))
            assert error(host[:, :, :position], rows[:, :, :position]) < TOLERANCE["float32"]
            np.testing.assert_array_equal(host[:, :, position:], before[:, :, position:])


SINKS = {"softcap": 3.0, "local_window_size": 4, "sliding_window_cache": 1}


@pytest.mark.parametrize(
    ("attributes", "with_sinks"), [({}, False), ({"do_rotary": 1, "local_window_size": 4}, False), (SINKS, True)]
)
def test_capacity(attributes, with_sinks):
    check_capacity(attributes, "cpu", with_sinks)


@pytest.mark.vulkan
@pytest.mark.parametrize(("target", "with_sinks"), [("vulkan", False), ("lavapipe", True)])
def test_capacity_on_vulkan(target, with_sinks):
    check_capacity(SINKS if with_sinks else {}, target, with_sinks)


@pytest.mark.parametrize("target", ["cpu", "vulkan"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_capacity_copies_no_cache(target, tokens):
    inputs = inputs_for(tokens, M, [0, 0])
    text = capacity_module("GroupQueryAttention", "com.microsoft", 1, [spec(a) for a in inputs], outputs_for(tokens),
                           COUNTS, (3, 4))  # fmt: skip
    compiled = stream_ir(text, target)
    assert "stream.cmd.dispatch" in compiled
    assert "stream.cmd.copy" not in compiled


# ---- checks ----
def refused(inputs: Inputs, attributes: dict[str, Any], outputs: int = 3) -> str:
    specs = [spec(a) for a in inputs]
    node = node_for("com.microsoft", "GroupQueryAttention", 1, specs, {**COUNTS, **attributes}, outputs)
    with pytest.raises(UnsupportedModelError) as caught:
        group_query_attention.parse(node)
    message = str(caught.value)
    assert "\n" not in message
    assert "GroupQueryAttention" in message
    return message


def test_refusals():
    decode = CASES["decode"][0]
    assert "num_heads" in refused(decode, {"num_heads": 3})
    assert "query" in refused(decode, {"num_heads": 6, "kv_num_heads": 3})
    assert "k_quant_type" in refused(decode, {"k_quant_type": "PER_TENSOR"})
    assert "surprise" in refused(decode, {"surprise": 1})
    assert "head_sink" in refused([*decode, *[None] * 4, normal(HQ + 1)], {})
    assert "rotary_embedding_dim" in refused(rotary(decode), {"do_rotary": 1, "rotary_embedding_dim": 8})
    assert "'q_norm_weight' alone" in refused([*decode, *[None] * 7, normal(D)], {})
    assert "k_norm_weight" in refused([*decode, *[None] * 7, normal(D), normal(D + 1)], {})
    assert "query_seqlens" in refused([*decode, *[None] * 9, decode[5]], {})
    assert "output_qk" in refused(decode, {}, outputs=4)
    assert "past_value" in refused([*decode[:4], None, *decode[5:]], {})
    assert "seqlens_k" in refused([*decode[:5], None, decode[6]], {})
    assert "past_key" in refused([*decode[:3], normal(1, HKV, 7, D + 1), *decode[4:]], {})
    assert "'key'" in refused([decode[0], normal(1, 2, HKV * D), *decode[2:]], {})
    assert "cos_cache" in refused(decode, {"do_rotary": 1})
    assert "attention_bias" in refused(bias(decode, 2, HQ), {})
    assert "type" in refused([a.astype(np.int32) for a in decode], {})
    with pytest.raises(UnsupportedModelError, match=r"sliding_window_cache.*--max-context N"):
        run_open("GroupQueryAttention", decode, {**COUNTS, "sliding_window_cache": 1, "local_window_size": 4}, **OP)
