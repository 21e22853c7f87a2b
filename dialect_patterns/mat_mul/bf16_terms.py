"""Numbers of f16 and f32 as sums of two bf16, for units that multiply bf16.

    x = hi + lo        a b = hi hi + hi lo + lo hi, and lo lo, which is left out

An f16 is exactly such a sum. Its hi is the upper part of its bits, so that lo has the same sign; where nothing is left,
lo is the smallest number of that sign: so an infinite factor stays one, where 0 or another sign would make it NaN. An
f32 loses what is below 2^-16 of it, so only ``--math fast`` takes it apart, into rounded terms (error 5e-6, not 2e-5);
an infinite factor may become NaN. With it the rows of an f16 product are rounded to one term (error 1.7e-3).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..emit.kernel_text import Index, KernelText, vector_type
from .simd_plan import Plan

PRODUCTS = {(1, 1): ((0, 0),), (1, 2): ((0, 0), (0, 1)), (2, 2): ((0, 1), (0, 0), (1, 0))}
"""Which terms are multiplied, by how many there are of a row's and a weight's numbers; in an order that changes one
side at a time and takes none up again."""

_UPPER = -65536
_HALF = 0x8000
_LARGE = 0x7F7F8000
_SIGN = -(1 << 31)
_LEAST = 0x00800000


def terms_of(dtype: str, fast: bool) -> tuple[int, int]:
    """Terms of a row's numbers and of a weight's, for products of a type; ``fast`` lets rows be rounded."""
    return {"bf16": (1, 1), "f16": (1 if fast else 2, 2)}.get(dtype, (2, 2))


def split(k: KernelText, x: str, dtype: str) -> tuple[str, str]:
    """The bits of the terms of a vector of f32, each in the upper half of i32.

    Args:
        k: Where to.
        x: The vector.
        dtype: What its numbers were before: ``f16`` or ``f32``.
    """
    floats = k.types[x]
    ints, mask = re.sub("f32", "i32", floats), re.sub("f32", "i1", floats)
    upper = k.constant(_UPPER, ints)
    high = rounded(k, x) if dtype == "f32" else k.andi(k.as_type(x, ints, "arith.bitcast"), upper)
    value = k.as_type(high, floats, "arith.bitcast")
    rest = k.as_type(k.subf(x, value), ints, "arith.bitcast")
    if dtype == "f32":
        return high, _rounded_bits(k, rest)
    same = k.op(f"arith.cmpf oeq, {x}, {value} : {floats}", mask)
    least = k.op(f"arith.ori {k.andi(high, k.constant(_SIGN, ints))}, {k.constant(_LEAST, ints)} : {ints}", ints)
    return high, k.select(same, least, k.andi(rest, upper))


def rounded(k: KernelText, x: str) -> str:
    """The bits of a vector of f32 in bf16, in the upper half of i32.

    To the next one; the largest numbers, inf and NaN to the next one nearer to zero, not to inf or -0.
    """
    return _rounded_bits(k, k.as_type(x, re.sub("f32", "i32", k.types[x]), "arith.bitcast"))


def _rounded_bits(k: KernelText, bits: str) -> str:
    ints = k.types[bits]
    magnitude = k.andi(bits, k.constant(~_SIGN, ints))
    small = k.op(
        f"arith.cmpi ult, {magnitude}, {k.constant(_LARGE, ints)} : {ints}", re.sub("i32", "i1", ints)
    )  # fmt: skip
    half = k.select(small, k.constant(_HALF, ints), k.constant(0, ints))
    return k.andi(k.addi(bits, half), k.constant(_UPPER, ints))


def pair(k: KernelText, first: str, second: str) -> str:
    """Words of two bf16 from their bits in the upper halves."""
    words = k.shift_right(first, 16)
    return k.op(f"arith.ori {words}, {second} : {k.types[words]}", k.types[words])


def split_words(k: KernelText, source: str, place: Sequence[Index], words: int, terms: int) -> list[str]:
    """Numbers of a row in the words of each term, two after the other in one.

    Args:
        k: Where to.
        source: Memref of bf16, f16 or f32.
        place: The first of twice as many numbers as words.
        words: As many as a vector has lanes.
        terms: Two; one of bf16 themselves, and of what is rounded to them.
    """
    dtype, (*row, first) = k.element_type(source), place
    if dtype == "bf16":
        return [k.as_type(k.load(source, place, 2 * words, raw=True), vector_type(words, "i32"), "vector.bitcast")]
    low, high = (k.load(source, [*row, k.add(first, half * words)], words) for half in range(2))
    even, odd = (k.shuffle(low, high, range(parity, 2 * words, 2)) for parity in range(2))
    if terms == 1:
        return [pair(k, rounded(k, even), rounded(k, odd))]
    return [pair(k, *both) for both in zip(*(split(k, x, dtype) for x in (even, odd)), strict=True)]


def write_split_weights(
    k: KernelText,
    p: Plan,
    panel: Index,
    start: Index,
    count: int,
    source: str,
    targets: Sequence[str],
    *,
    half: bool = False,
) -> None:
    """Take a block of a panel apart.

    Args:
        k: Where to.
        p: How the weights lie.
        panel: The panel.
        start: First word of the block, of two weights of a column each.
        count: Words of it.
        source: Memref [panels, K, W] of f16 or f32.
        targets: Memrefs [words, W] of i32 of each term.
        half: Whether a word of one weight follows, above a zero.
    """
    dtype = k.element_type(source)

    def write(word: Index, weights: int) -> None:
        depth = k.mul(k.add(start, word), 2)
        for column in range(0, p.width, p.lanes):
            values = [k.load(source, [panel, k.add(depth, i), column], p.lanes) for i in range(weights)]
            values += [k.splat(k.constant(0.0, "f32"), p.lanes)] * (2 - weights)
            rows = [split(k, x, dtype) if len(targets) > 1 else (rounded(k, x),) for x in values]
            for target, (first, second) in zip(targets, zip(*rows, strict=True), strict=True):
                k.store(pair(k, first, second), target, [word, column])

    def move(word: str, _: list[str]) -> list[str]:
        write(word, 2)
        return []

    if count:
        k.loop(count, [], move)
    if half:
        write(count, 1)
