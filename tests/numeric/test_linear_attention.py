"""LinearAttention through its patterns and IREE, against the float64 recurrence, the ONNX reference and ORT."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from data import DATA, HARD_DATA, Shape, linear_attention
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linattn.dialect_patterns.linear_attention.reference import reference
from linattn.dialect_patterns.op import MICROSOFT, LoweringOptions
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx_runtime import run_onnx_runtime
from state_ops import run
from tolerances import check

CHUNKED = LoweringOptions(strategy="chunked", chunk_size=16)
RECURRENT = LoweringOptions(strategy="recurrent")
RULES = [
    Shape("linear"), Shape("gated"), Shape("gated", "key"), Shape("delta", beta="shared"), Shape("gated_delta"),
    Shape("gated_delta", "key"),
]  # fmt: skip
EDGES = (1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 130, 257)


def name_of(value: Any) -> str:
    if isinstance(value, Shape):
        return f"{value.rule}-{value.decay}-{value.q_heads}q{value.k_heads}k{value.kv_heads}kv"
    return value.strategy if isinstance(value, LoweringOptions) else getattr(value, "__name__", str(value))


def expected(shape: Shape, inputs: list[np.ndarray | None], **attributes: Any) -> tuple[np.ndarray, np.ndarray]:
    return reference(*inputs, q_num_heads=shape.q_heads, kv_num_heads=shape.kv_heads, **attributes)  # type: ignore[arg-type]


def run_shape(shape: Shape, inputs: list[np.ndarray | None], **options: Any) -> list[np.ndarray]:
    return run("LinearAttention", inputs, **{"options": CHUNKED, **options}, **shape.attributes)


def onnx_reference(shape: Shape, inputs: list[np.ndarray | None]) -> tuple[np.ndarray, ...]:
    names = [f"i{i}" if x is not None else "" for i, x in enumerate(inputs)]
    node = helper.make_node("LinearAttention", names, ["o", "s"], **shape.attributes)
    given = [(n, x) for n, x in zip(names, inputs, strict=True) if x is not None]
    infos = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for n, x in given]
    outs = [helper.make_value_info(n, helper.make_tensor_type_proto(1, None)) for n in ("o", "s")]
    model = helper.make_model(helper.make_graph([node], "g", infos, outs), opset_imports=[helper.make_opsetid("", 27)])
    return tuple(ReferenceEvaluator(model).run(None, dict(given)))


@pytest.mark.parametrize("options", [CHUNKED, RECURRENT], ids=name_of)
@pytest.mark.parametrize("shape", RULES, ids=name_of)
def test_tokens_around_chunk_edges(shape: Shape, options: LoweringOptions) -> None:
    for tokens in EDGES if options is CHUNKED else (1, 2, 17):
        inputs = linear_attention(shape, 1 + tokens % 2, tokens, seed=tokens)
        check(run_shape(shape, inputs, options=options), expected(shape, inputs))


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("shape", RULES, ids=name_of)
def test_adversarial_data(shape: Shape, data: str) -> None:
    for tokens in (40, 200):
        inputs = linear_attention(shape, 1, tokens, name=data)
        check(run_shape(shape, inputs), expected(shape, inputs), hard=data in HARD_DATA)


@pytest.mark.parametrize("shape", RULES, ids=name_of)
def test_no_tokens(shape: Shape) -> None:
    inputs = linear_attention(shape, 2, 0)
    for open_dims in (True, False):
        output, state = run_shape(shape, inputs, open_dims=open_dims)
        assert output.shape == (2, 0, shape.q_heads * shape.dv)
        np.testing.assert_array_equal(state, inputs[3])


@pytest.mark.parametrize("shape", RULES, ids=name_of)
def test_one_token_is_the_plain_recurrence(shape: Shape) -> None:
    inputs = linear_attention(shape, 2, 1)
    check(run_shape(shape, inputs, options=LoweringOptions(), open_dims=False), expected(shape, inputs))


@pytest.mark.parametrize("chunk", [8, 128])
def test_chunk_sizes(chunk: int) -> None:
    shape = Shape(q_heads=2)
    inputs = linear_attention(shape, 1, 150, name="near")
    options = LoweringOptions(strategy="chunked", chunk_size=chunk)
    check(run_shape(shape, inputs, options=options, open_dims="tokens"), expected(shape, inputs))


def test_static_tokens_are_unrolled_and_right() -> None:
    shape = Shape("gated_delta", "key", q_heads=2)
    inputs = linear_attention(shape, 2, 45, name="cliff")
    check(run_shape(shape, inputs, open_dims=False), expected(shape, inputs))


@pytest.mark.parametrize(("domain", "tokens"), [("", 1), (MICROSOFT, 20)])
def test_no_past_state_and_a_scale(domain: str, tokens: int) -> None:
    shape = Shape("gated")
    inputs = linear_attention(shape, 2, tokens, past=False)
    got = run_shape(shape, inputs, domain=domain, open_dims=False, options=LoweringOptions(), scale=0.5)
    check(got, expected(shape, inputs, scale=0.5))


@pytest.mark.parametrize(("dtype", "state_dtype"), [(np.float16, np.float32), (ml_dtypes.bfloat16, None)], ids=name_of)
def test_16_bit(dtype: Any, state_dtype: Any) -> None:
    shape = Shape()
    for tokens in (1, 50):
        inputs = linear_attention(shape, 2, tokens, dtype=dtype, state_dtype=state_dtype)
        got = run_shape(shape, inputs)
        assert [x.dtype for x in got] == [dtype, state_dtype or dtype]
        check(got, expected(shape, inputs))


@pytest.mark.parametrize("state_dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=name_of)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=name_of)
def test_every_pair_of_types(dtype: Any, state_dtype: Any) -> None:
    shape = Shape()
    inputs = linear_attention(shape, 1, 1, dtype=dtype, state_dtype=state_dtype)
    got = run_shape(shape, inputs, open_dims=False, options=RECURRENT)
    assert [x.dtype for x in got] == [dtype, state_dtype]
    check(got, expected(shape, inputs))


@pytest.mark.parametrize(
    ("heads", "options"),
    [
        *(((8, 1, 1), CHUNKED), ((4, 1, 2), CHUNKED), ((2, 1, 4), CHUNKED)),
        *((heads, RECURRENT) for heads in ((1, 1, 1), (4, 4, 4), (2, 2, 4), (1, 4, 4))),
    ],
    ids=name_of,
)
def test_com_microsoft_heads_against_onnx_runtime(heads: tuple[int, int, int], options: LoweringOptions) -> None:
    q_heads, k_heads, kv_heads = heads
    shape = Shape(q_heads=q_heads, k_heads=k_heads, kv_heads=kv_heads)
    inputs = linear_attention(shape, 2, 20)
    want = run_onnx_runtime(
        "LinearAttention", inputs, shape.attributes, domain=MICROSOFT, version=1, num_outputs=2
    )  # fmt: skip
    check(run_shape(shape, inputs, domain=MICROSOFT, open_dims=False, options=options), tuple(want))
    check(want, expected(shape, inputs))


@pytest.mark.parametrize("shape", RULES, ids=name_of)
def test_references_agree(shape: Shape) -> None:
    inputs = linear_attention(shape, 2, 9)
    check(list(onnx_reference(shape, inputs)), expected(shape, inputs))


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 16])
def test_grouped_queries(heads: int) -> None:
    shape = Shape("gated", q_heads=heads, k_heads=1, kv_heads=1)
    inputs = linear_attention(shape, 2, 1)
    check(run_shape(shape, inputs, options=RECURRENT, open_dims=False), expected(shape, inputs))


def test_key_size_one_and_one_head() -> None:
    shape = Shape("gated_delta", q_heads=1, k_heads=1, kv_heads=1, dk=1, dv=3)
    inputs = linear_attention(shape, 2, 18)
    check(run_shape(shape, inputs), expected(shape, inputs))


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
    check(in_pieces([1] * tokens, options=LoweringOptions(), open_dims=False), tuple(whole))


@pytest.mark.parametrize("shape", [s for s in RULES if "gated" in s.rule], ids=name_of)
def test_a_reset_is_a_fresh_start(shape: Shape) -> None:
    inputs = linear_attention(shape, 1, 20)
    decay = np.array(inputs[4])
    decay[:, 0] = -np.inf
    old = run_shape(shape, [*inputs[:4], decay, inputs[5]])
    fresh = run_shape(shape, [*inputs[:3], np.zeros_like(inputs[3]), decay, inputs[5]])
    for a, b in zip(old, fresh, strict=True):
        np.testing.assert_array_equal(a, b)


def test_padding_of_the_last_chunk_is_not_seen() -> None:
    shape = Shape()
    inputs = linear_attention(shape, 2, 33)
    both = run_shape(shape, inputs)
    alone = run_shape(shape, [None if x is None else x[:1] for x in inputs])
    for a, b in zip(both, alone, strict=True):  # and neither is a neighbour in the batch
        np.testing.assert_array_equal(a[:1], b)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    shape=st.sampled_from(RULES), data=st.sampled_from(DATA), batch=st.integers(1, 3), tokens=st.integers(0, 70),
    seed=st.integers(0, 2**32 - 1), options=st.sampled_from([CHUNKED, RECURRENT]),
)  # fmt: skip
def test_any_call(shape: Shape, data: str, batch: int, tokens: int, seed: int, options: LoweringOptions) -> None:
    inputs = linear_attention(shape, batch, tokens, name=data, seed=seed)
    check(run_shape(shape, inputs, options=options), expected(shape, inputs), hard=data in HARD_DATA)


@pytest.mark.vulkan
@pytest.mark.parametrize("shape", [Shape("gated"), Shape("gated", "key"), Shape("gated_delta")], ids=name_of)
def test_vulkan(shape: Shape) -> None:
    for tokens, data in ((1, "random"), (16, "silu"), (40, "cliff"), (50, "reset"), (65, "near")):
        inputs = linear_attention(shape, 2, tokens, name=data)
        check(run_shape(shape, inputs, target="vulkan"), expected(shape, inputs))


@pytest.mark.vulkan
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=name_of)
def test_vulkan_16_bit(dtype: Any, tokens: int) -> None:
    shape = Shape()
    inputs = linear_attention(shape, 2, tokens, dtype=dtype)
    got = run_shape(shape, inputs, target="vulkan", options=LoweringOptions(chunk_size=16), open_dims=False)
    check(got, expected(shape, inputs))


@pytest.mark.vulkan
@pytest.mark.parametrize("heads", [(4, 1, 1), (2, 1, 4)])
def test_vulkan_heads(heads: tuple[int, int, int]) -> None:
    shape = Shape("delta", q_heads=heads[0], k_heads=heads[1], kv_heads=heads[2])
    inputs = linear_attention(shape, 1, 20)
    check(run_shape(shape, inputs, domain=MICROSOFT, target="vulkan", open_dims=False), expected(shape, inputs))
