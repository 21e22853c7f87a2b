"""The GPU kernels of chunks on matrix units, against float64: on lavapipe, with scalar code for the units.

Lavapipe says that a workgroup has 32 KB; it gives what a kernel asks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import matrices
import ml_dtypes
import numpy as np
import pytest
from data import DATA, HARD_DATA, Shape, linear_attention
from harness import DEVICE_ATTRIBUTES, DRIVERS, FLAGS, LAVAPIPE, TARGETS
from linattn.dialect_patterns.linear_attention import fused_mma_chunks
from linattn.dialect_patterns.linear_attention.reference import reference
from linattn.dialect_patterns.op import MICROSOFT, LoweringOptions
from linattn.frontend.targets import vulkan
from state_ops import run
from tolerances import BENIGN, check, error

pytestmark = [pytest.mark.vulkan, pytest.mark.xdist_group("vulkan")]
MATRICES = LoweringOptions(strategy="fused_mma_chunks")
TARGET = "emulated matrices"
MEMORY = 49_152
DELTA = Shape("gated_delta", q_heads=2, k_heads=2, kv_heads=2, dk=64, dv=32)
GATED = Shape("gated", q_heads=4, k_heads=2, kv_heads=2, dk=64, dv=16)


@pytest.fixture(autouse=True, scope="module")
def _emulated() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        device = vulkan.device_attribute("lavapipe", replace(LAVAPIPE, workgroup_memory=MEMORY))
        patch.setitem(TARGETS, TARGET, replace(matrices.TARGET, workgroup_memory=MEMORY))
        patch.setitem(DEVICE_ATTRIBUTES, TARGET, device)
        patch.setitem(DRIVERS, TARGET, "vulkan")
        patch.setitem(FLAGS, TARGET, [])
        patch.setattr(fused_mma_chunks, "_ENOUGH_GROUPS", 1)
        matrices.emulate(patch, fused_mma_chunks)
        yield


def run_chunks(shape: Shape, inputs: list[np.ndarray | None], **options: Any) -> list[np.ndarray]:
    return run("LinearAttention", inputs, target=TARGET, options=MATRICES, **options, **shape.attributes)


def expected(shape: Shape, inputs: list[np.ndarray | None], **attributes: Any) -> tuple[np.ndarray, np.ndarray]:
    return reference(*inputs, q_num_heads=shape.q_heads, kv_num_heads=shape.kv_heads, **attributes)  # type: ignore[arg-type]


def compare(shape: Shape, inputs: list[np.ndarray | None], *, hard: bool = False, **options: Any) -> None:
    check(run_chunks(shape, inputs, **options), expected(shape, inputs), hard=hard)


def f16(*args: Any, **options: Any) -> list[np.ndarray | None]:
    return linear_attention(*args, **options, dtype=np.float16)


LENGTHS = [(1, 1), (2, 31), (1, 32), (1, 33), (3, 65), (1, 96), (2, 130)]


def test_any_data() -> None:
    for seed, (batch, tokens) in enumerate(LENGTHS):
        compare(DELTA, f16(DELTA, batch, tokens, seed=seed))
    for data in DATA:  # equal keys, beta 2, and decays of 0, e^-1000 and more than 1 among them
        for seed in range(2):
            compare(DELTA, f16(DELTA, 1, 150, name=data, seed=seed), hard=data in HARD_DATA)


@pytest.mark.parametrize("shape", [DELTA, GATED], ids=lambda s: s.rule)
def test_only_what_f16_cannot_hold_goes_token_by_token(shape: Shape) -> None:
    """That way gives what the reference does but for the last rounding; the matrix units' f16 factors do not."""
    ordinary = f16(shape, 1, 32)
    ordinary[3] = np.zeros_like(ordinary[3])
    growing = list(ordinary)
    growing[4] = np.array(ordinary[4])
    growing[4][:, 0] = 85.0  # of a state of zeros

    def differ(inputs: list[np.ndarray | None]) -> float:
        want, _ = expected(shape, inputs)
        return float((run_chunks(shape, inputs)[0] != want.astype(np.float16)).mean())

    assert differ(ordinary) > 0.1
    assert differ(growing) < 0.01


def test_errors_do_not_grow() -> None:
    """Beta 2 and equal keys over 3,000 tokens: what one term of f16 would fail (1.8e-3, 1.2e-3)."""
    for data in ("beta2", "identical", "silu"):
        compare(DELTA, f16(DELTA, 1, 3000, name=data), hard=data in HARD_DATA)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 30.0, 3000.0])
def test_any_size_of_values(scale: float) -> None:
    """Small ones, which one term of f16 would lose, and large ones."""
    inputs = f16(DELTA, 1, 70)
    for i in (2, 3):
        inputs[i] = (inputs[i].astype(np.float32) * scale).astype(np.float16)  # type: ignore[union-attr]
    compare(DELTA, inputs)


