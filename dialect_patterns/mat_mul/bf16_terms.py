"""Numbers of f16 and f32 as sums of two bf16, for units that multiply bf16.

    x = hi + lo        a b = hi hi + hi lo + lo hi, and lo lo, which is left out

An f16 is exactly such a sum. Its hi is the upper part of its bits, so that lo has the same sign; where nothing is left,
lo is the smallest number of that sign: so an infinite factor stays one, where 0 or another sign would make it NaN. An
f32 loses what is below 2^-16 of it, so only ``--math fast`` takes it apart, into rounded terms (error 5e-6, not 2e-5);
an infinite factor may become NaN.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..emit.kernel_text import Index, KernelText
from .simd_plan import Plan

PRODUCTS = ((0, 0), (0, 1), (1, 0))
"""Which terms are multiplied, in an order that changes one side at a time."""

_UPPER = -65536
_HALF = 0x8000
_LARGE = 0x7F7F8000
_SIGN = -(1 << 31)
_LEAST = 0x00800000


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

    def rounded(bits: str) -> str:
        """To the next bf16; the largest numbers, inf and NaN to the next one nearer to zero, not to inf or -0."""
        magnitude = k.andi(bits, k.constant(~_SIGN, ints))
        small = k.op(f"arith.cmpi ult, {magnitude}, {k.constant(_LARGE, ints)} : {ints}", mask)
        half = k.select(small, k.constant(_HALF, ints), k.constant(0, ints))
        return k.andi(k.addi(bits, half), upper)

    bits = k.as_type(x, ints, "arith.bitcast")
    high = rounded(bits) if dtype == "f32" else k.andi(bits, upper)
    value = k.as_type(high, floats, "arith.bitcast")
    rest = k.as_type(k.subf(x, value), ints, "arith.bitcast")
    if dtype == "f32":
        return high, rounded(rest)
    same = k.op(f"arith.cmpf oeq, {x}, {value} : {floats}", mask)
    least = k.op(f"arith.ori {k.andi(high, k.constant(_SIGN, ints))}, {k.constant(_LEAST, ints)} : {ints}", ints)
    return high, k.select(same, least, k.andi(rest, upper))


def pair(k: KernelText, first: str, second: str) -> str:
    """Words of two bf16 from their bits in the upper halves."""
    words = k.shift_right(first, 16)
    return k.op(f"arith.ori {words}, {second} : {k.types[words]}", k.types[words])


def write_split_rows(k: KernelText, row: Index, depth: int, lanes: int, source: str, target: str) -> None:
    """Take a row of f16 or f32 apart.

    Args:
        k: Where to.
        row: Which.
        depth: K, a multiple of two vectors.
        lanes: Of a vector.
        source: Memref [M, K].
        target: Memref of pairs [2, M, K / 2], i32.
    """
    dtype = k.element_type(source)

    def move(at: str, _: list[str]) -> list[str]:
        vectors = [k.load(source, [row, k.add(at, half * lanes)], lanes) for half in range(2)]
        even, odd = ([*range(parity, 2 * lanes, 2)] for parity in range(2))
        first, second = vectors
        parts = [split(k, k.shuffle(first, second, order), dtype) for order in (even, odd)]
        terms = zip(*parts, strict=True)
        for term, (first, second) in enumerate(terms):
            k.store(pair(k, first, second), target, [term, row, k.div(at, 2)])
        return []

    k.loop(depth, [], move, step=2 * lanes)


def write_split_weights(
    k: KernelText, p: Plan, panel: Index, start: Index, count: int, source: str, targets: Sequence[str]
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
    """
    dtype = k.element_type(source)

    def move(word: str, _: list[str]) -> list[str]:
        depth = k.mul(k.add(start, word), 2)
        for column in range(0, p.width, p.lanes):
            rows = [split(k, k.load(source, [panel, k.add(depth, i), column], p.lanes), dtype) for i in range(2)]
            for target, (first, second) in zip(targets, zip(*rows, strict=True), strict=True):
                k.store(pair(k, first, second), target, [word, column])
        return []

    k.loop(count, [], move)
