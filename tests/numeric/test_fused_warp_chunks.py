"""The CUDA kernels of chunks in warps' registers, against float64: on lavapipe, with scalar code for the instructions.

Two modules only: what a warp does takes lavapipe ten seconds to compile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import matrices
import ml_dtypes
import numpy as np
import pytest
import warps
from data import DATA, HARD_DATA, Shape, linear_attention
from harness import DEVICE_ATTRIBUTES, DRIVERS, FLAGS, LAVAPIPE, TARGETS
from linattn.dialect_patterns.linear_attention import fused_warp_chunks, warp_chunk_state
from linattn.dialect_patterns.linear_attention.reference import reference
from linattn.dialect_patterns.op import MICROSOFT, LoweringOptions
from linattn.frontend.targets import vulkan
from state_ops import run
from tolerances import BENIGN, check, error

pytestmark = [pytest.mark.vulkan, pytest.mark.xdist_group("vulkan")]
OPTIONS = LoweringOptions(strategy="fused_warp_chunks")
TARGET = "emulated warps"
MEMORY = 65_536
DELTA = Shape("gated_delta", q_heads=2, k_heads=1, kv_heads=1, dk=64, dv=16)  # two query heads read one state
GATED = Shape("gated", q_heads=1, k_heads=1, kv_heads=2, dk=64, dv=8)


@pytest.fixture(autouse=True, scope="module")
def _emulated() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        device = vulkan.device_attribute("lavapipe", replace(LAVAPIPE, workgroup_memory=MEMORY))
        patch.setitem(TARGETS, TARGET, replace(matrices.TARGET, workgroup_memory=MEMORY, copy_memory=MEMORY))
        patch.setitem(DEVICE_ATTRIBUTES, TARGET, device)
        patch.setitem(DRIVERS, TARGET, "vulkan")
        patch.setitem(FLAGS, TARGET, [])
        patch.setattr(fused_warp_chunks, "_ENOUGH_GROUPS", 1 << 30)
        patch.setattr(fused_warp_chunks, "_GROUPS", 1)
        patch.setattr(fused_warp_chunks, "_PARTS", 4)
        patch.setattr(warp_chunk_state, "Warp", warps.EmulatedWarp)
        matrices.emulate(patch, fused_warp_chunks)
        yield


def run_chunks(shape: Shape, inputs: list[np.ndarray | None]) -> list[np.ndarray]:
    domain = MICROSOFT if shape is GATED else ""
    return run("LinearAttention", inputs, target=TARGET, options=OPTIONS, domain=domain, **shape.attributes)


def expected(shape: Shape, inputs: list[np.ndarray | None]) -> tuple[np.ndarray, np.ndarray]:
    return reference(*inputs, q_num_heads=shape.q_heads, kv_num_heads=shape.kv_heads)  # type: ignore[arg-type]


def f16(batch: int, tokens: int, **options: Any) -> list[np.ndarray | None]:
    return linear_attention(DELTA, batch, tokens, **options, dtype=np.float16)


def cut(inputs: list[np.ndarray | None], state: np.ndarray | None, part: slice) -> list[np.ndarray | None]:
    """Some of the tokens, from a state on."""
    return [state if i == 3 else None if x is None else x[:, part] for i, x in enumerate(inputs)]


def test_any_data() -> None:
    for seed, (batch, tokens) in enumerate([(1, 1), (2, 31), (1, 32), (1, 33), (1, 65), (1, 130)]):
        inputs = f16(batch, tokens, seed=seed)
        check(run_chunks(DELTA, inputs), expected(DELTA, inputs))
    for data in DATA:  # equal keys, beta 2, and decays of 0, e^-1000 and more than 1 among them
        inputs = f16(1, 150, name=data)
        check(run_chunks(DELTA, inputs), expected(DELTA, inputs), hard=data in HARD_DATA)


def test_only_what_f16_cannot_hold_goes_token_by_token() -> None:
    """That way gives what the reference does but for the last rounding; the products' factors of f16 do not."""
    ordinary = f16(1, 32)
    ordinary[3] = np.zeros_like(ordinary[3])
    growing, large = list(ordinary), list(ordinary)
    growing[4] = np.array(ordinary[4])
    growing[4][:, 0] = 85.0  # of a state of zeros
    large[2] = np.sign(ordinary[2]) * np.float16(60_000.0)
    large[0] = ordinary[0] * np.float16(1e-3)  # type: ignore[operator]

    def differ(inputs: list[np.ndarray | None]) -> float:
        return float((run_chunks(DELTA, inputs)[0] != expected(DELTA, inputs)[0].astype(np.float16)).mean())

    assert differ(ordinary) > 0.1
    assert differ(growing) < 0.01
    assert differ(large) < 0.01


def test_tokens_before_nan_are_right() -> None:
    """And other batch rows are bit-equal."""
    inputs = f16(2, 70)
    clean, state = run_chunks(DELTA, inputs)
    output, _ = expected(DELTA, inputs)
    for index in (0, 1, 2, 4, 5):
        for t, value in ((0, np.nan), (37, np.inf), (63, np.nan)):
            poisoned = list(inputs)
            poisoned[index] = np.array(inputs[index])
            poisoned[index][1, t, -1] = value
            got, got_state = run_chunks(DELTA, poisoned)
            np.testing.assert_array_equal(got[0], clean[0])
            np.testing.assert_array_equal(got_state[0], state[0])
            assert error(got[1, :t], output[1, :t]) <= BENIGN["float16"]
            assert not np.isfinite(got[1, t]).all()


def test_bf16_split_is_whole() -> None:
    """With a state of f32 between calls, to the last bit at a chunk's edge; a state of bf16's kind would be far off."""
    inputs = linear_attention(GATED, 2, 75, dtype=ml_dtypes.bfloat16, state_dtype=np.float32)
    whole, last = run_chunks(GATED, inputs)
    output, state = expected(GATED, inputs)
    assert error(whole, output) <= BENIGN["bfloat16"]
    assert error(last, state) <= BENIGN["float32"]
    for edge in (32, 64):
        first = run_chunks(GATED, cut(inputs, inputs[3], slice(edge)))
        got, got_state = run_chunks(GATED, cut(inputs, first[1], slice(edge, None)))
        np.testing.assert_array_equal(np.concatenate([first[0], got], axis=1), whole)
        np.testing.assert_array_equal(got_state, last)
