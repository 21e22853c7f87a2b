"""The CPU kernels of both state operators against the float64 references."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from data import DATA, HARD_DATA, Shape, causal_conv, linear_attention
from harness import WIDTHS
from linattn.dialect_patterns.causal_conv.reference import reference as conv_reference
from linattn.dialect_patterns.linear_attention.reference import reference
from linattn.dialect_patterns.op import MICROSOFT, LoweringOptions
from state_ops import Call, run, run_all
from tolerances import check

FUSED = LoweringOptions(strategy="fused_simd")
RULES = [replace(shape, dv=32) for shape in (
    Shape("linear"), Shape("gated"), Shape("gated", "key"), Shape("delta", beta="shared"), Shape("gated_delta"),
    Shape("gated_delta", "key"), Shape("gated_delta", "key", q_heads=2), Shape("delta", q_heads=2),
    Shape("gated", q_heads=2),
)]  # fmt: skip
SIZES = [
    (32, 32),
    (64, 64),
    (80, 80),
    (96, 96),
    (128, 128),
    (192, 192),
    (256, 256),
    (128, 64),
    (20, 48),
    (24, 8),
    (4, 4),
]
EDGES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 130)


def name_of(value: Any) -> str:
    if isinstance(value, Shape):
        return f"{value.rule}-{value.decay}-{value.q_heads}q{value.k_heads}k{value.kv_heads}kv"
    return getattr(value, "__name__", str(value))


def expected(shape: Shape, inputs: list[np.ndarray | None], **attributes: Any) -> tuple[np.ndarray, np.ndarray]:
    return reference(*inputs, q_num_heads=shape.q_heads, kv_num_heads=shape.kv_heads, **attributes)  # type: ignore[arg-type]


def run_shape(shape: Shape, inputs: list[np.ndarray | None], **options: Any) -> list[np.ndarray]:
    return run("LinearAttention", inputs, **{"options": FUSED, **options}, **shape.attributes)


@pytest.mark.parametrize("shape", RULES, ids=name_of)
def test_tokens(shape: Shape) -> None:
    for tokens in EDGES:
        inputs = linear_attention(shape, 1 + tokens % 2, tokens, seed=tokens)
        check(run_shape(shape, inputs), expected(shape, inputs))


@pytest.mark.parametrize("shape", [RULES[2], RULES[4], RULES[6]], ids=name_of)
@pytest.mark.parametrize("tokens", [1, 4, 6, 23])
def test_static_tokens(shape: Shape, tokens: int) -> None:
    inputs = linear_attention(shape, 2, tokens)
    check(run_shape(shape, inputs, open_dims=False), expected(shape, inputs))


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("shape", RULES, ids=name_of)
def test_adversarial_data(shape: Shape, data: str) -> None:
    for tokens in (1, 40, 301):
        inputs = linear_attention(shape, 1, tokens, name=data)
        check(run_shape(shape, inputs), expected(shape, inputs), hard=data in HARD_DATA)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_head_sizes(size: tuple[int, int]) -> None:
    shape = Shape("gated_delta", "key" if size[0] % 3 == 2 else "head", q_heads=2, dk=size[0], dv=size[1])
    inputs = linear_attention(shape, 1, 27)
    check(run_shape(shape, inputs), expected(shape, inputs))


@pytest.mark.parametrize("heads", [(1, 1, 1), (8, 1, 1), (4, 4, 4), (4, 1, 2), (2, 2, 4), (2, 1, 4), (1, 4, 4)])
def test_com_microsoft_heads(heads: tuple[int, int, int]) -> None:
    shape = Shape(q_heads=heads[0], k_heads=heads[1], kv_heads=heads[2])
    inputs = linear_attention(shape, 2, 22)
    check(run_shape(shape, inputs, domain=MICROSOFT), expected(shape, inputs))


@pytest.mark.parametrize("q_heads", [16, 32])
def test_several_panels_of_a_workgroup(q_heads: int) -> None:
    shape = Shape(q_heads=q_heads, k_heads=16, kv_heads=16, dv=64)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        inputs = linear_attention(shape, 2, 37, dtype=dtype)
        check(run_shape(shape, inputs), expected(shape, inputs))


@pytest.mark.parametrize("target", WIDTHS)
def test_widths(target: str) -> None:
    """Heads that vectors of 16, of 8 or only of 4 divide, gates of each kind, both kernels."""
    shapes = [
        Shape(q_heads=2, dk=64, dv=64), Shape("gated_delta", "key", dk=20, dv=8), Shape("delta", dk=24, dv=4),
    ]  # fmt: skip
    for tokens in (39, 2):
        calls = [Call(linear_attention(shape, 1, tokens), shape.attributes) for shape in shapes]
        got = run_all("LinearAttention", calls, target=target, open_dims=False, options=FUSED)
        for shape, call, result in zip(shapes, calls, got, strict=True):
            check(result, expected(shape, call.inputs))


@pytest.mark.parametrize("target", WIDTHS)
def test_causal_conv_widths(target: str) -> None:
    """Vectors of tokens, or for one token of channels: 8, 12 and 40 of these, T around 4, 8 and 16."""
    cases = [(channels, 1, taps) for channels in (8, 12, 40) for taps in (2, 4)]
    cases += [(6, tokens, 4) for tokens in (3, 7, 16, 17, 40, 67)]
    calls = [Call(causal_conv(2, channels, tokens, taps), {"activation": "silu"}) for channels, tokens, taps in cases]
    got = run_all("CausalConvWithState", calls, target=target, open_dims=False, options=FUSED)
    for call, result in zip(calls, got, strict=True):
        check(result, conv_reference(*call.inputs, activation="silu"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "dtype", "state_dtype"),  # each pair of two of them
    [
        (RULES[4], np.float16, np.float32),
        (RULES[4], ml_dtypes.bfloat16, None),
        (RULES[6], np.float16, None),
        (RULES[6], ml_dtypes.bfloat16, np.float32),
    ],
    ids=name_of,
)
def test_16_bit(shape: Shape, dtype: Any, state_dtype: Any) -> None:
    for tokens, open_dims in ((1, True), (1, False), (50, True)):
        inputs = linear_attention(shape, 2, tokens, dtype=dtype, state_dtype=state_dtype)
        got = run_shape(shape, inputs, open_dims=open_dims)
        assert [x.dtype for x in got] == [dtype, state_dtype or dtype]
        check(got, expected(shape, inputs))


def test_16_bit_state_of_f32_activations() -> None:
    shape = Shape()
    inputs = linear_attention(shape, 1, 9, state_dtype=np.float16)
    check(run_shape(shape, inputs), expected(shape, inputs))


def test_no_past_state_and_a_scale() -> None:
    shape = Shape()
    for tokens, open_dims in ((1, False), (20, True)):
        inputs = linear_attention(shape, 2, tokens, past=False)
        check(run_shape(shape, inputs, open_dims=open_dims, scale=0.5), expected(shape, inputs, scale=0.5))


@pytest.mark.parametrize("shape", RULES, ids=name_of)
def test_split_prefill_is_one_prefill_is_decoding(shape: Shape) -> None:
    tokens = 37
    inputs = linear_attention(shape, 2, tokens, seed=3)
    whole = run_shape(shape, inputs)

    def in_pieces(sizes: list[int], **options: Any) -> list[np.ndarray]:
        state, outputs, start = inputs[3], [], 0
        for size in sizes:
            piece = [x if x is None or i == 3 else x[:, start : start + size] for i, x in enumerate(inputs)]
            output, state = run_shape(shape, [*piece[:3], state, *piece[4:]], **options)
            outputs.append(output)
            start += size
        assert start == tokens
        return [np.concatenate(outputs, axis=1), state]  # type: ignore[list-item]

    check(in_pieces([16, 20, 1]), tuple(whole))
    check(in_pieces([3, 0, 34]), tuple(whole))
    check(in_pieces([1] * tokens, open_dims=False), tuple(whole))


@pytest.mark.parametrize("shape", [s for s in RULES if "gated" in s.rule], ids=name_of)
def test_a_reset_is_a_fresh_start(shape: Shape) -> None:
    for tokens in (1, 20):
        inputs = linear_attention(shape, 1, tokens)
        decay = np.array(inputs[4])
        decay[:, 0] = -np.inf
        old = run_shape(shape, [*inputs[:4], decay, inputs[5]])
        fresh = run_shape(shape, [*inputs[:3], np.zeros_like(inputs[3]), decay, inputs[5]])
        for a, b in zip(old, fresh, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("decay", ["head", "key"])
def test_growth_of_an_empty_state(decay: str) -> None:
    shape = Shape("gated_delta", decay)
    inputs = linear_attention(shape, 1, 12, past=False)
    inputs[4] = np.full_like(inputs[4], 50.0)
    inputs[1][:, :11] = 0.0  # type: ignore[index]
    check(run_shape(shape, inputs), expected(shape, inputs))


def test_growth_that_only_short_chunks_stand() -> None:
    shape = Shape(dv=32)
    inputs = linear_attention(shape, 1, 48, past=False)
    decay = np.array(inputs[4])
    decay[:, 16:32] = 7.0  # e^112 over 16 tokens, e^28 over 4
    inputs[4] = decay
    inputs[1][:, :31] = 0.0  # type: ignore[index]
    check(run_shape(shape, inputs), expected(shape, inputs))


def test_many_workgroups() -> None:
    shape = Shape("gated_delta", q_heads=64, k_heads=64, kv_heads=64, dk=4, dv=4)
    inputs = linear_attention(shape, 1100, 1)
    assert 1100 * shape.kv_heads > 65_535
    check(run_shape(shape, inputs), expected(shape, inputs))


@pytest.mark.parametrize("shape", [RULES[3], RULES[4], RULES[6]], ids=name_of)
def test_no_worse_than_the_recurrence_in_f32(shape: Shape) -> None:
    for data in ("random", "silu", "near", "steps", "reset"):
        inputs = linear_attention(shape, 1, 500, name=data)
        want = expected(shape, inputs)
        plain = run_shape(shape, inputs, options=LoweringOptions(strategy="recurrent"))
        for one, other, exact in zip(run_shape(shape, inputs), plain, want, strict=True):
            ours, theirs = np.linalg.norm(one - exact), np.linalg.norm(other - exact)
            assert ours <= 2 * theirs, f"{data}: {ours / theirs:.2f} times the error of the f32 recurrence"


@pytest.mark.parametrize(("taps", "dilation"), [(4, 1), (2, 1), (3, 5), (9, 1)])
@pytest.mark.parametrize("parts", ["bias", "past", "both"])
def test_causal_conv(taps: int, dilation: int, parts: str) -> None:
    for tokens in (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 25, 64, 67):
        for open_dims in (True, False):
            if not open_dims and (parts != "both" or tokens not in (1, 2, 8)):
                continue
            inputs = causal_conv(2, 48, tokens, (taps - 1) * dilation + 1, bias=parts != "past", past=parts != "bias")
            inputs[1] = inputs[1][:, :, :taps].copy()  # type: ignore[index]
            options: dict[str, Any] = {"activation": "silu" if parts == "both" else "none", "dilation": dilation}
            got = run("CausalConvWithState", inputs, domain=MICROSOFT, open_dims=open_dims, options=FUSED, **options)
            check(got, conv_reference(*inputs, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=name_of)
def test_causal_conv_16_bit(dtype: Any) -> None:
    for tokens, open_dims in ((1, False), (1, True), (40, True), (64, False)):
        inputs = causal_conv(2, 32, tokens, 4, dtype=dtype)
        got = run("CausalConvWithState", inputs, open_dims=open_dims, options=FUSED, activation="silu")
        check(got, conv_reference(*inputs, activation="silu"))  # type: ignore[arg-type]
        exact = np.concatenate([inputs[3], inputs[0]], axis=2)[:, :, -3:]  # type: ignore[list-item]
        np.testing.assert_array_equal(got[1].astype(np.float32), exact.astype(np.float32))
