"""Attention against the ONNX reference evaluator, with a growing past and with a cache of fixed capacity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from attention_runs import CapacityRun, capacity_module, error, run_open, stream_ir, to_device, to_host
from harness import TARGETS, lowered, node_for, opened, run_op, spec
from linattn.dialect_patterns.attention import op as attention
from linattn.dialect_patterns.node import TensorSpec
from linattn.runtime.errors import UnsupportedModelError
from onnx.reference.ops.op_attention import _compute_attention

from tests.tolerances import BENIGN as TOLERANCE

B, T, P, HQ, HKV, D, DV = 2, 5, 7, 4, 2, 16, 24
Inputs = list[np.ndarray | None]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def boolean(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).random(shape) > 0.3


def reference(inputs: Inputs, attributes: Mapping[str, Any]) -> list[np.ndarray]:
    """In f32, whatever the inputs' type."""

    def widen(a):
        return a.astype(np.float32) if a is not None and a.dtype.name in ("float16", "bfloat16") else a

    names = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
    arrays = {n: widen(a) for n, a in zip(names, inputs, strict=False)}
    mask, tokens = arrays.get("attn_mask"), inputs[0].shape[-2]
    if mask is not None and mask.shape[-2] == 1:  # ONNX 1.23.2 takes the causal mask's height from attn_mask
        arrays["attn_mask"] = np.repeat(mask, tokens, axis=-2)
    return list(_compute_attention(**arrays, **attributes, _validate_attention25=False))[:3]


def heads4(length: int = T, keys: int = T) -> Inputs:
    return [normal(B, HQ, length, D), normal(B, HKV, keys, D), normal(B, HKV, keys, DV)]


def flat3(length: int = T, keys: int = T) -> Inputs:
    return [normal(B, length, HQ * D), normal(B, keys, HKV * D), normal(B, keys, HKV * DV)]


def past(length: int = P) -> Inputs:
    return [normal(B, HKV, length, D), normal(B, HKV, length, DV)]


COUNTS = {"q_num_heads": HQ, "kv_num_heads": HKV}
HIDDEN_ROW = np.where(np.arange(8)[:, None] == 2, False, boolean(8, 8) | np.eye(8, dtype=bool))
CASES: dict[str, tuple[Inputs, dict[str, Any]]] = {
    "plain": (heads4(), {}),
    "flat-causal": (flat3(), {**COUNTS, "is_causal": 1}),
    "exported": (
        [*flat3(), boolean(B, 1, T, P + T), *past()],
        {**COUNTS, "is_causal": 1, "scale": 0.3, "softcap": 0.0},
    ),
    "decode": ([*flat3(1, 1), None, *past()], {**COUNTS, "is_causal": 1}),
    "mask-2d-float": ([*heads4(), normal(T, T)], {"softcap": 2.0}),
    "mask-3d-heads": ([*heads4(), boolean(HQ, 1, T)], {}),
    "mask-short": ([*heads4(), normal(1, HQ, T, 3)], {}),
    "mask-short-bool": ([*heads4(), boolean(B, HQ, T, 4)], {"is_causal": 1}),
    "mask-lowest": ([*heads4(), np.where(boolean(T, T), 0, np.finfo(np.float32).min).astype(np.float32)], {}),
    "hidden-row": ([*heads4(8, 8), HIDDEN_ROW], {"is_causal": 1}),
    "cross-causal": ([*heads4(3, 6), None, *past()], {"is_causal": 1}),
    "nonpad-behind": ([*heads4(4, 6), None, None, None, np.array([5, 2])], {"is_causal": 1}),
    "nonpad-mask": ([*heads4(2, 6), boolean(2, 6), None, None, np.array([6, 3])], {}),
}


@pytest.mark.parametrize("case", CASES)
def test_against_reference(case):
    inputs, attributes = CASES[case]
    got = run_op("Attention", inputs, attributes, num_outputs=3)
    for g, w in zip(got, reference(inputs, attributes), strict=True):
        assert error(g, w) < TOLERANCE["float32"]


