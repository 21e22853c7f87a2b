"""Reads packed weights for strategy ``fused_simd``: vectors whose lanes are columns.

A column's words lie side by side in memory. Four words of each column of a vector are loaded at once and transposed,
as are the scales and zero points of four blocks, so that no product needs a sum over lanes.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..emit.kernel_text import Index, KernelText, vector_type
from .contract import MatMulNBits
from .simd_plan import CHUNK, Plan

_LINE_BYTES = 64


class Columns:
    """The weights of a kernel.

    Args:
        k: Where to write.
        c: What is computed.
        p: Its sizes.
        words: Memref of the packed weights, i32 [N, words of K].
        scales: Memref [N, blocks].
        zeros: Memref of the zero points, or None.
    """

    def __init__(self, k: KernelText, c: MatMulNBits, p: Plan, words: str, scales: str, zeros: str | None) -> None:
        self.k, self.c, self.p = k, c, p
        self._words, self._scales, self._zeros = words, scales, zeros

    def words(self, column: Index, word: Index, count: int) -> list[str]:
        """Words ``word`` to ``word + count`` (at most four) of the columns from ``column`` on."""
        return self._transposed(self._words, column, word, count)

    def factors(self, column: Index, block: Index, count: int) -> list[tuple[str, str | None]]:
        """Scale and zero point of ``count`` (at most four) blocks; no zero point where it is the default one."""
        scales = self._transposed(self._scales, column, block, count)
        if self._zeros is None:
            return [(scale, None) for scale in scales]
        if self.c.zero_points == "float":
            zeros = self._transposed(self._zeros, column, block, count)
        else:
            zeros = self._packed_zeros(self._zeros, column, block, count)
        return list(zip(scales, zeros, strict=True))

    def prefetch(self, column: Index, block: Index, count: int) -> None:
        """Ask for the tile at ``column``: for the share of ``count`` blocks, in the order of memory."""
        k, c, tile = self.k, self.c, self.p.tile
        for memref, per_block in ((self._words, c.block_words), (self._scales, 1)):
            start = k.mul(block, tile * per_block)
            for element in range(0, tile * per_block * count, _LINE_BYTES // k.element_bytes(memref)):
                k.prefetch(memref, [column, k.add(start, element)])

    def _packed_zeros(self, memref: str, column: Index, block: Index, count: int) -> list[str]:
        """Of blocks that start a byte."""
        k, bits, lanes = self.k, self.c.bits, self.p.lanes
        first = k.div(k.mul(block, bits), 8)
        ints, floats = vector_type(lanes, "i32"), vector_type(lanes)
        joined = k.constant(0, ints)
        for byte in range(-(-count * bits // 8)):
            lane_bytes = [k.load(memref, [k.add(column, lane), k.add(first, byte)]) for lane in range(lanes)]
            narrow = vector_type(lanes, "i8")
            vector = k.op(f"vector.from_elements {', '.join(lane_bytes)} : {narrow}", narrow)
            wide = k.as_type(vector, ints, "arith.extui")
            if byte:
                wide = k.op(f"arith.shli {wide}, {k.constant(8 * byte, ints)} : {ints}", ints)
            joined = k.op(f"arith.ori {joined}, {wide} : {ints}", ints) if byte else wide
        mask = k.constant((1 << bits) - 1, ints)
        return [k.as_type(k.andi(k.shift_right(joined, bits * i), mask), floats, "arith.sitofp") for i in range(count)]

    def _transposed(self, memref: str, column: Index, start: Index, count: int) -> list[str]:
        """Elements ``start`` to ``start + count`` of each column: a vector each, a lane a column."""
        k, lanes = self.k, self.p.lanes
        columns = [self._quarter(memref, k.add(column, i), start, count) for i in range(lanes)]
        # Quarters i, i + 4, ... side by side, so that what is left happens within 128 bits.
        rows = [self._join(columns[i::CHUNK]) for i in range(CHUNK)]

        def mix(a: str, b: str, pattern: Sequence[tuple[int, int]]) -> str:
            quarters = range(0, lanes, CHUNK)
            return k.shuffle(a, b, [q + element + lanes * other for q in quarters for other, element in pattern])

        low, high = [(0, 0), (1, 0), (0, 1), (1, 1)], [(0, 2), (1, 2), (0, 3), (1, 3)]
        first, second = [(0, 0), (0, 1), (1, 0), (1, 1)], [(0, 2), (0, 3), (1, 2), (1, 3)]
        halves = [(mix(rows[0], rows[1], half), mix(rows[2], rows[3], half)) for half in (low, high)]
        return [mix(a, b, pattern) for a, b in halves for pattern in (first, second)][:count]

    def _quarter(self, memref: str, column: Index, start: Index, count: int) -> str:
        """Four elements of a column, of which the first ``count`` are its own."""
        k = self.k
        vector = k.load(memref, [column, start], count)
        return vector if count == CHUNK else k.shuffle(vector, vector, [min(i, count - 1) for i in range(CHUNK)])

    def _join(self, parts: Sequence[str]) -> str:
        while len(parts) > 1:
            width = 2 * self.k.lanes(parts[0])
            parts = [self.k.shuffle(a, b, range(width)) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]
