"""No thread of a GPU kernel reads what another one may be writing; see races.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import half_types
import matrices
import ml_dtypes
import numpy as np
import pytest
import warps
from data import Shape, linear_attention
from harness import TARGETS, lowered
from linattn.dialect_patterns.draw_token.contract import DRAW_TOKEN, SETTINGS
from linattn.dialect_patterns.emit.simt_kernel import Kernel
from linattn.dialect_patterns.linear_attention import (
    fused_mma_chunks,
    fused_term_chunks,
    fused_warp_chunks,
    warp_chunk_state,
)
from linattn.dialect_patterns.linear_attention.fused_simt_lanes import Lanes
from linattn.dialect_patterns.mat_mul import fused_mma, mma_kernel
from linattn.dialect_patterns.mat_mul.normed import NORMED
from linattn.dialect_patterns.mat_mul_n_bits.joined import JOINED_N_BITS
from linattn.dialect_patterns.next_token import NEXT_TOKEN
from linattn.dialect_patterns.node import TensorSpec
from linattn.dialect_patterns.op import INTERNAL, LoweringOptions
from linattn.dialect_patterns.target import Target
from linattn.frontend.compile import CompileOptions, compile_model
from linattn.frontend.lower.iree import Compiler
from linattn.runtime.errors import LinattnError
from races import races, races_in
from state_ops import specs_of

GPUS = {
    "plain": Target("vulkan", is_gpu=True),  # sums go through the workgroup's memory
    "gpu": Target("vulkan", is_gpu=True, subgroup_size=32, workgroup_memory=49_152),
    "matrices": replace(matrices.TARGET, workgroup_memory=49_152),
}
RULES = [Shape("linear"), Shape("gated"), Shape("gated", "key"), Shape("delta"), Shape("gated_delta", "key")]


@pytest.fixture(autouse=True)
def _targets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, target in GPUS.items():
        monkeypatch.setitem(TARGETS, name, target)


def attention(shape: Shape, tokens: int, gpu: str, strategy: str, dtype: Any = np.float32) -> Any:
    inputs = linear_attention(shape, 1, tokens, dtype=dtype)
    specs = specs_of("LinearAttention", inputs, False)
    options = LoweringOptions(strategy=strategy)
    return lowered("", "LinearAttention", 27, specs, shape.attributes, 2, gpu, options)


@pytest.mark.parametrize("gpu", ["plain", "gpu"])
@pytest.mark.parametrize("shape", RULES, ids=lambda shape: f"{shape.rule}-{shape.decay}")
def test_the_recurrence(shape: Shape, gpu: str) -> None:
    for tokens in (1, 2, 5, 8):  # blocks of tokens, and what is left one by one
        assert races(attention(shape, tokens, gpu, "fused_simt")) == []


def test_one_token_in_several_subgroups(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(q_heads=4, kv_heads=2, dk=128, dv=32)
    assert races(attention(shape, 1, "gpu", "fused_simt")) == []
    monkeypatch.setattr(Kernel, "barrier", lambda _: None)
    assert races(attention(shape, 1, "gpu", "fused_simt"))


@pytest.mark.parametrize("gpu", ["plain", "gpu"])
@pytest.mark.parametrize("vocabulary", [7, 2000, 40_000])
def test_the_next_token(vocabulary: int, gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen and drawn; without the barrier behind a sum's reading, the next sum would be a race."""
    logits, settings = TensorSpec((2, 1, vocabulary), "f16"), TensorSpec((2, SETTINGS), "f32")
    operators = ((NEXT_TOKEN, [logits]), (DRAW_TOKEN, [logits, settings]))
    for name, specs in operators:
        assert races(lowered(INTERNAL, name, 1, specs, {}, 1, gpu)) == []
    barrier, count = Kernel.barrier, [0]

    def every_second(self: Kernel) -> None:
        count[0] += 1
        if count[0] % 2:
            barrier(self)

    monkeypatch.setattr(Kernel, "barrier", every_second)
    if vocabulary == 2000:
        assert all(races(lowered(INTERNAL, name, 1, specs, {}, 1, gpu)) for name, specs in operators)


def test_a_norm_and_its_products() -> None:
    """Squares and sums share a barrier; one workgroup of them writes the row."""
    specs = [TensorSpec((1, 1, 256), "f16"), TensorSpec((256,), "f16"), TensorSpec((1, 1, 256), "f16")]
    specs += [TensorSpec((256, 64), "f16")] * 2
    for gated in (0, 1):
        attributes = {"epsilon": 1e-6, "gated": gated, "with_skip": 1, "with_sum": 1}
        assert races(lowered(INTERNAL, NORMED, 1, specs, attributes, 3 - gated, "gpu")) == []


def test_a_norm_and_its_products_by_packed_weights() -> None:
    specs = [TensorSpec((1, 1, 1024), "f32"), TensorSpec((1024,), "f32"), TensorSpec((1, 1, 1024), "f32")]
    specs += [TensorSpec((64, 32, 16), "i8"), TensorSpec((64, 32), "f32")] * 2
    attributes = {"K": 1024, "bits": 4, "block_size": 32, "accuracy_level": 4, "columns": [64, 64], "epsilon": 1e-6}
    attributes |= {"with_norm": 1, "with_skip": 1, "with_sum": 1}
    for gated in (0, 1):
        module = lowered(INTERNAL, JOINED_N_BITS, 1, specs, attributes | {"gated": gated}, 3 - gated, "gpu")
        assert races(module) == []