def test_windows_of_opset_25():
    inputs, attributes = [*heads4(), None, *past()], {"left_window_size": 3, "right_window_size": 1}
    got = run_op("Attention", inputs, attributes, version=25, num_outputs=3)
    assert error(got[0], reference(inputs, attributes)[0]) < TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_types(dtype):
    inputs, attributes = CASES["exported"]
    inputs = [a.astype(dtype) if a is not None and a.dtype == np.float32 else a for a in inputs]
    got = run_open("Attention", inputs, attributes)
    for g, w in zip(got, reference(inputs, attributes), strict=True):
        assert g.dtype == dtype
        assert error(g, w) < TOLERANCE[np.dtype(dtype).name]


@pytest.mark.parametrize(("past_length", "mask"), [
    (P, boolean(B, 1, T, P + T)), (0, boolean(1, 1, T, T)), (P, boolean(T, P + T)), (P, normal(1, HQ, 1, P + T - 2)),
])  # fmt: skip
def test_open_dimensions(past_length, mask):
    inputs: Inputs = [*flat3(), mask, *past(past_length)]
    attributes = {**COUNTS, "is_causal": 1}
    axes = {0: (0, 1), 1: (0, 1), 2: (0, 1), 3: range(mask.ndim), 4: (0, 2), 5: (0, 2)}
    got = run_open("Attention", inputs, attributes, axes)
    for g, w in zip(got, reference(inputs, attributes), strict=True):
        assert error(g, w) < TOLERANCE["float32"]


@pytest.mark.vulkan
def test_open_keys_where_workgroups_are_few(monkeypatch):
    """IREE takes a workgroup for each result of a sum over open keys: some rows at a time then."""
    known = TARGETS["vulkan"]
    monkeypatch.setitem(TARGETS, "vulkan", replace(known, limits=replace(known.limits, counts=(100, 100, 100))))
    inputs: Inputs = [*heads4(), None, *past()]
    attributes = {"is_causal": 1}
    text = str(lowered("", "Attention", 24, [opened(spec(a), (2,) if i > 3 else ()) for i, a in enumerate(inputs)],
                       attributes, 3, "vulkan"))  # fmt: skip
    assert text.count("linalg.batch_matmul") > 2
    got = run_open("Attention", inputs, attributes, {4: (2,), 5: (2,)}, target="vulkan")
    for g, w in zip(got, reference(inputs, attributes), strict=True):
        assert error(g, w) < TOLERANCE["float32"]


@pytest.mark.vulkan
def test_bf16_on_vulkan():
    """In f32: IREE's own products in bf16 make no legal SPIR-V."""
    inputs, attributes = CASES["exported"]
    inputs = [a.astype(ml_dtypes.bfloat16) if a is not None and a.dtype == np.float32 else a for a in inputs]
    got = run_op("Attention", inputs, attributes, num_outputs=3, target="lavapipe")
    for g, w in zip(got, reference(inputs, attributes), strict=True):
        assert error(g, w) < TOLERANCE["bfloat16"]


@pytest.mark.vulkan
@pytest.mark.parametrize("case", ["exported", "nonpad-behind", "mask-short-bool", "hidden-row"])
def test_on_vulkan(case):
    inputs, attributes = CASES[case]
    got = run_op("Attention", inputs, attributes, num_outputs=3, target="vulkan")
    for g, w in zip(got, reference(inputs, attributes), strict=True):
        assert error(g, w) < TOLERANCE["float32"]


# ---- a cache of fixed capacity ----
M = 16


def capacity_mask(kind: str, tokens: int, position: int) -> np.ndarray | None:
    """Over M + T columns; some of the visible ones are switched off."""
    if kind == "none":
        return None
    columns = np.concatenate([np.arange(M) < position, np.ones(tokens, bool)])
    keep = columns & (boolean(B, 1, tokens, M + tokens) | (np.arange(M + tokens) >= M))
    return keep if kind == "bool" else np.where(keep, normal(B, 1, tokens, M + tokens), -np.inf).astype(np.float32)


def capacity_inputs(kind: str, tokens: int, position: int) -> Inputs:
    seeds = np.random.default_rng(position)
    new = [seeds.standard_normal((B, tokens, n)).astype(np.float32) for n in (HQ * D, HKV * D, HKV * DV)]
    return [*new, capacity_mask(kind, tokens, position), np.zeros((B, HKV, M, D), np.float32),
            np.zeros((B, HKV, M, DV), np.float32)]  # fmt: skip


def capacity_outputs(tokens: int) -> list[TensorSpec]:
    shapes = (B, tokens, HQ * DV), (B, HKV, M, D), (B, HKV, M, DV)
    return [TensorSpec(shape, "f32") for shape in shapes]


