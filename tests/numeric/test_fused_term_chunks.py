"""The GPU kernels of chunks whose keys and queries are in terms, against float64: on lavapipe, with scalar code.

Two modules only, which lavapipe takes ten seconds each to compile: together they have all there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import matrices
import numpy as np
import pytest
from data import DATA, HARD_DATA, Shape, linear_attention
from harness import DEVICE_ATTRIBUTES, DRIVERS, FLAGS, LAVAPIPE, TARGETS
from linattn.dialect_patterns.linear_attention import fused_term_chunks, op
from linattn.dialect_patterns.linear_attention.reference import reference
from linattn.dialect_patterns.node import Node, TensorSpec
from linattn.dialect_patterns.op import MICROSOFT, LoweringOptions
from linattn.frontend.targets import vulkan
from state_ops import run
from tolerances import BENIGN, check, error

pytestmark = [pytest.mark.vulkan, pytest.mark.xdist_group("vulkan")]
TERMS = LoweringOptions(strategy="fused_term_chunks")
TARGET = "emulated terms"
MEMORY = 49_152
DELTA = Shape("gated_delta", "key", q_heads=2, k_heads=1, kv_heads=1, dk=128, dv=16)
F32 = Shape("gated", q_heads=1, k_heads=1, kv_heads=2, dk=64, dv=16)
KINDS = ((DELTA, np.float16), (F32, np.float32))


@pytest.fixture(autouse=True, scope="module")
def _emulated() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        device = vulkan.device_attribute("lavapipe", replace(LAVAPIPE, workgroup_memory=MEMORY))
        patch.setitem(TARGETS, TARGET, replace(matrices.TARGET, workgroup_memory=MEMORY, fast_math=True))
        patch.setitem(DEVICE_ATTRIBUTES, TARGET, device)
        patch.setitem(DRIVERS, TARGET, "vulkan")
        patch.setitem(FLAGS, TARGET, [])
        matrices.emulate(patch, fused_term_chunks)
        yield


def run_chunks(shape: Shape, inputs: list[np.ndarray | None], **options: Any) -> list[np.ndarray]:
    domain = MICROSOFT if shape.q_heads < shape.kv_heads or inputs[3].dtype != inputs[0].dtype else ""
    return run("LinearAttention", inputs, target=TARGET, options=TERMS, domain=domain, **options, **shape.attributes)


def expected(shape: Shape, inputs: list[np.ndarray | None], **attributes: Any) -> tuple[np.ndarray, np.ndarray]:
    return reference(*inputs, q_num_heads=shape.q_heads, kv_num_heads=shape.kv_heads, **attributes)  # type: ignore[arg-type]


LENGTHS = [(1, 1), (2, 31), (1, 32), (1, 33), (3, 65), (1, 96), (2, 130)]


def keys(shape: Shape, batch: int, tokens: int, **options: Any) -> list[np.ndarray | None]:
    """Activations of f16 and a state of f32, which is to be within f32's tolerance."""
    return linear_attention(shape, batch, tokens, dtype=np.float16, state_dtype=np.float32, **options)


def compare(shape: Shape, inputs: list[np.ndarray | None], *, hard: bool = False) -> None:
    check(run_chunks(shape, inputs), expected(shape, inputs), hard=hard)


def test_any_data() -> None:
    for seed, (batch, tokens) in enumerate(LENGTHS):
        compare(DELTA, keys(DELTA, batch, tokens, seed=seed))
    for data in DATA:  # equal keys, beta 2, and decays of 0, e^-1000 and more than 1 among them
        compare(DELTA, keys(DELTA, 1, 150, name=data), hard=data in HARD_DATA)


def test_every_key_dimension_decays_on_its_own() -> None:
    """None, e^-0.1, e^-5, e^-1000 and resets beside each other in one token, whatever the token before had."""
    for shape, dtype in KINDS:
        inputs = linear_attention(shape, 2, 100, dtype=dtype, state_dtype=np.float32)
        rng = np.random.default_rng(7)
        kinds = np.array([0.0, -0.1, -5.0, -1000.0, -np.inf])
        inputs[4] = rng.choice(kinds, inputs[4].shape, p=[0.4, 0.4, 0.1, 0.05, 0.05]).astype(dtype)
        compare(shape, inputs)


def test_f32() -> None:
    """Decays of a head, several value heads of a query and key head."""
    for seed, (batch, tokens) in enumerate(LENGTHS):
        compare(F32, linear_attention(F32, batch, tokens, seed=seed))
    for data in DATA:
        compare(F32, linear_attention(F32, 1, 150, name=data), hard=data in HARD_DATA)


def test_only_what_f16_cannot_hold_goes_token_by_token() -> None:
    """That way gives what the reference does but for the last rounding; products of terms do not."""
    ordinary = keys(DELTA, 1, 32)
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


