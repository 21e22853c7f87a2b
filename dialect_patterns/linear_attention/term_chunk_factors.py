"""The first kernel of strategy ``fused_term_chunks``: the factors of every chunk, all chunks at once.

A workgroup does one chunk of one stream. Scores whose decays differ from key dimension to key dimension are made by
halving (NUMERICS section 3): the second half of each block of 2 w tokens sees its first half, for w = 1, 2 .. 16. Rows
get the decays since the block's middle, columns those up to it, so that no factor exceeds 1 where decays do not grow,
and nothing is divided. At every w there are 16 rows and 16 columns in all, of whose products [16, 16] the blocks of w
along the diagonal are meant. Decays are multiplied up in f32, a thread a few tokens of eight key dimensions; what they
are multiplied with enters the products in two terms of f16, queries of 16 bits in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from iree.compiler import ir

from ..emit.chunk_words import LOW, NUMBERS
from ..emit.scalar import Scalar
from .mma_chunk_factors import (
    BAD,
    KEYS,
    NOTES,
    QUERIES,
    STRIDE,
    THREADS,
)
from .mma_chunk_operands import (
    CHUNK,
    DECAY,
    LARGEST,
    MATRIX,
    RATE,
    SIDE,
    SUBGROUP,
    VECTORS,
    WORDS,
)
from .term_chunk_matrices import TermMatrices
from .term_chunk_operands import TermPlan

_PARTS = 4  # of the key dimensions, a subgroup each
_MOST_GROWTH = 16.0  # of decays in a chunk; keys and queries are as much smaller than f16's largest number
_SUMS = SIDE * SIDE  # numbers of a matrix of sums
Eights = list[list[ir.Value]]
"""Eight numbers of each of a thread's tokens."""


