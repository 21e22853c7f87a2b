"""Few rows of bf16 by the matrix unit (AMX), a panel of weights at a time, for strategy ``fused_simd``.

    sums [2 registers of M x 16] += a [M x 32] * b [2 of 32 x 16 columns]       M up to 15

The unit takes weights as they lie, 1 KiB an instruction: nothing is widened, and the core waits for memory alone. On 2
cores of a Sapphire Rapids one row reads 22.6 GB/s (pairs taken apart 16.4), eight rows 20.7 (8.3).
Subnormal bf16 count as zero, as for many rows.
"""

from __future__ import annotations

from ..emit.amx_tiles import ROWS, SUMS, A, AmxTiles, B
from ..emit.kernel_text import Index, KernelText
from .simd_plan import LINE, Plan

_WORDS = 16  # of K in one product
_AHEAD = 4096
"""Bytes of weights that are asked for ahead, for the second-level cache."""


class RowUnit:
    """Writes the products; made once at the start of a kernel, where the registers get their sizes.

    Args:
        k: Where to.
        p: Sizes of the products, all of equal rows.
    """

    def __init__(self, k: KernelText, p: Plan) -> None:
        self._k, self._tiles = k, AmxTiles(k, rows=p.tile)
        self._sums = k.alloca([p.tile, 2 * ROWS])

    def release(self) -> None:
        """The last instruction of the kernel."""
        self._tiles.release()

    def products(self, p: Plan, a: str, b: str, panel: Index) -> list[str]:
        """The vectors of each row, row after row: see ``direct_products``."""
        k, tiles = self._k, self._tiles
        (own, _), row_bytes = p.layout.place(k, p.width, panel, 0), p.width * 4
        for register in SUMS[:2]:
            tiles.zero(register)

        def step(word: Index, _: list[str]) -> list[str]:
            for line in range(0, _WORDS * row_bytes, LINE):
                at = k.add(word, (_AHEAD + line) // row_bytes)
                k.prefetch(b, [own, at, line % row_bytes // 4], level=2)
            tiles.load(A[0], a, [0, k.mul(word, 2)])
            for half, (register, total) in enumerate(zip(B, SUMS[:2], strict=True)):
                tiles.load(register, b, [own, word, half * ROWS])
                tiles.multiply_bf16(total, A[0], register)
            return []

        k.loop(p.depth, [], step, step=_WORDS)
        for half, total in enumerate(SUMS[:2]):
            tiles.store(total, self._sums, [0, half * ROWS])
        return [k.load(self._sums, [i, v * p.lanes], p.lanes) for i in range(p.tile) for v in range(p.vectors)]