def test_any_size_of_values() -> None:
    """Of activations of f16 a small one has its 11 bits, of f32 all: of that kind the state is to be."""
    for scale in (1e-4, 30.0, 3000.0):
        for shape, dtype in KINDS:
            inputs = linear_attention(shape, 1, 70, dtype=dtype, state_dtype=np.float32)
            for i in (2, 3):
                inputs[i] = (inputs[i].astype(np.float32) * scale).astype(inputs[i].dtype)  # type: ignore[union-attr]
            for got, want in zip(run_chunks(shape, inputs), expected(shape, inputs), strict=True):
                assert error(got, want) <= BENIGN[np.dtype(dtype).name]


def test_tokens_before_nan_are_right() -> None:
    """And other heads and batch rows are bit-equal."""
    for shape, dtype in KINDS:
        inputs = linear_attention(shape, 2, 70, dtype=dtype, state_dtype=np.float32)
        clean, state = run_chunks(shape, inputs)
        output, _ = expected(shape, inputs)
        own = shape.dv * shape.q_heads // shape.kv_heads or shape.dv
        for index in (0, 1, 2, 4, 5):
            for t, value in ((0, np.nan), (37, np.inf), (63, np.nan)):
                if inputs[index] is None:
                    continue
                poisoned = list(inputs)
                poisoned[index] = np.array(inputs[index])
                poisoned[index][1, t, -1] = value
                got, got_state = run_chunks(shape, poisoned)
                np.testing.assert_array_equal(got[0], clean[0])
                np.testing.assert_array_equal(got_state[0], state[0])
                assert error(got[1, :t], output[1, :t]) <= BENIGN[np.dtype(dtype).name]
                assert not np.isfinite(got[1, t, -own:].astype(np.float32)).all()


def test_a_reset_is_a_fresh_start() -> None:
    inputs = keys(DELTA, 1, 40)
    inputs[4] = np.array(inputs[4])
    inputs[4][:, 0] = -np.inf
    old = run_chunks(DELTA, inputs)
    fresh = run_chunks(DELTA, [*inputs[:3], np.zeros_like(inputs[3]), *inputs[4:]])
    for a, b in zip(old, fresh, strict=True):
        np.testing.assert_array_equal(a, b)


def test_split_is_whole() -> None:
    """With a state of f32 between calls: to the last bit at a chunk's edge, and well within tolerance elsewhere."""
    for shape, dtype in KINDS:
        inputs = linear_attention(shape, 1, 100, dtype=dtype, state_dtype=np.float32)
        whole, last = run_chunks(shape, inputs)
        want = expected(shape, inputs)
        for cut in (31, 32, 33, 50, 64, 96):
            first = run_chunks(shape, [x if i == 3 or x is None else x[:, :cut] for i, x in enumerate(inputs)])
            rest = [first[1] if i == 3 else x if x is None else x[:, cut:] for i, x in enumerate(inputs)]
            got, state = run_chunks(shape, rest)
            joined = np.concatenate([first[0], got], axis=1)
            check([joined, state], want)
            if cut % 32 == 0:
                np.testing.assert_array_equal(joined, whole)
                np.testing.assert_array_equal(state, last)


def test_who_asks_for_it() -> None:
    """Everywhere else the report says why not."""
    target = TARGETS[TARGET]

    def reason(shape: Shape, dtype: str, **changes: Any) -> str:
        return getattr(fused_term_chunks.is_legal(contract(shape, dtype), replace(target, **changes)), "reason", "")

    assert (
        reason(DELTA, "f16", fast_math=False) == reason(F32, "f32") == reason(replace(F32, rule="linear"), "f32") == ""
    )
    assert reason(F32, "f32", fast_math=False) == "f32 by terms of 16 bits is for --math fast"
    assert "are factors as they are" in reason(F32, "f16")
    assert "without products" in reason(DELTA, "f16", matrix_stride=None)
    assert "bytes of the workgroup's memory" in reason(DELTA, "f16", workgroup_memory=16_384)
    assert "64 or 128" in reason(replace(DELTA, dk=32), "f16")


def contract(shape: Shape, dtype: str) -> Any:
    lead = (1, 64)
    widths = [shape.q_heads * shape.dk, shape.k_heads * shape.dk, shape.kv_heads * shape.dv]
    specs: list[TensorSpec | None] = [TensorSpec((*lead, width), dtype) for width in widths]
    specs.append(TensorSpec((1, shape.kv_heads, shape.dk, shape.dv), "f32"))
    decay = shape.kv_heads * (shape.dk if shape.decay == "key" else 1)
    specs.append(TensorSpec((*lead, decay), dtype) if "gated" in shape.rule else None)
    specs.append(TensorSpec((*lead, shape.kv_heads), dtype) if "delta" in shape.rule else None)
    return op.parse(Node("test", MICROSOFT, "LinearAttention", 1, tuple(specs), 2, dict(shape.attributes)))
