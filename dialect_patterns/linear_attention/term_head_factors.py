"""The first kernel of strategy ``fused_term_chunks`` for decays of a head, or none: f32 with ``--math fast``.

As ``mma_chunk_factors``, since such decays can be applied to sums; keys and queries are in the workgroup's memory in
two terms. What the second kernel gets is the same as with decays of key dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from iree.compiler import ir

from ..emit.chunk_words import LOW, NUMBERS
from ..emit.scalar import Scalar
from .mma_chunk_factors import BAD, KEYS, NOTES, QUERIES, STRIDE, THREADS
from .mma_chunk_operands import CHUNK, LARGEST, PRE, REST, SIDE, SUBGROUP, VECTORS, WORDS, magnitude
from .term_chunk_matrices import TermMatrices
from .term_chunk_operands import TermPlan


class TermHeadFactors(TermMatrices):
    """Emits the kernel.

    Buffers: query, key, decay and beta where the rule has them, factors [B * max(Hq, Hkv), chunks, numbers].
    """

    @staticmethod
    def bytes_of(p: TermPlan) -> int:
        """Bytes of the workgroup's memory."""
        return 16 * 4 * CHUNK * p.stride_k + 4 * ((2 if p.delta else 1) * CHUNK * STRIDE + VECTORS + NOTES)

    def emit(self) -> None:
        """Emit everything."""
        k, item = self.k, self.k.item()
        self.tiles = k.shared_chunks(4 * CHUNK * self.p.stride_k)
        self.products = k.shared((2 if self.c.has_delta else 1) * CHUNK * STRIDE)
        self.vectors = k.shared(VECTORS)
        self.notes = k.shared(NOTES)
        k.when(item < self.count, lambda: self._chunk(item))

    def _places(self) -> Iterator[tuple[Scalar, Scalar]]:
        """Token and eight of each of this thread's parts of keys and of queries."""
        for i in range(0, self.plan.tile, THREADS):
            yield (self.thread + i).divide_unsigned(self.plan.line)

    def _tiles(self) -> Callable[[], None]:
        """What puts keys, then queries, into the workgroup's memory, in two terms each."""
        return self._put_tiles

    def _put_tiles(self) -> None:
        k, o, size = self.k, self.o, CHUNK * self.p.stride_k
        for n, (load, kind) in enumerate(((o.key_eight, KEYS), (o.query_eight, QUERIES))):
            for row, part in self._places():
                values = o.eight_of(load(self.start + row, part))
                self._check(values, kind)
                for i, term in enumerate(self._terms(values)):
                    k.store_as_is(term, self.tiles, row * self.p.stride_k + part + (2 * n + i) * size)

    def _multiply(self) -> None:
        """k_i . k_j, where the rule wants them, and q_i . k_j."""
        k, p = self.k, self.p
        size, line = CHUNK * p.stride_k, SIDE * p.stride_k
        subgroup = self.thread.divide_unsigned(SUBGROUP)[0]
        kind, rest = subgroup.divide_unsigned(2)
        if self.c.has_delta:
            rows, columns = kind * (2 * size) + rest * line, [Scalar.constant(j, "index") for j in (0, 1)]
            place = kind * (CHUNK * STRIDE) + rest * (SIDE * STRIDE)
        else:
            rows, columns = kind * line + 2 * size, [rest]
            place = kind * (SIDE * STRIDE)
        for column in columns:
            k.matrix_store(self._product(rows, column * line), self.products, place + column * SIDE, STRIDE)

    def _product(self, rows: Scalar, columns: Scalar) -> ir.Value:
        """16 keys or queries times 16 keys."""
        k, p = self.k, self.p
        size, stride = CHUNK * p.stride_k, p.half_stride(p.stride_k)
        sums, low = k.matrix_zero(), k.matrix_zero()
        for depth in range(p.dk // SIDE):
            step = depth * (SIDE // NUMBERS)
            left, small = (k.matrix_load("AOp", self.tiles, rows + (i * size + step), stride) for i in range(2))
            right, rest = (
                k.matrix_load("BOp", self.tiles, columns + (i * size + step), stride, transposed=True) for i in range(2)
            )
            sums = k.matrix_multiply_add(left, right, sums)
            low = k.matrix_multiply_add(left, rest, low)
            low = k.matrix_multiply_add(small, right, low)
        return k.matrix_add_scaled(sums, low, 1 / LOW)

    def _write_matrices(self, base: Scalar) -> None:
        """The matrices, and keys and queries with their decays."""
        k, o, p = self.k, self.o, self.plan
        k.barrier()
        super()._write_matrices(base)
        from_k, from_q, to_k = p.tiles
        for row, part in self._places():
            place = base + row * p.line + part
            before, after = self._number(PRE, row), self._number(REST, row)
            key, query = (o.eight_of(load(self.start + row, part)) for load in (o.key_eight, o.query_eight))
            self._write(query, before, place + from_q)
            self._write(key, after, place + to_k)
            if self.c.has_delta:
                self._write(key, before, place + from_k)

        def write_total() -> None:
            total = k.splat(self._number(PRE, CHUNK - 1), WORDS)
            k.store_as_is(total, self.output, base + self.thread + p.totals)

        k.when(self.thread < p.dk, write_total)

    def _write(self, values: Sequence[ir.Value], factor: ir.Value, place: Scalar) -> None:
        """The terms of eight numbers times a factor."""
        k = self.k
        found = [k.mul(factor, value) for value in values]
        self._note_unless(Scalar(magnitude(k, found)) <= LARGEST, BAD)
        for i, term in enumerate(self._terms(found)):
            k.store_as_is(term, self.output, place + i * self.plan.tile)
