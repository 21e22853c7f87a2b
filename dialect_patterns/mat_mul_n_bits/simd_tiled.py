"""The body of strategy ``fused_simd`` for many rows: weights are unpacked tile by tile, and met by 64 rows.

for each tile of columns: for each slab of blocks along K:
unpack the weights of the slab to the stack      bytes, or dequantised f32
for each register tile of rows: sums (on the stack) += A x weights
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..emit.kernel_text import Index, KernelText, vector_type
from .contract import MatMulNBits
from .simd_columns import Columns
from .simd_edges import Edges
from .simd_plan import CHUNK, Plan
from .simd_products import ByteProducts, FloatProducts, Tile, as_tile, flat
from .simd_rows import arranged_specs
from .simd_squares import SquareProducts, has_squares


class TiledBody:
    """Writes the kernel's body.

    Args:
        k: Where to.
        c: What it computes.
        p: Its sizes.
        rows: M.
        memrefs: A as ``simd_rows`` arranges it, words, scales, zero points (if any), bias (if any), the product.
        before: Columns of other matrices in front of this one's weights.
    """

    def __init__(
        self, k: KernelText, c: MatMulNBits, p: Plan, rows: Index, memrefs: Sequence[str], before: Index = 0
    ) -> None:
        self.k, self.c, self.p, self.total, self.before = k, c, p, rows, before
        given = iter(memrefs)
        arranged = [next(given) for _ in arranged_specs(c, p, None)]
        words, scales = next(given), next(given)
        zeros = next(given) if c.zero_points != "default" else None
        bias = next(given) if c.with_bias else None
        self.columns = Columns(k, c, p, words, scales, zeros)
        self.edges = Edges(k, c, p, bias, next(given))
        self.bytes = (
            (SquareProducts if has_squares(c, p) else ByteProducts)(k, c, p, arranged) if p.instruction else None
        )
        self.floats = None if p.instruction else FloatProducts(k, c, p, arranged[0])
        self.parts = len(self.bytes.fields) if self.bytes else c.per_word
        self.unpacked = self._stack_for_weights()
        self.scales = k.alloca([p.slab, p.tile])
        self.zeros = k.alloca([p.slab, p.tile]) if zeros else None
        self.sums = self._stack_for_sums()
        self.first, self.count = self._rows_of_workgroup()

    def _stack_for_weights(self) -> str:
        """Memref of unpacked weights on the stack."""
        rows = self.p.slab * self.c.block_words * self.parts
        return self.k.alloca([rows, self.p.tile], "i32" if self.bytes else "f32")

    def _stack_for_sums(self) -> str:
        """Memref of the sums on the stack."""
        return self.k.alloca([self.p.row_block, self.p.tile])

    def _rows_of_workgroup(self) -> tuple[Index, Index]:
        """First and number of this workgroup's rows."""
        k, p = self.k, self.p
        first = k.mul(k.op("hal.interface.workgroup.id[1] : index", "index"), p.row_block)
        return first, k.minimum(k.sub(self.total, first), p.row_block)

    def write(self) -> None:
        """The whole body."""
        self.edges.each_tile(self._tile)

    def _tile(self, column: Index) -> None:
        k, c, p = self.k, self.c, self.p
        zero = k.constant(0.0, vector_type(p.lanes))

        def clear(row: str, _: list[str]) -> list[str]:
            for v in range(p.vectors):
                k.store(zero, self.sums, [row, v * p.lanes])
            return []

        def slab(block: Index, _: list[str]) -> list[str]:
            blocks = p.slab if c.blocks % p.slab == 0 else k.minimum(k.sub(c.blocks, block), p.slab)
            self._unpack(column, block, blocks)
            self._all_rows(block, blocks)
            return []

        def write(row: str, _: list[str]) -> list[str]:
            sums = [k.load(self.sums, [row, v * p.lanes], p.lanes) for v in range(p.vectors)]
            self.edges.write(k.add(self.first, row), column, sums)
            return []

        k.loop(p.row_block, [], clear)
        if p.slab == c.blocks:
            slab(0, [])
        else:
            k.loop(c.blocks, [], slab, step=p.slab)
        k.loop(self.count, [], write)

    # ---- weights ---------------------------------------------------------------------------------------------------
    def _unpack(self, column: Index, block: Index, blocks: Index) -> None:
        """The weights and their factors of some blocks to the stack."""
        k, c = self.k, self.c
        self._in_chunks(CHUNK, blocks, c.blocks, lambda at, count: self._unpack_factors(column, block, at, count))
        first = k.mul(block, c.block_words)
        words = k.mul(blocks, c.block_words)
        self._in_chunks(CHUNK, words, c.row_words, lambda at, count: self._unpack_words(column, first, at, count))

    def _in_chunks(self, chunk: int, size: Index, total: int, body: Callable[[Index, int], None]) -> None:
        """``body(offset, count)`` for ``size`` of ``total`` things, the last of all in what is left of a chunk."""
        k = self.k
        whole = k.mul(k.div(size, chunk), chunk)

        def full(at: str, _: list[str]) -> list[str]:
            body(at, chunk)
            return []

        k.loop(whole, [], full, step=chunk)
        if total % chunk:

            def rest() -> list[str]:
                body(whole, total % chunk)
                return []

            if isinstance(size, int):
                if size % chunk:
                    rest()
            else:
                k.when(k.less(whole, size), [], rest, lambda: [])

    def _unpack_factors(self, column: Index, first: Index, at: Index, count: int) -> None:
        k, p = self.k, self.p
        for v in range(p.vectors):
            start, lane = k.add(k.add(self.before, column), v * p.lanes), v * p.lanes
            for i, (scale, zero) in enumerate(self.columns.factors(start, k.add(first, at), count)):
                k.store(scale, self.scales, [k.add(at, i), lane])
                if zero is not None and self.zeros is not None:
                    k.store(self._zero(zero, scale), self.zeros, [k.add(at, i), lane])

    def _zero(self, zero: str, scale: str) -> str:
        """What the stack has of the zero points of a vector of columns."""
        return self.k.mulf(zero, scale) if self.bytes else zero

    def _unpack_words(self, column: Index, first: Index, at: Index, count: int) -> None:
        k, c, p = self.k, self.c, self.p
        for v in range(p.vectors):
            start, lane = k.add(k.add(self.before, column), v * p.lanes), v * p.lanes
            block = k.div(at, c.block_words)
            for i, word in enumerate(self.columns.words(start, k.add(first, at), count)):
                own = [k.add(block, i // c.block_words), lane]
                parts = self._float_fields(word, own) if self.bytes is None else self._byte_fields(word, own)
                place = k.mul(k.add(at, i), len(parts))
                for j, part in enumerate(parts):
                    k.store(part, self.unpacked, [k.add(place, j), lane])

    def _float_fields(self, word: str, own: Sequence[Index]) -> list[str]:
        """The weights of a vector of words; ``own`` is where the stack has what is their block's."""
        k, p = self.k, self.p
        assert self.floats is not None
        zero = k.load(self.zeros, own, p.lanes) if self.zeros else None
        scale = k.load(self.scales, own, p.lanes)
        return [k.mulf(w, scale) for w in self.floats.unpack(word, zero)]

    def _byte_fields(self, word: str, own: Sequence[Index]) -> list[str]:
        """A vector of words with a weight a byte; ``own`` is where the stack has what is their block's."""
        del own
        assert self.bytes is not None
        return self.bytes.unpack(word)

    # ---- products --------------------------------------------------------------------------------------------------
    def _all_rows(self, block: Index, blocks: Index) -> None:
        """All rows times the unpacked weights."""
        self.k.loop(self.count, [], lambda row, _: self._rows(row, block, blocks), step=self.p.rows)

    def _rows(self, row: Index, block: Index, blocks: Index) -> list[str]:
        """Some rows times the unpacked weights."""
        k, p = self.k, self.p
        places = [(k.add(row, i), v * p.lanes) for i in range(p.rows) for v in range(p.vectors)]
        sums = [k.load(self.sums, place, p.lanes) for place in places]
        rows = [k.add(k.add(self.first, row), i) for i in range(p.rows)]
        if not isinstance(self.total, int) or self.total % p.rows:
            last = k.sub(self.total, 1)
            rows = [k.minimum(r, last) for r in rows]
        step = self._byte_blocks if self.bytes is not None else self._float_words
        sums = step(sums, rows, block, blocks)
        for place, value in zip(places, sums, strict=True):
            k.store(value, self.sums, place)
        return []

    def _byte_blocks(self, sums: list[str], rows: Sequence[Index], first: Index, blocks: Index) -> list[str]:
        k, c, p, products = self.k, self.c, self.p, self.bytes
        assert products is not None

        def chunk(block: Index, word: Index, count: int) -> Tile:
            place = k.mul(k.add(k.mul(block, c.block_words), word), self.parts)
            start = k.add(k.mul(k.add(first, block), c.block_words), word)

            def weight(w: int, field: int, v: int) -> str:
                return k.load(self.unpacked, [k.add(place, w * self.parts + field), v * p.lanes], p.lanes)

            return products.block(rows, start, count, weight, p.vectors)

        def one(block: str, carried: list[str]) -> list[str]:
            if c.block_words <= CHUNK:
                total = chunk(block, 0, c.block_words)
            else:
                zero = k.constant(0, vector_type(p.lanes, "i32"))

                def body(word: str, partial: list[str]) -> list[str]:
                    found = flat(chunk(block, word, CHUNK))
                    return [k.addi(a, b) for a, b in zip(partial, found, strict=True)]

                total = as_tile(k.loop(c.block_words, [zero] * len(carried), body, step=CHUNK), p.vectors)
            factors = [
                (
                    k.load(self.scales, [block, v * p.lanes], p.lanes),
                    k.load(self.zeros, [block, v * p.lanes], p.lanes) if self.zeros else None,
                )
                for v in range(p.vectors)
            ]
            return flat(products.add_blocks(as_tile(carried, p.vectors), total, rows, k.add(first, block), factors))

        return k.loop(blocks, sums, one)

    def _float_words(self, sums: list[str], rows: Sequence[Index], first: Index, blocks: Index) -> list[str]:
        k, c, p, products = self.k, self.c, self.p, self.floats
        assert products is not None
        start = k.mul(first, c.block_words)

        def one(word: str, carried: list[str]) -> list[str]:
            place = k.mul(word, self.parts)
            weights = [
                [k.load(self.unpacked, [k.add(place, i), v * p.lanes], p.lanes) for v in range(p.vectors)]
                for i in range(self.parts)
            ]
            depth = k.mul(k.add(start, word), c.per_word)
            return flat(products.add(as_tile(carried, p.vectors), rows, depth, weights))

        return k.loop(k.mul(blocks, c.block_words), sums, one)
