"""A step of softmax attention with norms, rotary embedding and gate in its kernels, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from attention_runs import CapacityRun, stream_ir, to_device, to_host
from linattn.dialect_patterns.attention.core import Heads
from linattn.dialect_patterns.attention.step_rows import is_legal
from linattn.dialect_patterns.node import TensorSpec
from linattn.dialect_patterns.select import No, Yes
from linattn.dialect_patterns.target import Target

from tests.tolerances import BENIGN, error

F16, F32, BF16 = np.float16, np.float32, ml_dtypes.bfloat16
NAMES = {F16: "f16", F32: "f32", BF16: "bf16"}
POSITIONS = 40


@dataclass(frozen=True)
class Case:
    """A layer's heart; ``ids`` are rows a stream, of as many columns as the batch or one.

    ``apart``: queries come as [B, 1, Hq, ...], as where a node between the reshape and the norm makes them.
    """

    ids: Any
    dtype: Any = F32
    heads: tuple[int, int, int] = (4, 2, 16)
    batch: int = 1
    rotated: int = 16
    interleaved: int = 0
    sections: tuple[int, ...] = ()
    by: int = 0
    scale: float = 1.0
    norms: bool = True
    gate: bool = True
    left: int = -1
    softcap: float = 0.0
    wide: bool = False
    apart: bool = False

    @property
    def size(self) -> int:
        return self.heads[2]


I64, I32 = np.int64, np.int32
CASES = {
    "as Qwen3.5": Case(np.array([[[7]], [[3]], [[11]]], I64), rotated=8, sections=(2, 1, 1), by=1),
    "sections in runs": Case(np.array([[[7]], [[3]], [[11]]], I64), sections=(3, 3, 2), scale=1.5, left=2),
    "two rows, pairs": Case(np.array([[[9], [4]]] * 3, I64), batch=2, interleaved=1, sections=(4, 2, 2), by=1),
    "bf16": Case(np.array([[9]], I64), BF16, (2, 2, 32), rotated=32, softcap=3.0, wide=True),
    "one position": Case(np.array([6], I64), rotated=4, gate=False),
    "out of range": Case(np.array([[1 << 40], [-1]], I64), batch=2),
    "out of range by one bit": Case(np.array([[0x80000000], [0x1_0000_0005]], I64), batch=2),
    "two rows, heads apart": Case(np.array([[9], [4]], I64), batch=2, apart=True),
    "in 32 bits": Case(np.array([[POSITIONS], [-1]], I32), batch=2, norms=False, gate=False),
}


def normed(x: np.ndarray, gamma: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * gamma


def turned(case: Case, x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Heads [B, H, d] rotated, one element after the other."""
    y, half, spread = x.copy(), case.rotated // 2, np.asarray(case.ids)
    for b in range(case.batch):
        for column in range(half):
            stream = 0
            if case.sections and case.by:
                third, (_, height, width) = column % 3, case.sections
                stream = 1 if third == 1 and column < 3 * height else 2 if third == 2 and column < 3 * width else 0
            elif case.sections:
                stream = int(np.searchsorted(np.cumsum(case.sections), column, side="right"))
            of = spread[stream] if case.sections else spread
            position = int(np.clip(of.reshape(-1)[b if of.ndim > 1 else 0], 0, POSITIONS - 1))
            c, s = cos[position, column] * case.scale, sin[position, column] * case.scale
            i, j = (2 * column, 2 * column + 1) if case.interleaved else (column, column + half)
            y[b, :, i], y[b, :, j] = x[b, :, i] * c - x[b, :, j] * s, x[b, :, j] * c + x[b, :, i] * s
    return y


