"""The body of strategy ``fused_simd`` for few rows: each weight is multiplied as it is unpacked, in registers.

A workgroup arranges the rows of A on its stack, then goes through its columns a tile at a time, along K.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..emit.kernel_text import Index, KernelText, vector_type
from .contract import MatMulNBits
from .simd_columns import Columns
from .simd_edges import Edges
from .simd_plan import CHUNK, Plan
from .simd_products import ByteProducts, FloatProducts, Tile, as_tile, flat
from .simd_rows import RowWriter, arranged_specs, is_arranged

_UNROLLED_WORDS = 8


class DirectBody:
    """Writes the kernel's body.

    Args:
        k: Where to.
        c: What it computes.
        p: Its sizes.
        memrefs: A, words, scales, zero points (if any), bias (if any), the product.
    """

    def __init__(self, k: KernelText, c: MatMulNBits, p: Plan, memrefs: Sequence[str]) -> None:
        self.k, self.c, self.p = k, c, p
        given = iter(memrefs)
        source, words, scales = next(given), next(given), next(given)
        zeros = next(given) if c.zero_points != "default" else None
        bias = next(given) if c.with_bias else None
        columns = Columns(k, c, p, words, scales, zeros)
        self.edges = Edges(k, c, p, bias, next(given))
        self._prefetch_first(columns)
        arranged = [source]
        if is_arranged(c, p):
            arranged = [k.alloca([d or 1 for d in s.shape], s.dtype) for s in arranged_specs(c, p, p.rows)]
            writer = RowWriter(k, c, p, source, arranged)
            for row in range(p.rows):
                writer.write(row, row)
        self.products = DirectProducts(k, c, p, columns, arranged, range(p.rows))

    def _prefetch_first(self, columns: Columns) -> None:
        """Ask for the first tile, which comes while A is arranged."""
        whole = self.c.blocks // CHUNK * CHUNK
        first = self.edges.first

        def group(block: str, _: list[str]) -> list[str]:
            columns.prefetch(first, block, CHUNK)
            return []

        self.k.loop(whole, [], group, step=CHUNK)

    def write(self) -> None:
        """The whole body."""

        def tile(column: Index) -> None:
            for row, line in enumerate(self.products.tile(column, self.edges.after(column))):
                self.edges.write(row, column, line)

        self.edges.each_tile(tile)


class DirectProducts:
    """Products of some rows by tiles of columns.

    Args:
        k: Where to write.
        c: What is computed.
        p: Its sizes.
        columns: The weights.
        arranged: Memrefs of the rows: see ``simd_rows``.
        rows: Which rows of those.
    """

    def __init__(
        self, k: KernelText, c: MatMulNBits, p: Plan, columns: Columns, arranged: Sequence[str], rows: Sequence[Index]
    ) -> None:
        self.k, self.c, self.p, self.columns, self.rows = k, c, p, columns, list(rows)
        self.bytes = ByteProducts(k, c, p, arranged) if p.instruction else None
        self.floats = None if p.instruction else FloatProducts(k, c, p, arranged[0])

    def tile(self, column: Index, after: Index) -> Tile:
        """The sums of the tile at ``column``, while that at ``after`` is asked for."""
        k, c, p = self.k, self.c, self.p
        zero = k.constant(0.0, vector_type(p.lanes))
        whole = c.blocks // CHUNK * CHUNK
        sums = k.loop(
            whole,
            [zero] * (p.rows * p.vectors),
            lambda b, carried: flat(self._group(as_tile(carried, p.vectors), column, after, b, CHUNK)),
            step=CHUNK,
        )
        tile = as_tile(sums, p.vectors)
        return self._group(tile, column, after, whole, c.blocks - whole) if whole < c.blocks else tile

    def _group(self, sums: Tile, column: Index, after: Index, block: Index, count: int) -> Tile:
        """``sums`` and the products of at most four blocks."""
        k, c, p = self.k, self.c, self.p
        starts = [k.add(column, v * p.lanes) for v in range(p.vectors)]
        factors = [self.columns.factors(start, block, count) for start in starts]
        first = k.mul(block, c.block_words)
        loaded: dict[tuple[int, int], list[str]] = {}

        def word(w: int, v: int) -> str:
            """Word ``w`` of the group."""
            chunk = w // CHUNK * CHUNK
            if (chunk, v) not in loaded:
                size = min(CHUNK, count * c.block_words - chunk)
                loaded[chunk, v] = self.columns.words(starts[v], k.add(first, chunk), size)
            return loaded[chunk, v][w - chunk]

        for i in range(count):
            at = k.add(block, i)
            own = [f[i] for f in factors]
            self.columns.prefetch(after, at, 1)  # a few lines at a time: those of four blocks fill a core's buffers
            if c.block_words <= _UNROLLED_WORDS:
                base = i * c.block_words
                parts: list[Tile] = []
                for w in range(0, c.block_words, CHUNK):
                    size = min(CHUNK, c.block_words - w)
                    words = [[word(base + w + s, v) for v in range(p.vectors)] for s in range(size)]
                    parts.append(self._chunk(k.add(first, base + w), words, own))
                total = parts[0]
                for part in parts[1:]:
                    total = self._sum(total, part)
            else:
                total = self._long_block(starts, k.add(first, i * c.block_words), own)
            sums = self._scaled(sums, total, at, own)
        return sums

    def _long_block(self, starts: Sequence[Index], first: Index, own: Sequence[tuple[str, str | None]]) -> Tile:
        """The sums of one block, as a loop over its words."""
        k, c, p = self.k, self.c, self.p
        kind = vector_type(p.lanes, "i32" if self.bytes else "f32")
        zero = k.constant(0, kind)

        def body(w: str, carried: list[str]) -> list[str]:
            at = k.add(first, w)
            columns = [self.columns.words(start, at, CHUNK) for start in starts]
            words = [[line[s] for line in columns] for s in range(CHUNK)]
            return flat(self._sum(as_tile(carried, p.vectors), self._chunk(at, words, own)))

        return as_tile(k.loop(c.block_words, [zero] * (p.rows * p.vectors), body, step=CHUNK), p.vectors)

    def _chunk(self, first: Index, words: Sequence[Sequence[str]], own: Sequence[tuple[str, str | None]]) -> Tile:
        """The sums over some words of a block, unscaled; ``words[word][vector]``."""
        rows = self.rows
        if self.bytes is not None:
            fields = [[self.bytes.unpack(w) for w in line] for line in words]
            return self.bytes.block(rows, first, len(words), lambda w, f, v: fields[w][v][f], self.p.vectors)
        assert self.floats is not None
        zero = self.k.constant(0.0, vector_type(self.p.lanes))
        sums = [[zero] * self.p.vectors for _ in rows]
        for i, line in enumerate(words):
            unpacked = [self.floats.unpack(w, z) for w, (_, z) in zip(line, own, strict=True)]
            depth = self.k.mul(self.k.add(first, i), self.c.per_word)
            sums = self.floats.add(sums, rows, depth, list(zip(*unpacked, strict=True)))
        return sums

    def _sum(self, a: Tile, b: Tile) -> Tile:
        add = self.k.addi if self.bytes else self.k.addf
        return [[add(x, y) for x, y in zip(r, s, strict=True)] for r, s in zip(a, b, strict=True)]

    def _scaled(self, sums: Tile, block: Tile, at: Index, own: Sequence[tuple[str, str | None]]) -> Tile:
        """``sums`` and the sums of one block, scaled."""
        k = self.k
        if self.bytes is not None:
            factors = [(scale, None if zero is None else k.mulf(zero, scale)) for scale, zero in own]
            return self.bytes.add_blocks(sums, block, self.rows, at, factors)
        return [
            [k.fma(part, scale, total) for total, part, (scale, _) in zip(line, parts, own, strict=True)]
            for line, parts in zip(sums, block, strict=True)
        ]