class TermFactors(TermMatrices):
    """Emits the kernel.

    Buffers: query, key, decay and beta where the rule has them, factors [B * max(Hq, Hkv), chunks, numbers].

    Args:
        k: Emits instructions.
        c: What to compute.
        p: How the work is cut.
        streams: B * max(Hq, Hkv).
        tokens: T.
    """

    @staticmethod
    def bytes_of(p: TermPlan) -> int:
        """Bytes of the workgroup's memory."""
        chunks = (4 + p.terms) * SIDE * p.stride_k + 2 * p.factor_threads
        numbers = 2 * _PARTS * _SUMS + 2 * CHUNK * STRIDE + VECTORS + NOTES
        return 16 * chunks + 4 * numbers

    def emit(self) -> None:
        """Emit everything."""
        k, p, item = self.k, self.plan, self.k.item()
        self.tiles = k.shared_chunks((4 + p.terms) * SIDE * p.stride_k)
        self.totals = k.shared_chunks(2 * p.factor_threads)
        self.sums = k.shared(2 * _PARTS * _SUMS)
        self.products = k.shared(2 * CHUNK * STRIDE)
        self.vectors = k.shared(VECTORS)
        self.notes = k.shared(NOTES)
        k.when(item < self.count, lambda: self._one(item))

    @property
    def _mix(self) -> int:
        return CHUNK * STRIDE

    def _one(self, item: Scalar) -> None:
        """One chunk."""
        k, p = self.k, self.plan
        stream, chunk = item.divide_unsigned(self.o.chunks)
        self.o.choose(stream)
        self.start, self.thread = chunk * CHUNK, k.thread()
        self.part, self.column = self.thread.divide_unsigned(CHUNK)
        self.group, self.dims = self.thread.divide_unsigned(p.line)
        self.first = self.group * p.tokens
        k.when(self.thread < NOTES, lambda: k.store(k.constant(0.0), self.notes, self.thread))
        k.when(self.thread < CHUNK, lambda: self._gates(self.thread))
        for i in range(0, CHUNK * STRIDE, p.factor_threads):
            place = (self.thread + i).minimum(CHUNK * STRIDE - 1)
            k.store(k.constant(0.0), self.products, place + self._mix)
        tokens = [self.start + self.first + e for e in range(p.tokens)]
        self.keys = [self.o.key_eight(t, self.dims) for t in tokens]
        self.queries = [self.o.query_eight(t, self.dims) for t in tokens]
        stored = [self._load_decays(t) for t in tokens]
        k.barrier()
        for values, kind in ((self.keys, KEYS), (self.queries, QUERIES)):
            numbers = [value for one in values for value in self.o.eight_of(one)]
            self._check(numbers, kind, LARGEST / _MOST_GROWTH)
        self._own_products()
        decays = [self._decays(e, stored[e]) for e in range(p.tokens)]
        self._check_growth(decays)
        before, after, total = self._halve(decays)
        self._write_tiles(item * p.record, before, after, total)
        k.barrier()
        if self.c.has_delta:
            self._invert()
        self._write_matrices(item * p.record)
        self._write_vectors(item * p.record + self.matrices_count * MATRIX)

    # ---- operands --------------------------------------------------------------------------------------------------
    def _load_decays(self, t: Scalar) -> list[ir.Value]:
        """The log decays of a token, as stored."""
        if self.decays is None:
            return []
        place = (self.o.row(t) * self.c.kv_heads + self.o.head) * self.plan.line
        return self.o.load_eight(self.decays, place + self.dims)

    def _decays(self, e: int, stored: Sequence[ir.Value]) -> list[ir.Value]:
        """The decays of this thread's ``e``-th token; 1 after the last token."""
        k = self.k
        if not stored:
            return [self._number(DECAY, self.first + e)] * NUMBERS
        inside = self.start + self.first + e < self.o.tokens
        return [k.select(inside, k.exp(value), k.constant(1.0)) for value in self.o.eight_of(stored)]

    def _check_growth(self, decays: Eights) -> None:
        """Note whether decays could grow to more than that: each thread's may to as much as all of them may."""
        k, one = self.k, self.k.constant(1.0)
        largest = one
        for dim in zip(*decays, strict=True):
            growth = one
            for decay in dim:
                growth = k.mul(growth, k.maximum(decay, one))
            largest = k.maximum(largest, growth)
        self._note_unless(Scalar(largest) <= _MOST_GROWTH ** (self.plan.tokens / CHUNK), BAD)

    def _own_products(self) -> None:
        """q_i . k_i, this thread's part of them."""
        k, p = self.k, self.plan
        for e in range(p.tokens):
            total = k.constant(0.0)
            pairs = zip(self.o.eight_of(self.queries[e]), self.o.eight_of(self.keys[e]), strict=True)
            for query, key in pairs:
                total = k.fma(query, key, total)
            k.store(total, self.sums, (self.first + e) * p.line + self.dims)
        k.barrier()

        def add() -> None:
            total = k.constant(0.0)
            for i in range(p.line):
                total = k.add(total, k.load(self.sums, self.thread * p.line + i))
            k.store(total, self.products, self.thread * (STRIDE + 1) + self._mix)

        k.when(self.thread < CHUNK, add)
        k.barrier()

    # ---- halving ---------------------------------------------------------------------------------------------------
    def _halve(self, decays: Eights) -> tuple[Eights, Eights, list[ir.Value]]:
        """All scores between tokens.

        Returns:
            For each of this thread's tokens the decays from the chunk's start, and those to its end; those of the
            chunk.
        """
        k, p = self.k, self.plan
        one = k.constant(1.0)
        before, after = [list(row) for row in decays], [[one] * NUMBERS for _ in decays]
        width = 1
        while width < p.tokens:  # blocks of one thread
            for e in range(p.tokens):
                half = self.group * (p.tokens // 2) + (e // (2 * width) * width + e % width)
                is_row = bool(e & width)
                self._stage(e, half, is_row, before[e] if is_row else after[e])
            k.barrier()
            self._multiply()
            k.barrier()
            self._scatter(Scalar.constant(width, "index"))
            firsts = {e: before[e // (2 * width) * 2 * width + width - 1] for e in range(p.tokens)}
            seconds = {e: before[e // (2 * width) * 2 * width + 2 * width - 1] for e in range(p.tokens)}
            for e in range(p.tokens):
                if e & width:
                    before[e] = self._each(before[e], firsts[e])
                else:
                    after[e] = self._each(after[e], seconds[e])
            width *= 2

        def level(_: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            return self._level(Scalar(carried[0]), carried[1:])

        levels = (CHUNK // p.tokens).bit_length() - 1
        values = [Scalar.constant(1, "index").value, *_flat(before), *_flat(after), *before[-1]]
        zero, last = Scalar.constant(0, "index"), Scalar.constant(levels, "index")
        _, *rest = k.loop(zero, last, 1, values, level)
        eights = _eights(rest)
        return eights[: p.tokens], eights[p.tokens : -1], eights[-1]

    def _level(self, groups: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
        """A level whose halves are so many threads' tokens; what it carries."""
        k, p = self.k, self.plan
        eights = _eights(carried)
        before, after, total = eights[: p.tokens], eights[p.tokens : -1], eights[-1]
        block, inside = self.group.divide_unsigned(groups + groups)
        second, inside_half = inside.divide_unsigned(groups)
        is_row = second.equals(1)
        first_token = (block * groups + inside_half) * p.tokens
        for e in range(p.tokens):
            factors = [k.select(is_row, x, y) for x, y in zip(before[e], after[e], strict=True)]
            self._stage(e, first_token + e, is_row, factors)
        for i in range(2):
            k.store_as_is(k.join(total[i * WORDS : (i + 1) * WORDS]), self.totals, self.thread * 2 + i)
        k.barrier()
        self._multiply()
        other = is_row.select(self.thread - groups * p.line, self.thread + groups * p.line)
        found = [e for i in range(2) for e in k.elements(k.load(self.totals, other * 2 + i))]
        k.barrier()
        self._scatter(groups * p.tokens)
        one = k.constant(1.0)
        to_rows = [k.select(is_row, x, one) for x in found]
        to_columns = [k.select(is_row, one, x) for x in found]
        before = [self._each(row, to_rows) for row in before]
        after = [self._each(row, to_columns) for row in after]
        return [(groups + groups).value, *_flat(before), *_flat(after), *self._each(total, found)]

    def _each(self, values: Sequence[ir.Value], factors: Sequence[ir.Value]) -> list[ir.Value]:
        return [self.k.mul(x, y) for x, y in zip(values, factors, strict=True)]

    def _stage(self, e: int, half: Scalar, is_row: Scalar | bool, factors: list[ir.Value]) -> None:
        """A token's key, and its query where it is a row, to the workgroup's memory.

        Tiles are keys of rows and of columns in two terms each, then queries.
        """
        k, p = self.k, self.plan
        size = SIDE * p.stride_k
        place = half * p.stride_k + self.dims
        if isinstance(is_row, bool):
            start = place + (0 if is_row else 2 * size)
        else:
            start = place + is_row.select(Scalar.constant(0, "index"), Scalar.constant(2 * size, "index"))
        for i, term in enumerate(self._terms(self._each(self.o.eight_of(self.keys[e]), factors))):
            k.store_as_is(term, self.tiles, start + i * size)

        def put_query() -> None:
            query = self._each(self.o.eight_of(self.queries[e]), factors)
            for i, term in enumerate(self._query_terms(query)):
                k.store_as_is(term, self.tiles, place + (4 + i) * size)

        if is_row is True:
            put_query()
        elif isinstance(is_row, Scalar):
            k.when(is_row, put_query)

    def _multiply(self) -> None:
        """The products of rows and columns; half the subgroups make those of queries where there are enough."""
        k, p = self.k, self.plan
        subgroup, _ = self.thread.divide_unsigned(SUBGROUP)
        kind, part = subgroup.divide_unsigned(_PARTS)
        apart = p.factor_threads // SUBGROUP > _PARTS
        if self.c.has_delta:
            keys = partial(self._product, part, 0, 2, 0)
            if apart:
                k.when(kind.equals(0), keys)
            else:
                keys()
        queries = partial(self._product, part, 4, p.terms, _PARTS * _SUMS)
        if apart:
            k.when(kind.equals(1), queries)
        else:
            queries()

    def _product(self, part: Scalar, first: int, terms: int, where: int) -> None:
        """Rows in so many terms, the ``first``-th tile on, times columns, over a part of the key dimensions."""
        k, p = self.k, self.plan
        size, stride = SIDE * p.stride_k, p.half_stride(p.stride_k)
        depths = p.dk // SIDE // _PARTS
        sums, low = k.matrix_zero(), k.matrix_zero()
        for depth in range(depths):
            place = (part * depths + depth) * (SIDE // NUMBERS)
            right, rest = (
                k.matrix_load("BOp", self.tiles, place + (2 + i) * size, stride, transposed=True) for i in range(2)
            )
            left = k.matrix_load("AOp", self.tiles, place + first * size, stride)
            sums = k.matrix_multiply_add(left, right, sums)
            if terms == 2:
                small = k.matrix_load("AOp", self.tiles, place + (first + 1) * size, stride)
                low = k.matrix_multiply_add(left, rest, low)
                low = k.matrix_multiply_add(small, right, low)
        if terms == 2:
            sums = k.matrix_add_scaled(sums, low, 1 / LOW)
        k.matrix_store(sums, self.sums, part * _SUMS + where, SIDE)

    def _times(self, left: int, right: int, result: int, *, negative: bool = False) -> None:
        self.k.when(
            self.thread < THREADS, lambda: super(TermFactors, self)._times(left, right, result, negative=negative)
        )

    def _scatter(self, width: Scalar) -> None:
        """The sums of tokens of the same block to where they belong."""
        k = self.k
        each = _SUMS // self.plan.factor_threads
        i, across = self.thread.divide_unsigned(SIDE // each)
        block, inside = i.divide_unsigned(width)
        row = block * (width + width) + width + inside
        for e in range(each):
            j = across * each + e
            other, place = j.divide_unsigned(width)
            target = row * STRIDE + other * (width + width) + place

            def put(at: Scalar = self.thread * each + e, target: Scalar = target) -> None:
                query = self._total(at + _PARTS * _SUMS)
                k.store(query, self.products, target + self._mix)
                if self.c.has_delta:
                    k.store(k.mul(self._number(RATE, row), self._total(at)), self.products, target)

            k.when((block ^ other).equals(0), put)

    def _total(self, place: Scalar) -> ir.Value:
        """The sum over the subgroups' parts."""
        k = self.k
        total = k.load(self.sums, place)
        for i in range(1, _PARTS):
            total = k.add(total, k.load(self.sums, place + i * _SUMS))
        return total

    # ---- what is written -------------------------------------------------------------------------------------------
    def _write_tiles(self, base: Scalar, before: Eights, after: Eights, total: Sequence[ir.Value]) -> None:
        """Keys and queries with their decays from the chunk's start and to its end."""
        k, p = self.k, self.plan
        from_k, from_q, to_k = p.tiles
        for e in range(p.tokens):
            key, query = self.o.eight_of(self.keys[e]), self.o.eight_of(self.queries[e])
            written = [
                (from_q, self._query_terms(self._each(query, before[e]))),
                (to_k, self._terms(self._each(key, after[e]))),
            ]
            if self.c.has_delta:
                written.append((from_k, self._terms(self._each(key, before[e]))))
            place = base + (self.first + e) * p.line + self.dims
            for start, terms in written:
                for i, term in enumerate(terms):
                    k.store_as_is(term, self.output, place + (start + i * p.tile))

        def write() -> None:
            for i, value in enumerate(total):
                k.store_as_is(k.splat(value, WORDS), self.output, base + self.dims * NUMBERS + (p.totals + i))

        k.when(self.group.equals(0), write)


def _flat(rows: Eights) -> list[ir.Value]:
    return [value for row in rows for value in row]


def _eights(values: Sequence[ir.Value]) -> Eights:
    return [list(values[i : i + NUMBERS]) for i in range(0, len(values), NUMBERS)]