@pytest.mark.vulkan
@pytest.mark.xdist_group("vulkan")
@pytest.mark.parametrize("name", CASES)
def test_steps(name: str) -> None:
    """Five steps into caches whose other rows are NaN."""
    case, capacity, first = CASES[name], 12, 3
    (hq, hkv, d), rng = case.heads, np.random.default_rng(len(name))

    def values(*dims: int) -> np.ndarray:
        return rng.standard_normal(dims).astype(case.dtype)

    stride, phase = 3 * d, 3 * rng.standard_normal((POSITIONS, case.rotated // 2))
    angles = F32 if case.wide else case.dtype
    cos, sin = np.cos(phase).astype(angles), np.sin(phase).astype(angles)
    gammas = [values(d), values(d)] if case.norms else [None, None]
    attributes: dict[str, Any] = {
        "num_heads": hq, "scale": 0.4, "softcap": case.softcap, "left": case.left, "rotated": case.rotated,
        "interleaved": case.interleaved, "interleaved_sections": case.by, "rotary_scale": case.scale,
        "query_start": 4, "query_stride": stride, "q_epsilon": 0.5, "k_epsilon": 1e-6,
        "gate_start": 2 * d, "gate_stride": stride,
    }  # fmt: skip
    attributes |= {"sections": list(case.sections)} if case.sections else {}
    caches = [np.full((case.batch, hkv, capacity, d), np.nan, case.dtype) for _ in range(2)]
    for cache in caches:
        cache[:, :, :first] = values(case.batch, hkv, first, d)

    def inputs() -> list[np.ndarray | None]:
        row = values(case.batch, 1, hq * stride)
        new = [row, values(case.batch, 1, hkv * d), values(case.batch, 1, hkv * d)]
        new[0] = row.reshape(case.batch, 1, hq, stride) if case.apart else row
        return [*new, *caches, case.ids, cos, sin, *gammas, row if case.gate else None]

    kind = NAMES[case.dtype]
    outputs = [TensorSpec((case.batch, 1, hq * d), kind)] + [TensorSpec(caches[0].shape, kind)] * 2
    run = CapacityRun("AttentionStep", "linattn", 1, inputs(), outputs, attributes, (3, 4), "lavapipe")
    held, wide = [to_device(cache, "lavapipe") for cache in caches], [cache.astype(np.float64) for cache in caches]
    limit = BENIGN[np.dtype(case.dtype).name]
    for position in range(first, first + 5):
        given = inputs()
        got = run.step(given, held, position)
        row, key, value = (np.asarray(x, np.float64) for x in given[:3])
        by_head = row.reshape(case.batch, hq, stride)
        query, key = by_head[..., 4 : 4 + d], key.reshape(case.batch, hkv, d)
        if case.norms:
            weights = [np.asarray(gamma, np.float64) for gamma in gammas]
            query, key = normed(query, weights[0], 0.5), normed(key, weights[1], 1e-6)
        query, key = (turned(case, x, cos.astype(np.float64), sin.astype(np.float64)) for x in (query, key))
        wide[0][:, :, position], wide[1][:, :, position] = key, value.reshape(case.batch, hkv, d)
        keys, mixed = (np.repeat(x[:, :, : position + 1], hq // hkv, 1) for x in wide)
        scores = np.einsum("bhd,bhsd->bhs", query, keys) * 0.4
        scores = np.tanh(scores / case.softcap) * case.softcap if case.softcap else scores
        if case.left >= 0:
            scores[..., : position - case.left] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        want = np.einsum("bhs,bhsd->bhd", weights / weights.sum(-1, keepdims=True), mixed)
        if case.gate:
            want = want / (1 + np.exp(-by_head[..., 2 * d :]))
        assert error(got, want.reshape(got.shape)) <= limit
    for cache, want in zip(held, wide, strict=True):
        found = to_host(cache, "lavapipe", np.dtype(case.dtype)).reshape(want.shape)
        assert error(found[:, :, : first + 5], want[:, :, : first + 5]) <= limit
        assert np.isnan(found[:, :, first + 5 :].astype(np.float64)).all()  # nothing else was written
    if name == "as Qwen3.5":  # three kernels, and nothing is copied
        commands = stream_ir(run.text, "lavapipe")
        assert commands.count("stream.cmd.dispatch ") == 3
        assert "stream.cmd.copy" not in commands


@pytest.mark.parametrize(
    ("size", "legal"), [(128, True), (256, True), (32, True), (16, False), (96, False), (512, False)]
)
def test_heads_that_are_a_workgroup(size: int, legal: bool) -> None:
    target = Target("vulkan", is_gpu=True, subgroup_size=32, max_threads=256)
    assert isinstance(is_legal(Heads(1, 8, 2, size, size), target), Yes if legal else No)
