"""LinearAttention at every head size, with and without a past state, on every width of vectors: against float64.

IREE's code depends on sizes by tiles, so what is right for one head size may be wrong for another: without a past state
``chunked`` was wrong at dk = 8 and nowhere else. A part of the sizes is tested always, all by ``make test-sweep``.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from data import Shape, linear_attention
from harness import WIDTHS
from linattn.dialect_patterns.linear_attention.reference import reference
from linattn.dialect_patterns.op import LoweringOptions
from state_ops import Call, run_all
from tolerances import check

ALL = bool(os.environ.get("LINATTN_SWEEP"))
RULES = ("delta", "gated_delta", "gated", "linear")
GPU = pytest.param("lavapipe", marks=pytest.mark.vulkan)


def shapes(sizes: range | tuple[int, ...], multiple: int = 1) -> list[Shape]:
    """For each dk every rule, or one after the other; dv and heads at random, dv a multiple of ``multiple``."""
    found: list[Shape] = []
    for dk in sizes:
        rules = RULES if ALL else (RULES[len(found) % len(RULES)],)
        random = np.random.default_rng(dk)
        for rule in rules:
            dv = multiple * int(random.integers(1, 40 // multiple))
            q_heads = int(random.integers(1, 3))
            found.append(Shape(rule, ("head", "key")[dk % 2], q_heads=q_heads, k_heads=1, kv_heads=1, dk=dk, dv=dv))
    return found


def check_all(strategy: str, target: str, shapes: list[Shape], tokens: int, *, past: bool) -> None:
    calls = [Call(linear_attention(s, 1, tokens, past=past, seed=s.dk), s.attributes) for s in shapes]
    options = LoweringOptions(strategy=strategy)
    got = run_all("LinearAttention", calls, target=target, open_dims=False, options=options)
    for shape, call, result in zip(shapes, calls, got, strict=True):
        want = reference(*call.inputs, q_num_heads=shape.q_heads, kv_num_heads=shape.kv_heads)  # type: ignore[arg-type]
        try:
            check(result, want)
        except AssertionError as error:
            raise AssertionError(f"{shape}, {tokens} tokens, {'a' if past else 'no'} past state: {error}") from error


@pytest.mark.parametrize("target", WIDTHS)
def test_chunked(target: str) -> None:
    """Three chunks of 16 tokens, the last one not full; first what was wrong with 256 and 512 bits."""
    wrong = Shape("delta", q_heads=1, k_heads=1, kv_heads=1, dk=8, dv=15)
    check_all("chunked", target, [wrong, *shapes(range(1, 65) if ALL else (4, 15))], 40, past=False)


@pytest.mark.parametrize("target", WIDTHS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_recurrent(target: str, tokens: int) -> None:
    """One token and a loop."""
    check_all("recurrent", target, shapes(range(1, 65) if ALL else (1, 4, 7, 8, 16)), tokens, past=False)


@pytest.mark.parametrize("target", WIDTHS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_fused_simd(target: str, tokens: int) -> None:
    """Head sizes that its kernel takes: multiples of 4."""
    check_all("fused_simd", target, shapes(range(4, 65, 4) if ALL else (8, 60), 4), tokens, past=False)


@pytest.mark.vulkan
@pytest.mark.parametrize(("strategy", "tokens"), [("fused_simt", 3), ("fused_simt_chunks", 40)])
def test_on_vulkan(strategy: str, tokens: int) -> None:
    """Head sizes that the kernels take, of which there are fewer for chunks."""
    sizes = range(4, 65, 4) if strategy == "fused_simt" else range(16, 65, 16)
    check_all(strategy, "lavapipe", shapes(sizes if ALL else (8, 24) if tokens == 3 else (32,), 8), tokens, past=False)


@pytest.mark.parametrize("strategy", ["chunked", "recurrent", "fused_simd"])
def test_any_sizes(strategy: str) -> None:
    """Heads, tokens and past states at random; the chunks without a past state are those of `test_chunked`."""
    random = np.random.default_rng(7)
    multiple = 4 if strategy == "fused_simd" else 1
    for past in (False, True) if ALL or strategy != "chunked" else (True,):
        sizes = tuple(multiple * int(random.integers(1, 48 // multiple)) for _ in range(40 if ALL else 2))
        check_all(strategy, "cpu", shapes(sizes, multiple), int(random.integers(2, 50)), past=past)