def test_a_race_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was there: sums of neighbouring blocks in the same half of the memory."""
    in_memory = Lanes._sum_in_memory
    monkeypatch.setattr(Lanes, "_sum_in_memory", lambda self, values, use, turn: in_memory(self, values, use, turn * 2))
    assert races(attention(Shape("gated"), 8, "plain", "fused_simt"))


@pytest.mark.parametrize("rule", ["linear", "gated_delta"])
def test_chunks(rule: str) -> None:
    shape = Shape(rule, q_heads=2, k_heads=2, kv_heads=2, dk=64, dv=64)
    for tokens in (40, 48):  # a chunk that is cut short, and none
        assert races(attention(shape, tokens, "gpu", "fused_simt_chunks"), {0: tokens}) == []


@pytest.mark.parametrize(
    ("rule", "dk", "groups", "dtype"),
    [("gated_delta", 128, 1, np.float16), ("gated_delta", 64, 100, ml_dtypes.bfloat16), ("linear", 64, 1, np.float16)],
)
def test_chunks_on_matrix_units(
    rule: str, dk: int, groups: int, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Parts of 32 and of 16 columns; what the units read is what the code that stands for them reads."""
    monkeypatch.setattr(fused_mma_chunks, "_ENOUGH_GROUPS", groups)
    matrices.emulate(monkeypatch, fused_mma_chunks)
    shape = Shape(rule, q_heads=4, k_heads=2, kv_heads=2, dk=dk, dv=32)
    assert races(attention(shape, 40, "matrices", "fused_mma_chunks", dtype), {0: 40}) == []


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (Shape("gated_delta", "key", q_heads=4, dk=128, dv=16), np.float16),
        (Shape("gated_delta", "key", q_heads=2, dk=64, dv=32), np.float32),
        (Shape("linear", q_heads=2, dk=64, dv=16), np.float32),
    ],
    ids=["f16", "f32", "linear"],
)
def test_chunks_in_terms(shape: Shape, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two and four tokens a thread of the first kernel, terms of one tile after the other in the second."""
    monkeypatch.setitem(TARGETS, "terms", replace(GPUS["matrices"], fast_math=True))
    matrices.emulate(monkeypatch, fused_term_chunks)
    assert races(attention(shape, 40, "terms", "fused_term_chunks", dtype), {0: 40}) == []


@pytest.mark.parametrize(("rule", "parts"), [("gated_delta", 2), ("gated_delta", 4), ("linear", 4)])
def test_chunks_in_warps(rule: str, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is copied ahead, and what warps tell each other, also token by token; missed where nobody meets."""
    monkeypatch.setitem(TARGETS, "warps", replace(matrices.TARGET, workgroup_memory=49_152, copy_memory=98_304))
    monkeypatch.setattr(fused_warp_chunks, "_GROUPS", 1)
    monkeypatch.setattr(fused_warp_chunks, "_PARTS", parts)
    monkeypatch.setattr(warp_chunk_state, "Warp", warps.EmulatedWarp)
    matrices.emulate(monkeypatch, fused_warp_chunks)
    shape = Shape(rule, q_heads=2, k_heads=2, kv_heads=2, dk=64, dv=16)
    assert races(attention(shape, 70, "warps", "fused_warp_chunks", np.float16), {0: 70}) == []
    monkeypatch.setattr(warps.EmulatedWarp, "meet", lambda *_: None)
    assert races(attention(shape, 70, "warps", "fused_warp_chunks", np.float16), {0: 70})


def test_a_barrier_between_products_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """So what the units read is looked at: the updates that are multiplied with keys."""
    matrices.emulate(monkeypatch, fused_mma_chunks)
    shape, barrier = Shape(q_heads=2, dk=64, dv=16), matrices.ScalarMatrices.barrier
    calls = iter(range(100))
    monkeypatch.setattr(matrices.ScalarMatrices, "barrier", lambda k: None if next(calls) == 15 else barrier(k))
    (first, *_) = races(attention(shape, 40, "matrices", "fused_mma_chunks", np.float16), {0: 40})
    assert "_chunks: " in first


@pytest.mark.parametrize(("copies", "depth"), [(0, 96), (0, 32), (49_152, 192)])
def test_products_on_matrix_units(copies: int, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of two stages and of more; copies are there at once, so not whether their end is awaited."""
    monkeypatch.setitem(TARGETS, "matrices", replace(GPUS["matrices"], copy_memory=copies))
    matrices.emulate(monkeypatch, fused_mma)
    specs = [TensorSpec((40, depth), "f16"), TensorSpec((depth, 72), "f16")]
    sizes = {0: 40, 1: depth, 2: 72}
    assert races(lowered("", "MatMul", 13, specs, {}, 1, "matrices"), sizes) == []
    monkeypatch.setattr(mma_kernel.Product, "_next", lambda self, stage: stage)  # one stage for all steps
    assert races(lowered("", "MatMul", 13, specs, {}, 1, "matrices"), sizes)


@pytest.mark.parametrize(("device", "dtype"), [("baseline", "f32"), ("hopper", "f32"), ("hopper", "f16")])
def test_every_operator(device: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As whole models have them, with weights; attention is in test_attention_simt.py."""

    class EnoughError(LinattnError):
        pass

    def stop(*given: object, **more: object) -> None:
        raise EnoughError("lowered")

    monkeypatch.setattr(Compiler, "convert_torch", stop)
    model = half_types.model(dtype, half_types.all_cases())
    with pytest.raises(EnoughError):
        compile_model(model, CompileOptions(target="vulkan", gpu_target=device, dump_ir=tmp_path, max_context=64))
    text = (tmp_path / "02-lower-operators.mlir").read_text()
    for wanted in ("linear_attention", "experts", "rms_fused_simt", "mat_mul_n_bits"):
        assert wanted in text, wanted
    assert races_in(text) == []