def check_capacity(kind: str, attributes: dict[str, Any], target: str, steps: Sequence[int]) -> None:
    """Steps equal the growing form; the caller's buffers hold the keys and values."""
    runs: dict[int, CapacityRun] = {}
    for t in set(steps):
        inputs, outputs = capacity_inputs(kind, t, 0), capacity_outputs(t)
        runs[t] = CapacityRun("Attention", "", 24, inputs, outputs, attributes, (4, 5), target)
    caches = [to_device(a, target) for a in capacity_inputs(kind, 1, 0)[4:]]
    keys, values, position = past(0)[0], past(0)[1], 0
    for tokens in steps:
        inputs = capacity_inputs(kind, tokens, position)
        got = runs[tokens].step(inputs, caches, position)
        mask = inputs[3]
        if mask is not None:
            mask = np.concatenate([mask[..., :position], mask[..., M:]], -1)
        want, keys, values = reference([*inputs[:3], mask, keys, values], attributes)
        position += tokens
        assert error(got, want) < TOLERANCE["float32"]
        for cache, rows in zip(caches, (keys, values), strict=True):
            host = to_host(cache, target, np.dtype(np.float32))
            np.testing.assert_array_equal(host[:, :, :position], rows)
            assert not host[:, :, position:].any()


@pytest.mark.parametrize(("kind", "causal"), [("none", 1), ("bool", 0), ("float", 1)])
def test_capacity(kind, causal):
    check_capacity(kind, {**COUNTS, "is_causal": causal}, "cpu", (3, 3, 1, 1))


@pytest.mark.vulkan
@pytest.mark.parametrize(("target", "kind"), [("vulkan", "bool"), ("lavapipe", "float")])
def test_capacity_on_vulkan(target, kind):
    # Baseline Vulkan reads bools by 32-bit words: a mask argument must be a multiple of 4 bytes long.
    check_capacity(kind, {**COUNTS, "is_causal": 1}, target, (4, 4, 2, 2))


def test_capacity_copies_no_cache():
    specs = [spec(a) for a in capacity_inputs("none", 1, 0)]
    text = capacity_module("Attention", "", 24, specs, capacity_outputs(1), {**COUNTS, "is_causal": 1}, (4, 5))
    for target in ("cpu", "vulkan"):
        compiled = stream_ir(text, target)
        assert "stream.cmd.dispatch" in compiled
        assert "stream.cmd.copy" not in compiled


# ---- checks ----
def refused(
    inputs: Sequence[np.ndarray | None], attributes: dict[str, Any], version: int = 24, outputs: int = 1
) -> str:
    node = node_for("", "Attention", version, [spec(a) for a in inputs], attributes, outputs)
    with pytest.raises(UnsupportedModelError) as caught:
        attention.parse(node)
    message = str(caught.value)
    assert "\n" not in message
    assert "Attention" in message
    return message


def test_refusals():
    assert "q_num_heads" in refused(flat3(), {})
    assert "heads" in refused(flat3(), {"q_num_heads": 3, "kv_num_heads": 2})
    assert "left_window_size" in refused(heads4(), {"left_window_size": 3})
    assert "nonpad_kv_seqlen" in refused([*heads4(), None, None, None, np.array([1, 2])], {}, version=23)
    assert "nonpad_kv_seqlen" in refused([*heads4(), None, *past(), np.array([1, 2])], {})
    assert "past_key" in refused([*heads4(), None, past()[0]], {})
    assert "qk_matmul_output" in refused(heads4(), {}, outputs=4)
    assert "softmax_precision" in refused(heads4(), {"softmax_precision": onnx.TensorProto.DOUBLE})
    assert "attn_mask" in refused([*heads4(), boolean(3, 1, T, T)], {})
    assert "attn_mask" in refused([*heads4(), boolean(T, T + 1)], {})
    assert "attn_mask" in refused([*heads4(), np.ones((T, T), np.int64)], {})
    assert "'Q'" in refused([a.astype(np.int32) for a in heads4()], {})
    assert "past_key" in refused(heads4(), {"linattn.capacity": 1})


def test_unused_qk_output_is_accepted():
    node = node_for("", "Attention", 24, [spec(a) for a in heads4()], {}, 4, used=(True, False, False, False))
    assert attention.output_types(attention.parse(node))[3] is None
