"""Many rows of bf16 by an instruction that multiplies small matrices, for strategy ``fused_simd`` (Arm's BFMMLA).

    sums [2 x 2]  +=  a [2 rows x 4]  *  b [2 columns x 4]^T           twice the products of the instruction for pairs

An operand is the pairs of two rows of a, or columns of b, that meet: two words of the one, then two of the other. So
rows are arranged, and a block of a panel is put side by side on the stack, once for all tiles of rows; few rows read
the same weights as pairs. Sums become vectors of columns again when they are written. An odd number of pairs ends with
zeros on both sides.

Every CPU with Arm's BF16 has it; so far it ran in an emulator only. Numbers round as with pairs: subnormal ones count
as zero. Source: Arm's Architecture Reference Manual, BFMMLA (vector).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..emit.kernel_text import Index, KernelText, vector_type
from .simd_edges import each
from .simd_pairs import load_half, load_pairs
from .simd_plan import Plan
from .simd_tiled import TiledBody

_BFMMLA = "llvm.aarch64.neon.bfmmla"
_LANES = 4
_LOW, _HIGH = (0, 1, 4, 5), (2, 3, 6, 7)  # the halves of two vectors, side by side
_ZIPPED = ((0, 4, 1, 5), (2, 6, 3, 7))  # two vectors of words as two, of two columns each


def multiply(k: KernelText, a: str, b: str, total: str) -> str:
    """The sums of two rows by two columns, and what they add; each a vector of four."""
    operands = [total, *(k.as_type(value, vector_type(2 * _LANES, "bf16"), "vector.bitcast") for value in (a, b))]
    return k.intrinsic(_BFMMLA, operands, k.types[total])


def write_square_rows(k: KernelText, p: Plan, rows: Sequence[Index], source: str, target: str, tile: Index) -> None:
    """The rows of a tile, two words of each after another.

    Args:
        k: Where to.
        p: Sizes of the product.
        rows: The tile's.
        source: Memref of the rows [M, K].
        target: Memref of the tiles.
        tile: Which one.
    """
    whole = (p.depth - p.half) // _LANES * _LANES

    def move(at: Index, _: list[str]) -> list[str]:
        for i in range(0, p.tile, 2):
            upper, lower = (load_pairs(k, source, row, at, _LANES) for row in rows[i : i + 2])
            for half, lanes in ((0, _LOW), (2, _HIGH)):
                start = k.mul(k.add(at, half), p.tile)
                k.store(k.shuffle(upper, lower, lanes), target, [tile, k.add(start, 2 * i)])
        return []

    if whole:
        k.loop(whole, [], move, step=_LANES)
    for at in range(whole, p.filled):
        for i, row in enumerate(rows):
            if at == p.depth:
                word = k.constant(0, "i32")
            elif p.half and at == p.depth - 1:
                word = load_half(k, source, row, at)
            else:
                word = k.extract(load_pairs(k, source, row, at, 1), 0)
            k.store(word, target, [tile, (at - at % 2) * p.tile + 2 * i + at % 2])


class SquareBody(TiledBody):
    """Writes the body; see there for the arguments."""

    def _stack(self) -> str:
        return self.k.alloca([-(-self.p.block // 2), 2 * self.p.width], "i32")

    def _put_on_stack(self, panel: Index, start: Index, size: int) -> None:
        """The block, two words of each column after another."""
        k, places = self.k, self._places(panel)

        def put(step: Index, last: bool = False) -> None:
            word = k.add(start, k.mul(step, 2))
            for v, (stored, column) in enumerate(places):
                first = k.load(self.b, [stored, word, column], _LANES)
                zeros = k.constant(0, vector_type(_LANES, "i32"))
                second = zeros if last else k.load(self.b, [stored, k.add(word, 1), column], _LANES)
                for half, lanes in enumerate(_ZIPPED):
                    k.store(k.shuffle(first, second, lanes), self.stack, [step, (2 * v + half) * _LANES])

        if size > 1:
            each(k, size // 2, 1, put)
        if size % 2:
            put(size // 2, last=True)

    def _multiply(
        self, places: Sequence[tuple[Index, Index]], start: Index, at: Index, place: Index, sums: list[str]
    ) -> None:
        del places
        k, p = self.k, self.p
        for u in range(0, p.unroll, 2):
            depth = k.add(at, u)
            columns = range(0, 2 * p.width, _LANES)
            weights = [k.load(self.stack, [k.div(depth, 2), column], _LANES) for column in columns]
            elements = k.mul(k.add(start, depth), p.tile)
            for i in range(0, p.tile, 2):
                rows = k.load(self.a, [place, k.add(elements, 2 * i)], _LANES)
                for j, weight in enumerate(weights, i * p.vectors):
                    sums[j] = multiply(k, rows, weight, sums[j])

    def _store(self, tile: Index, panel: Index, sums: Sequence[str]) -> None:
        k, p = self.k, self.p
        each_row: list[str] = []
        for i in range(0, p.tile, 2):
            squares = sums[i * p.vectors : (i + 2) * p.vectors]
            halves = list(zip(squares[::2], squares[1::2], strict=True))
            each_row += [k.shuffle(left, right, lanes) for lanes in (_LOW, _HIGH) for left, right in halves]
        super()._store(tile, panel, each_row)
