"""The products of many rows of strategy ``fused_simd`` where a machine multiplies small matrices (Arm's I8MM).

    sums [2 x 2]  +=  a [2 rows x 8 bytes]  *  b [2 columns x 8 bytes]^T          twice a dot instruction's products

Unpacked weights of four columns are two such b: the words that meet the same eight bytes of a row, a column after
another. The sums of a block become vectors of columns again, as the scales want them; they are exact, so nothing else
changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..emit.kernel_text import Index
from .contract import MatMulNBits
from .simd_plan import Plan, groups
from .simd_products import ByteProducts, Tile

_LANES = 4


def has_squares(c: MatMulNBits, p: Plan) -> bool:
    """Whether the machine has the instruction, and weights the two fields in a word that it wants."""
    return p.instruction is not None and bool(p.instruction.matrix) and c.bits <= 4 and p.rows % 2 == 0


class SquareProducts(ByteProducts):
    """Products of bytes, four sums at once; see there for the arguments."""

    def unpack(self, word: str) -> list[str]:
        """The fields of a vector of words; of two fields the words of a column side by side."""
        k, parts = self.k, super().unpack(word)
        pairs = zip(parts[::2], parts[1::2], strict=True)
        return [k.shuffle(a, b, order) for a, b in pairs for order in ([0, 4, 1, 5], [2, 6, 3, 7])]

    def block(
        self, rows: Sequence[Index], word: Index, count: int, weight: Callable[[int, int, int], str], vectors: int
    ) -> Tile:
        """The i32 sums over ``count`` words; see :meth:`ByteProducts.block`."""
        k, per_word = self.k, groups(self.c)
        start = k.mul(word, per_word)
        zero = k.constant(0, self.ints)
        sums = {(r, v, half): zero for r in range(0, len(rows), 2) for v in range(vectors) for half in range(2)}
        for w in range(count):
            for i in range(0, len(self.fields), 2):
                at = k.add(start, w * per_word + i)
                columns = {(v, half): self._bytes(weight(w, i + half, v)) for v in range(vectors) for half in range(2)}
                for r in range(0, len(rows), 2):
                    upper, lower = (k.load(self.bytes, [row, at], 2) for row in rows[r : r + 2])
                    a = self._bytes(k.shuffle(upper, lower, range(_LANES)))
                    for (v, half), column in columns.items():
                        total = sums[r, v, half]
                        sums[r, v, half] = k.intrinsic(self.instruction.matrix, [total, a, column], self.ints)
        return [
            [k.shuffle(sums[r, v, 0], sums[r, v, 1], [i, i + 1, i + 4, i + 5]) for v in range(vectors)]
            for r in range(0, len(rows), 2)
            for i in (0, 2)
        ]

    def _bytes(self, words: str) -> str:
        return self.k.as_type(words, self.byte_vector, "vector.bitcast")
