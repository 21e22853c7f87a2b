"""The first kernel of strategy ``fused_mma_chunks``: the factors of every chunk, all chunks at once.

A workgroup does one chunk of one stream: the products of 32 keys with keys and queries on the matrix units; decays
multiplied up, a thread a column; the inverse of two blocks of 16 tokens row by row, as the recurrence would, and from
them the block between, in f32. The layout is that of ``mma_chunk_operands``.
"""

from __future__ import annotations

from collections.abc import Callable

from iree.compiler import ir

from ..emit.chunk_words import NUMBERS, pack, split, unpack
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer, Kernel
from .contract import LinearAttention
from .mma_chunk_operands import (
    ACROSS,
    CHUNK,
    DECAY,
    LARGEST,
    MATRIX,
    ORDINARY,
    PRE,
    RATE,
    REST,
    SIDE,
    SUBGROUP,
    TOTAL,
    VECTORS,
    WORDS,
    MmaOperands,
    MmaPlan,
    magnitude,
    matrices,
    record,
    within,
)

_SUBGROUPS = 4
THREADS = _SUBGROUPS * SUBGROUP
"""Threads of a workgroup."""
STRIDE = CHUNK + WORDS  # numbers from row to row of a product
MAX_GROWTH = 5.0e34  # e^80, of a chunk's decays, whose products stay far from overflow
_LEAST = 2.0**-12  # f16 holds numbers of which this is the largest as well as any
BAD, MIX, KEYS, QUERIES, NOTES = 0, 1, 3, 5, 8  # what was seen: out of range; not zero, and not small