@pytest.mark.parametrize("shape", [DELTA, GATED], ids=lambda s: s.rule)
def test_what_f16_cannot_hold(shape: Shape) -> None:
    """Decays that grow by e^112 in a chunk from a state of zeros, values of 60,000, large queries."""
    inputs = f16(shape, 1, 70, past=True)
    inputs[3] = np.zeros_like(inputs[3])
    growing = list(inputs)
    growing[4] = np.array(inputs[4])
    growing[4][:, 32:64] = 3.5
    growing[1] = np.array(inputs[1])
    growing[1][:, :63] = 0.0
    compare(shape, growing)
    large = list(inputs)
    large[2] = np.sign(inputs[2]) * np.float16(60_000.0)
    large[0] = inputs[0] * np.float16(1e-3)  # type: ignore[operator]
    got = run_chunks(shape, large)
    output, state = expected(shape, large)
    assert error(got[0], output) <= BENIGN["float16"]
    fits = np.abs(state) < 65_000.0
    assert error(got[1][fits], state[fits]) <= BENIGN["float16"]
    queries = list(inputs)
    queries[0] = np.sign(inputs[0]) * np.float16(30_000.0)
    queries[2] = inputs[2] * np.float16(1e-3)  # type: ignore[operator]
    compare(shape, queries)


@pytest.mark.parametrize("shape", [DELTA, GATED], ids=lambda s: s.rule)
def test_tokens_before_nan_are_right(shape: Shape) -> None:
    """And other heads and batch rows are bit-equal."""
    inputs = f16(shape, 2, 70)
    clean, state = run_chunks(shape, inputs)
    output, _ = expected(shape, inputs)
    own = shape.q_heads // shape.kv_heads * shape.dv
    for index in (0, 1, 2, 4, 5):
        for t, value in ((0, np.nan), (37, np.inf), (63, -np.inf)):
            if inputs[index] is None or (index == 4 and value == -np.inf):
                continue
            poisoned = list(inputs)
            poisoned[index] = np.array(inputs[index])
            poisoned[index][1, t, -1] = value
            got, got_state = run_chunks(shape, poisoned)
            np.testing.assert_array_equal(got[0], clean[0])
            np.testing.assert_array_equal(got_state[0], state[0])
            np.testing.assert_array_equal(got[1, :, :-own], clean[1, :, :-own])
            np.testing.assert_array_equal(got_state[1, :-1], state[1, :-1])
            assert error(got[1, :t], output[1, :t]) <= BENIGN["float16"]
            assert not np.isfinite(got[1, t, -own:]).all()


def test_a_reset_is_a_fresh_start() -> None:
    inputs = f16(DELTA, 1, 40)
    inputs[4] = np.array(inputs[4])
    inputs[4][:, 0] = -np.inf
    old = run_chunks(DELTA, inputs)
    fresh = run_chunks(DELTA, [*inputs[:3], np.zeros_like(inputs[3]), *inputs[4:]])
    for a, b in zip(old, fresh, strict=True):
        np.testing.assert_array_equal(a, b)


def test_split_is_whole() -> None:
    """At a chunk's edge, before, after and between: within the rounding of the state to f16 in between."""
    inputs = f16(DELTA, 1, 100)
    whole, last = expected(DELTA, inputs)
    for cut in (31, 32, 33, 50, 64, 96):
        first = run_chunks(DELTA, [x if i == 3 else x[:, :cut] for i, x in enumerate(inputs)])  # type: ignore[index]
        rest = [first[1] if i == 3 else x[:, cut:] for i, x in enumerate(inputs)]  # type: ignore[index]
        output, state = run_chunks(DELTA, rest)
        check([np.concatenate([first[0], output], axis=1), state], (whole, last))


def test_query_heads_of_one_state() -> None:
    for batch, tokens in LENGTHS[:5]:
        compare(GATED, f16(GATED, batch, tokens))
    for data in ("reset", "cliff", "strong", "positive"):
        compare(GATED, f16(GATED, 1, 100, name=data), hard=data in HARD_DATA)


def test_bf16_with_several_value_heads_of_a_key() -> None:
    """A state of f32 between calls: split runs are the whole one to the last bit at a chunk's edge."""
    shape = Shape("delta", beta="shared", q_heads=1, k_heads=1, kv_heads=2, dk=64, dv=16)
    inputs = linear_attention(shape, 2, 75, dtype=ml_dtypes.bfloat16, state_dtype=np.float32)
    whole, last = run_chunks(shape, inputs, domain=MICROSOFT)
    assert whole.dtype == ml_dtypes.bfloat16
    output, state = expected(shape, inputs)
    assert error(whole, output) <= BENIGN["bfloat16"]
    assert error(last, state) <= BENIGN["float16"]  # of f16's kind: keys and values of bf16 are exact in it
    for cut in (32, 64):
        start = [x if i == 3 or x is None else x[:, :cut] for i, x in enumerate(inputs)]
        first = run_chunks(shape, start, domain=MICROSOFT)
        rest = [first[1] if i == 3 else x if x is None else x[:, cut:] for i, x in enumerate(inputs)]
        got, got_state = run_chunks(shape, rest, domain=MICROSOFT)
        np.testing.assert_array_equal(np.concatenate([first[0], got], axis=1), whole)
        np.testing.assert_array_equal(got_state, last)
    tiny = list(inputs)
    tiny[0] = inputs[0] * ml_dtypes.bfloat16(1e-6)  # type: ignore[operator]
    got, _ = run_chunks(shape, tiny, domain=MICROSOFT)
    assert error(got, expected(shape, tiny)[0]) <= BENIGN["bfloat16"]


def test_no_past_state_and_a_scale() -> None:
    shape = Shape("linear", q_heads=2, k_heads=2, kv_heads=2, dk=64, dv=16)
    inputs = f16(shape, 1, 70, past=False)
    got = run_chunks(shape, inputs, scale=0.5)
    check(got, expected(shape, inputs, scale=0.5))
