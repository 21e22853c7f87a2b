"""The products of strategy ``fused_simd``: some rows of A times some vectors of columns.

Of bytes, for a block b (q and r the rounded weights and elements of A, exact in integers):

    y += (s_a sum(q r) - z s_a sum(r)) s_b

In f32: y += s_b sum((q - z) a), or with weights that are dequantised already y += sum(w a).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..emit.kernel_text import Index, KernelText, vector_type
from .contract import MatMulNBits
from .simd_plan import Field, Plan, fields, groups

Tile = list[list[str]]
"""A vector for each row and each vector of columns."""


def flat(tile: Tile) -> list[str]:
    """All vectors of a tile."""
    return [value for line in tile for value in line]


def as_tile(values: Sequence[str], vectors: int) -> Tile:
    """The tile with these values, ``vectors`` a row."""
    return [list(values[i : i + vectors]) for i in range(0, len(values), vectors)]


class ByteProducts:
    """Products of bytes.

    Args:
        k: Where to write.
        c: What is computed.
        p: Its sizes.
        arranged: Memrefs of the rows of A: bytes, steps, offsets.
    """

    def __init__(self, k: KernelText, c: MatMulNBits, p: Plan, arranged: Sequence[str]) -> None:
        assert p.instruction is not None
        self.k, self.c, self.p, self.instruction = k, c, p, p.instruction
        self.bytes, self.steps, self.offsets = arranged
        self.fields: list[Field] = fields(c, p.instruction)
        self.ints = vector_type(p.lanes, "i32")
        self.byte_vector = vector_type(4 * p.lanes, "i8")

    def unpack(self, word: str) -> list[str]:
        """The fields of a vector of words, as vectors of words with a weight a byte."""
        k = self.k
        return [
            k.andi(k.shift_right(word, f.shift), k.constant(f.mask * 0x01010101, self.ints)) if f.mask != 255 else word
            for f in self.fields
        ]

    def block(
        self, rows: Sequence[Index], word: Index, count: int, weight: Callable[[int, int, int], str], vectors: int
    ) -> Tile:
        """The i32 sums over ``count`` words from ``word`` of the row on.

        Args:
            rows: Rows of the arranged A.
            word: First word, counted from the start of the row.
            count: Words, few enough for sums in 16 bits: at most four.
            weight: Word, field and vector of columns -> what :meth:`unpack` gives.
            vectors: How many vectors of columns.
        """
        k, per_word = self.k, groups(self.c)
        start = k.mul(word, per_word)
        partial: dict[tuple[int, int, int], str] = {}
        for w in range(count):
            a: dict[tuple[int, int], str] = {}
            for index, field in enumerate(self.fields):
                columns = [k.as_type(weight(w, index, v), self.byte_vector, "vector.bitcast") for v in range(vectors)]
                for r, row in enumerate(rows):
                    if (r, field.group) not in a:
                        group = k.load(self.bytes, [row, k.add(start, w * per_word + field.group)])
                        a[r, field.group] = k.as_type(k.splat(group, self.p.lanes), self.byte_vector, "vector.bitcast")
                    for v, column in enumerate(columns):
                        key = (r, v, field.factor)
                        partial[key] = self._multiply(partial.get(key), column, a[r, field.group])
        return [[self._join(partial, r, v) for v in range(vectors)] for r in range(len(rows))]

    def _multiply(self, total: str | None, column: str, a: str) -> str:
        k, name = self.k, self.instruction
        if name.dot:
            return k.intrinsic(name.dot, [total or k.constant(0, self.ints), column, a], self.ints)
        products = k.intrinsic(name.pairs, [column, a], vector_type(2 * self.p.lanes, "i16"))
        return products if total is None else k.addi(total, products)

    def _join(self, partial: dict[tuple[int, int, int], str], row: int, vector: int) -> str:
        """The sums of all fields, each as often as it counts."""
        k, total = self.k, None
        for factor in sorted({f.factor for f in self.fields}):
            value = partial[row, vector, factor]
            if self.instruction.widen:
                weight = k.constant(factor, self.k.types[value])
                value = k.intrinsic(self.instruction.widen, [value, weight], self.ints)
            elif factor != 1:
                value = k.op(f"arith.muli {value}, {k.constant(factor, self.ints)} : {self.ints}", self.ints)
            total = value if total is None else k.addi(total, value)
        assert total is not None
        return total

    def add_blocks(
        self, sums: Tile, ints: Tile, rows: Sequence[Index], block: Index, factors: Sequence[tuple[str, str | None]]
    ) -> Tile:
        """``sums`` and what the i32 sums of a block count.

        Args:
            sums: In f32.
            ints: Of the block.
            rows: Rows of the arranged A.
            block: The block, counted from the start of the row.
            factors: For each vector of columns the scale, and zero point times scale or None.
        """
        k = self.k
        result: Tile = []
        for row, totals, values in zip(rows, sums, ints, strict=True):
            place = self.factor_place(row, block)
            step, offset = k.load(self.steps, place), k.load(self.offsets, place)
            step, offset = k.splat(step, self.p.lanes), k.splat(offset, self.p.lanes)
            line: list[str] = []
            for total, value, (scale, zero) in zip(totals, values, factors, strict=True):
                real = k.as_type(value, vector_type(self.p.lanes), "arith.sitofp")
                if zero is None:
                    line.append(k.fma(k.fma(real, step, offset), scale, total))
                else:
                    line.append(k.fma(offset, zero, k.fma(k.mulf(real, step), scale, total)))
            result.append(line)
        return result

    def factor_place(self, row: Index, block: Index) -> list[Index]:
        """Where the step and the offset of a row's block are."""
        return [row, block]


class FloatProducts:
    """Products in f32.

    Args:
        k: Where to write.
        c: What is computed.
        p: Its sizes.
        a: Memref of the rows of A, f32.
    """

    def __init__(self, k: KernelText, c: MatMulNBits, p: Plan, a: str) -> None:
        self.k, self.c, self.p, self.a = k, c, p, a
        self._ints, self._floats = vector_type(p.lanes, "i32"), vector_type(p.lanes)

    def unpack(self, word: str, zero: str | None) -> list[str]:
        """The weights of a vector of words, in order, less their zero point, unscaled."""
        k, c = self.k, self.c
        offset = zero or k.constant(c.default_zero, self._floats)
        mask = k.constant((1 << c.bits) - 1, self._ints)
        values = [k.shift_right(word, i * c.bits) for i in range(c.per_word)]
        values = [k.andi(v, mask) for v in values[:-1]] + values[-1:]
        return [k.subf(k.as_type(v, self._floats, "arith.sitofp"), offset) for v in values]

    def add(self, sums: Tile, rows: Sequence[Index], depth: Index, weights: Sequence[Sequence[str]]) -> Tile:
        """``sums`` and the products of the elements of A from ``depth`` on with weights[element][vector]."""
        k = self.k
        for i, columns in enumerate(weights):
            at = k.add(depth, i)
            elements = [k.splat(k.load(self.a, [row, at]), self.p.lanes) for row in rows]
            sums = [
                [k.fma(a, w, total) for w, total in zip(columns, line, strict=True)]
                for a, line in zip(elements, sums, strict=True)
            ]
        return sums