class MmaFactors:
    """Emits the kernel.

    Buffers: query, key, decay and beta where the rule has them, factors [B * max(Hq, Hkv), chunks, numbers].

    Args:
        k: Emits instructions.
        c: What to compute.
        p: How matrices are read.
        streams: B * max(Hq, Hkv).
        tokens: T.
        half: Type of the matrices of factors.
        size: Chunks of the factors of a chunk of tokens; None: as ``mma_chunk_operands`` has them.
    """

    def __init__(
        self,
        k: Kernel,
        c: LinearAttention,
        p: MmaPlan,
        streams: Scalar,
        tokens: Scalar,
        half: str = "f16",
        size: int | None = None,
    ) -> None:
        self.k, self.c, self.p, self.half = k, c, p, half
        self.o = o = MmaOperands(k, c, tokens, streams)
        self.decay = o.numbers(c.kv_heads) if c.decay == "head" else None
        self.decays = o.eights(c.kv_heads * c.dk) if c.decay == "key" else None
        self.beta = o.numbers(c.kv_heads if c.beta == "head" else 1) if c.beta != "none" else None
        self.count = streams * o.chunks
        self.size = record(c) if size is None else size
        self.output = o.buffer(self.count * self.size)

    @staticmethod
    def memory(c: LinearAttention, p: MmaPlan) -> int:
        """Bytes of the workgroup's memory."""
        products = (2 if c.has_delta else 1) * CHUNK * STRIDE
        return 16 * 2 * CHUNK * p.stride_k + 4 * (products + VECTORS + NOTES)

    @property
    def matrices_count(self) -> int:
        """How many matrices of factors there are."""
        return matrices(self.c)

    def emit(self) -> None:
        """Emit everything."""
        k, item = self.k, self.k.item()
        self.tiles = k.shared_chunks(2 * CHUNK * self.p.stride_k)
        self.products = k.shared((2 if self.c.has_delta else 1) * CHUNK * STRIDE)
        self.vectors = k.shared(VECTORS)
        self.notes = k.shared(NOTES)
        k.when(item < self.count, lambda: self._chunk(item))

    def _chunk(self, item: Scalar) -> None:
        k, o = self.k, self.o
        stream, chunk = item.divide_unsigned(o.chunks)
        o.choose(stream)
        self.start, self.thread = chunk * CHUNK, k.thread()
        self.part, self.column = self.thread.divide_unsigned(CHUNK)
        put_tiles = self._tiles()
        k.when(self.thread < NOTES, lambda: k.store(k.constant(0.0), self.notes, self.thread))
        k.when(self.thread < CHUNK, lambda: self._gates(self.thread))
        if self.c.dtype != "f16":
            k.barrier()
        put_tiles()
        k.barrier()
        self._multiply()
        k.barrier()
        self._spans()
        k.barrier()
        k.when(self.thread.equals(THREADS - 1), self._prefixes)  # while the first subgroup substitutes
        if self.c.has_delta:
            self._invert()
        self._write_matrices(item * self.size)
        self._write_vectors(item * self.size + self.matrices_count * MATRIX)

    def _write_vectors(self, base: Scalar) -> None:
        """The vectors, and whether f16 does for the chunk."""
        k = self.k
        k.barrier()
        k.when(self.thread.equals(0), self._judge)
        k.barrier()
        place = self.thread.minimum(VECTORS // WORDS - 1)
        numbers = [k.load(self.vectors, place * WORDS + e) for e in range(WORDS)]
        k.store(k.join(numbers), self.output, base + place)

    # ---- what may not be computed in f16 ---------------------------------------------------------------------------
    def _note(self, condition: Scalar, what: int) -> None:
        """Remember that a thread saw something; all that do write the same."""
        k = self.k
        k.when(condition, lambda: k.store(k.constant(1.0), self.notes, Scalar.constant(what, "index")))

    def _check(self, values: list[ir.Value], kind: int, most: float = LARGEST) -> None:
        """Note whether values are out of range, and whether any of their kind are not zero, and not small."""
        found = Scalar(magnitude(self.k, values))
        self._note_unless(found <= most, BAD)
        self._note(found > 0.0, kind)
        self._note(found >= _LEAST, kind + 1)

    def _note_unless(self, condition: Scalar, what: int) -> None:
        self._note(condition ^ Scalar.constant(1, "i1"), what)

    def _judge(self) -> None:
        """Whether f16 does for this chunk."""
        k = self.k
        seen = [Scalar(k.load(self.notes, Scalar.constant(i, "index"))) > 0.5 for i in range(NOTES)]
        lost = seen[BAD]
        for kind in (MIX, KEYS, QUERIES):
            lost = lost | (seen[kind] & (seen[kind + 1] ^ Scalar.constant(1, "i1")))
        self._put(k.select(lost, k.constant(0.0), k.constant(1.0)), ORDINARY)

    # ---- operands --------------------------------------------------------------------------------------------------
    def _put(self, value: ir.Value, start: int, i: Scalar | int = 0) -> None:
        k = self.k
        k.store(value, self.vectors, i + start if isinstance(i, Scalar) else Scalar.constant(start + i, "index"))

    def _number(self, start: int, i: Scalar | int) -> ir.Value:
        place = i + start if isinstance(i, Scalar) else Scalar.constant(start + i, "index")
        return self.k.load(self.vectors, place)

    def _gates(self, i: Scalar) -> None:
        """Decay and rate of one token."""
        k, c, o = self.k, self.c, self.o
        t = self.start + i
        inside, own = t < o.tokens, o.row(t) * c.kv_heads + o.head

        def gate(buffer: Buffer, place: Scalar, beyond: float, then: Callable[[ir.Value], ir.Value]) -> ir.Value:
            value = then(k.widen(buffer, k.load(buffer, place)))
            return k.select(inside, value, k.constant(beyond))

        self._put(k.constant(1.0) if self.decay is None else gate(self.decay, own, 1.0, k.exp), DECAY, i)
        rate = k.constant(0.0)
        if self.beta is not None:
            place = own if c.beta == "head" else o.row(t)
            rate = gate(self.beta, place, 0.0, lambda value: value)
        self._put(rate, RATE, i)

    def _tiles(self) -> Callable[[], None]:
        """Load keys and queries, all at once; the result puts them into the workgroup's memory, in f16."""
        k, c, o = self.k, self.c, self.o
        vectors = c.dk // NUMBERS
        places = [(self.thread + i).divide_unsigned(vectors) for i in range(0, CHUNK * vectors, THREADS)]
        tiles = ((0, o.load_key, KEYS), (CHUNK * self.p.stride_k, o.load_query, QUERIES))
        loaded = [[load(self.start + row, chunk) for row, chunk in places] for _, load, _ in tiles]

        def put() -> None:
            for (start, _, kind), values in zip(tiles, loaded, strict=True):
                for (row, chunk), value in zip(places, values, strict=True):
                    if c.dtype != "f16":  # in f16 what is out of range is infinite, and the products show it
                        self._check(unpack(k, value, c.dtype), kind)
                    k.store_as_is(o.as_f16(value), self.tiles, row * self.p.stride_k + chunk + start)

        return put

    # ---- products --------------------------------------------------------------------------------------------------
    def _multiply(self) -> None:
        """k_i . k_j, where the rule wants them, and q_i . k_j."""
        k, p = self.k, self.p
        subgroup, queries = self.thread.divide_unsigned(SUBGROUP)[0], CHUNK * p.stride_k
        if self.c.has_delta:
            kind, strip = subgroup.divide_unsigned(2)
            rows, columns = kind * queries + strip * (SIDE * p.stride_k), [Scalar.constant(j, "index") for j in (0, 1)]
            place = kind * (CHUNK * STRIDE) + strip * (SIDE * STRIDE)
        else:
            strip, column = subgroup.divide_unsigned(2)
            rows, columns = strip * (SIDE * p.stride_k) + queries, [column]
            place = strip * (SIDE * STRIDE)
        sums = [k.matrix_zero() for _ in columns]
        stride, chunks = p.half_stride(p.stride_k), SIDE // NUMBERS
        for depth in range(p.dk // SIDE):
            left = k.matrix_load("AOp", self.tiles, rows + depth * chunks, stride)
            for i, column in enumerate(columns):
                start = column * (SIDE * p.stride_k) + depth * chunks
                right = k.matrix_load("BOp", self.tiles, start, stride, transposed=True)
                sums[i] = k.matrix_multiply_add(left, right, sums[i])
        for column, found in zip(columns, sums, strict=True):
            k.matrix_store(found, self.products, place + column * SIDE, STRIDE)

    @property
    def _mix(self) -> int:
        """Where the products of queries lie."""
        return CHUNK * STRIDE if self.c.has_delta else 0

    def _spans(self) -> None:
        """This thread's column of ``mix`` and of A, 8 rows of it, in place; and its ``rest``."""
        k, column = self.k, self.column
        one = k.constant(1.0)

        def after(span: ir.Value, i: int) -> ir.Value:
            return k.select(column < i, k.mul(span, self._number(DECAY, i)), span)

        def rows(block: int) -> None:
            before = [one] * block  # of the blocks of rows before, which do not wait for each other
            for i in range(NUMBERS):
                before = [after(span, at * NUMBERS + i) if at + i else span for at, span in enumerate(before)]
            span = one
            for part in before:
                span = k.mul(span, part)
            spans: list[tuple[int, ir.Value]] = []
            for i in range(block * NUMBERS, (block + 1) * NUMBERS):
                span = after(span, i) if i else span
                spans.append((i, span))
            self._rows(spans)
            if block == _SUBGROUPS - 1:
                self._put(span, REST, column)

        for block in range(_SUBGROUPS):
            k.when(self.part.equals(block), lambda block=block: rows(block))

    def _rows(self, spans: list[tuple[int, ir.Value]]) -> None:
        k, column, zero = self.k, self.column, self.k.constant(0.0)
        mixed: list[ir.Value] = []
        for i, span in spans:
            place = column + i * STRIDE
            product = k.mul(span, k.load(self.products, place + self._mix))
            mixed.append(k.select(column <= Scalar.constant(i, "index"), product, zero))
            k.store(mixed[-1], self.products, place + self._mix)
            if self.c.has_delta:
                own = k.mul(self._number(RATE, i), k.mul(span, k.load(self.products, place)))
                k.store(k.select(column < i, own, zero), self.products, place)
        self._check(mixed, MIX)

    def _prefixes(self) -> None:
        """What depends on the tokens before only; one thread."""
        k = self.k
        before = growth = k.constant(1.0)
        for i in range(CHUNK):
            decay = self._number(DECAY, i)
            before = k.mul(before, decay)
            growth = k.mul(growth, k.maximum(decay, k.constant(1.0)))
            self._put(before, PRE, i)
        self._put(before, TOTAL)
        for i in range(ORDINARY, VECTORS):
            self._put(k.constant(0.0), i)
        self._note_unless(Scalar(growth) <= MAX_GROWTH, BAD)

    # ---- the inverse -----------------------------------------------------------------------------------------------
    def _invert(self) -> None:
        """(I + A)^-1 in place of A: blocks of 16 on the diagonal, then the one below; the upper one is scratch."""
        k = self.k
        zeros = [k.constant(0.0)] * SIDE
        is_first = self.part.equals(0)  # the others would only wait longer
        inverse = k.choose(is_first, self._diagonal, lambda: zeros, [value.type for value in zeros])
        k.barrier()
        block, column = self.column.divide_unsigned(SIDE)
        corner = block * (SIDE * STRIDE + SIDE) + column

        def store() -> None:
            for i, value in enumerate(inverse):
                k.store(value, self.products, corner + i * STRIDE)

        k.when(is_first, store)
        k.barrier()
        below, upper = SIDE * STRIDE, SIDE
        self._times(below, 0, upper)
        k.barrier()
        self._times(below + SIDE, upper, below, negative=True)
        k.barrier()

    def _diagonal(self) -> list[ir.Value]:
        """This thread's column of a block's inverse, by substitution."""
        k = self.k
        block, column = self.column.divide_unsigned(SIDE)
        corner = block * (SIDE * STRIDE + SIDE)
        values: list[ir.Value] = []
        for i in range(SIDE):
            value = k.select(column.equals(i), k.constant(1.0), k.constant(0.0))
            for m, earlier in enumerate(values):
                value = k.fma(k.neg(k.load(self.products, corner + (i * STRIDE + m))), earlier, value)
            values.append(value)
        return values

    def _times(self, left: int, right: int, result: int, *, negative: bool = False) -> None:
        """The product of two blocks of 16 in f32, two neighbouring elements a thread."""
        k, each = self.k, SIDE * SIDE // THREADS
        row, place = self.thread.divide_unsigned(SIDE // each)
        column = place * each
        sums = [k.constant(0.0)] * each
        for m in range(SIDE):
            factor = k.load(self.products, row * STRIDE + (left + m))
            for e in range(each):
                sums[e] = k.fma(factor, k.load(self.products, column + (right + m * STRIDE + e)), sums[e])
        for e, value in enumerate(sums):
            k.store(k.neg(value) if negative else value, self.products, row * STRIDE + column + (result + e))

    def _write_matrices(self, base: Scalar) -> None:
        """A chunk of each matrix a thread."""
        k = self.k
        row, chunk = self.thread.divide_unsigned(ACROSS)
        column = chunk * NUMBERS

        def read(start: int) -> list[ir.Value]:
            return [k.load(self.products, row * STRIDE + column + (start + e)) for e in range(NUMBERS)]

        mixed = pack(k, read(self._mix), self.half)
        if self.c.has_delta:
            scaled = [k.mul(value, self._number(RATE, column + e)) for e, value in enumerate(read(0))]
            solve = [k.select(column + e <= row, value, k.constant(0.0)) for e, value in enumerate(scaled)]
            self._note_unless(within(k, solve), BAD)
            for i, term in enumerate(split(k, solve, self.o.zero, self.half)):
                k.store_as_is(term, self.output, base + self.thread + i * MATRIX)
        k.store_as_is(mixed, self.output, base + self.thread + (matrices(self.c) - 1) * MATRIX)
