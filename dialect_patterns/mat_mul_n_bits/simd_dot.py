"""The instructions with which strategy ``fused_simd`` multiplies bytes, as data.

A dot instruction takes vectors of bytes, small unsigned weights times signed elements of A, and leaves in each lane of
32 bits the sum of its four products. Where two instructions make one (x86 without VNNI), the first leaves sums of two
products in 16 bits; several of those are added before the second widens them.

A matrix instruction (Arm's I8MM) takes eight bytes of two rows and of two columns, and leaves the four sums; see
``simd_squares``. Where there is none it is "".
"""

from __future__ import annotations

from dataclasses import dataclass

from ..target import Target


@dataclass(frozen=True)
class DotInstruction:
    """How to multiply bytes on some machines.

    Attributes:
        features: LLVM features that the machine must have.
        vector_bits: Width of the vectors.
        dot: LLVM intrinsic (i32 sums, weights, A) -> i32 sums, or "".
        pairs: LLVM intrinsic (weights, A) -> i16 sums of two products, where there is no ``dot``.
        widen: LLVM intrinsic (i16, i16) -> i32 sums of two products.
        weight_bits: Most bits of a weight; wider ones are taken in two halves.
        matrix: LLVM intrinsic (i32 sums, A, weights) -> i32 sums of two rows of eight bytes by two columns.
    """

    features: frozenset[str]
    vector_bits: int
    dot: str = ""
    pairs: str = ""
    widen: str = ""
    weight_bits: int = 4
    matrix: str = ""


INSTRUCTIONS = (
    DotInstruction(frozenset({"avx512vnni"}), 512, dot="llvm.x86.avx512.vpdpbusd.512", weight_bits=8),
    DotInstruction(
        frozenset({"avx512bw"}), 512, pairs="llvm.x86.avx512.pmaddubs.w.512", widen="llvm.x86.avx512.pmaddw.d.512"
    ),
    DotInstruction(frozenset({"avxvnni"}), 256, dot="llvm.x86.avx512.vpdpbusd.256", weight_bits=8),
    DotInstruction(frozenset({"avx512vnni"}), 256, dot="llvm.x86.avx512.vpdpbusd.256", weight_bits=8),
    DotInstruction(frozenset({"avx2"}), 256, pairs="llvm.x86.avx2.pmadd.ub.sw", widen="llvm.x86.avx2.pmadd.wd"),
    DotInstruction(frozenset({"ssse3"}), 128, pairs="llvm.x86.ssse3.pmadd.ub.sw.128", widen="llvm.x86.sse2.pmadd.wd"),
    DotInstruction(
        frozenset({"i8mm"}),
        128,
        dot="llvm.aarch64.neon.usdot.v4i32.v16i8",
        weight_bits=8,
        matrix="llvm.aarch64.neon.smmla.v4i32.v16i8",
    ),
    DotInstruction(frozenset({"dotprod"}), 128, dot="llvm.aarch64.neon.sdot.v4i32.v16i8"),
)
"""Best first."""


def dot_instruction(target: Target, vector_bits: int | None = None) -> DotInstruction | None:
    """The best one that a machine has for its vectors, or for narrower ones."""
    for instruction in INSTRUCTIONS:
        if instruction.features <= target.features and instruction.vector_bits == (vector_bits or target.vector_bits):
            return instruction
    return None
