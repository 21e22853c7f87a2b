"""Pairs of bf16 in words of 32 bits, and the instructions that multiply them.

    sums[c] += a[2j] * b[2j, c] + a[2j + 1] * b[2j + 1, c]        in f32, 16 or 4 columns and two rows of b at once

AVX512_BF16 (Zen 4, Cooper Lake and on) and Arm's BF16 (Neoverse V1, Apple M2 and on), so far run in an emulator only,
which has an instruction for small matrices of pairs as well: see ``simd_squares``.
Twice the multiply-adds of f32 in an instruction, and nothing to widen. Subnormal numbers count as zero. Some machines
take longer for it than for what it stands for; they take the pairs apart.
Source: Intel's Software Developer's Manual, VDPBF16PS; Arm's Architecture Reference Manual, BFDOT (vector).
"""

from __future__ import annotations

from ..emit.kernel_text import Index, KernelText, vector_type
from ..target import Target

_DOTS = {
    16: ("avx512bf16", "llvm.x86.avx512bf16.dpbf16ps.512"),
    4: ("bf16", "llvm.aarch64.neon.bfdot.v4f32.v8bf16"),
}
"""Lanes of the vectors -> feature of the machine, LLVM intrinsic (sums, a, b) -> sums."""

SLOW = (frozenset({"amx-tile"}),)
"""Features of machines on which f32 of widened pairs is faster. A prompt of 512 of ``samples/benchmark_model.py`` in
bf16 without the matrix unit: a Sapphire Rapids 910 tokens/s with it; fp32, in f32, 1,380. A Zen 4
takes 31.9 ms with it for a product that takes 72.0 in f32 (docs/benchmarks.md)."""


def multiplies_pairs(dtype: str, target: Target) -> bool:
    """Whether products of a type are those of pairs on a machine.

    Not where the weights are for machines of other vectors too, which read them one by one.
    """
    feature, _ = _DOTS.get(target.vector_bits // 32, ("", ""))
    return dtype == "bf16" and feature in target.features and not target.shares_weights


def multiplies_squares(target: Target) -> bool:
    """Whether a machine that multiplies pairs multiplies 2 x 2 of them at once."""
    return target.vector_bits == 128 and "bf16" in target.features


def has_fast_dot(target: Target) -> bool:
    """Whether a machine that multiplies pairs is faster with the instruction than with f32."""
    return not any(features <= target.features for features in SLOW)


def multiply_add(k: KernelText, a: str, b: str, total: str) -> str:
    """A * b + total for vectors of f32, or of pairs of bf16 as i32."""
    return k.fma(a, b, total) if "f32" in k.types[a] else dot(k, a, b, total)


def dot(k: KernelText, a: str, b: str, total: str) -> str:
    """The sum of the products of pairs, vector<Nxi32> each, and of vector<Nxf32>."""
    lanes = k.lanes(a)
    halves, (_, name) = vector_type(2 * lanes, "bf16"), _DOTS[lanes]
    operands = [total, *(k.as_type(value, halves, "vector.bitcast") for value in (a, b))]
    return k.intrinsic(name, operands, k.types[total])


def widened(k: KernelText, pairs: str) -> list[str]:
    """The lower and the upper halves of vector<Nxi32> as f32."""
    kind = k.types[pairs]
    lower = k.op(f"arith.shli {pairs}, {k.constant(16, kind)} : {kind}", kind)
    upper = k.andi(pairs, k.constant(-65536, kind))
    return [k.as_type(half, kind.replace("i32", "f32"), "vector.bitcast") for half in (lower, upper)]


def load_pairs(k: KernelText, memref: str, row: Index, pair: Index, count: int) -> str:
    """``count`` pairs of a row of bf16 [M, K] as a vector of i32."""
    halves = k.load(memref, [row, k.mul(pair, 2)], 2 * count, raw=True)
    return k.as_type(halves, vector_type(count, "i32"), "vector.bitcast")


def load_half(k: KernelText, memref: str, row: Index, pair: Index) -> str:
    """The last element of a row, with a zero above it, as i32."""
    element = k.load(memref, [row, k.mul(pair, 2)], raw=True)
    return k.as_type(k.as_type(element, "i16", "arith.bitcast"), "i32", "arith.extui")
