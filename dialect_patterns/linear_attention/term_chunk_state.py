"""The second kernel of strategy ``fused_term_chunks``: the state over the chunks, and the outputs.

    r = v - from_k S;  u = solve r;  o = scale (from_q S + mix u);  S <- total S + to_k^T u          delta rules
    u = v                                                                                           the others

What ``mma_chunk_state`` does, but that keys and queries have their decays in them, and two terms where they lead to the
next state: each tile is in the workgroup's memory only while it is multiplied with, ``from_k``, then ``from_q``, then
``to_k``. Of sums over the key dimensions half the subgroups have the first half, so that all have the same to do.
"""

from __future__ import annotations

from iree.compiler import ir

from ..emit.chunk_words import LOW, NUMBERS
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Kernel
from .contract import LinearAttention
from .mma_chunk_operands import (
    CHUNK,
    MATRIX,
    SIDE,
    VECTORS,
    WORDS,
    within,
)
from .mma_chunk_state import Begun, MmaChunks
from .term_chunk_operands import TermPlan

_HALF = SIDE // NUMBERS  # chunks of f16 across a matrix


class TermChunks(MmaChunks):
    """Emits the kernel.

    Buffers: query, key, value, past state if there is one, decays a key dimension, factors, output, present state.

    Args:
        k: Emits instructions.
        c: What to compute.
        p: How the work is cut.
        streams: B * max(Hq, Hkv).
        tokens: T.
    """

    def __init__(self, k: Kernel, c: LinearAttention, p: TermPlan, streams: Scalar, tokens: Scalar) -> None:
        super().__init__(k, c, p, streams, tokens, p.record)
        self.plan = p
        self.sums_q = 2 * p.sums
        terms = 4 * p.sums
        self.terms_u = terms, terms + CHUNK * p.stride_s

    @property
    def matrices_count(self) -> int:
        """How many matrices of factors there are."""
        return self.plan.matrices

    # ---- a chunk ---------------------------------------------------------------------------------------------------
    def _begin(self, t: Scalar, state: list[ir.Value], loaded: list[ir.Value]) -> Begun:
        each, places = self.plan.tile // self.plan.threads, len(self.places)
        keys, rest = loaded[: self._key_terms * each], loaded[self._key_terms * each :]
        queries, rest = rest[: self.plan.terms * each], rest[self.plan.terms * each :]
        totals, rest = rest[:places], rest[places:]
        value = self._hand(state, rest)
        at_once = self.plan.held > 2
        self._put_tiles([*keys, *queries] if at_once else keys or queries)
        self.k.barrier()
        late = self._tiles(self._base(t), self.plan.tiles[2], 2)
        following = self._fetch((t + CHUNK).minimum(self.tokens - 1))
        self._multiply_keys_and_queries(queries, late)
        return value, following, lambda: self._end(t, state, totals)

    @property
    def _key_terms(self) -> int:
        return 2 if self.c.has_delta else 0

    # ---- loads -----------------------------------------------------------------------------------------------------
    def decays(self, t: Scalar, i: Scalar, part: Scalar) -> list[ir.Value]:
        """The decays of the ``part``-th eight rows by token ``t``, the ``i``-th of the chunk; each four times."""
        if self.log_decays is None:
            return super().decays(t, i, part)
        k, o = self.k, self.o
        place = (o.row(t) * self.c.kv_heads + o.head) * self.plan.line + part
        return [k.splat(k.exp(value), WORDS) for value in o.eight_of(o.load_eight(self.log_decays, place))]

    def _fetch(self, t: Scalar) -> list[ir.Value]:
        base, (from_k, from_q, _) = self._base(t), self.plan.tiles
        tiles = [*self._tiles(base, from_k, self._key_terms), *self._tiles(base, from_q, self.plan.terms)]
        return [*tiles, *self._totals(base), *self._others(base, t)]

    def _base(self, t: Scalar) -> Scalar:
        """Where the factors of the chunk of a token start."""
        return (self.item * self.o.chunks + t.divide_unsigned(CHUNK)[0]) * self.plan.record

    def _tiles(self, base: Scalar, start: int, terms: int) -> list[ir.Value]:
        """What this thread loads of the terms of a tile."""
        return [
            self.k.load(self.factors, base + self.thread + (start + i))
            for i in range(0, terms * self.plan.tile, self.plan.threads)
        ]

    def _totals(self, base: Scalar) -> list[ir.Value]:
        """The decays over the chunk of this thread's rows."""
        return [self.k.load(self.factors, base + row + self.plan.totals) for row, _ in self.places]

    def _others(self, base: Scalar, t: Scalar) -> list[ir.Value]:
        """What this thread loads of the other factors of a chunk, and of the values of its tokens."""
        k = self.k
        t = t.divide_unsigned(CHUNK)[0] * CHUNK
        vector = base + self.plan.matrices * MATRIX + self.thread.minimum(VECTORS // WORDS - 1)
        return [
            *(k.load(self.factors, base + place) for place in self._matrix_places()),
            k.load(self.factors, vector),
            *self.load_value(t + self.token, self.vector),
        ]

    def _put_tiles(self, loaded: list[ir.Value]) -> None:
        """Hand the terms of a tile to the workgroup; whoever reads the last one has to be done."""
        p = self.plan
        for i, value in enumerate(loaded):
            row, part = (self.thread + i * p.threads).divide_unsigned(p.line)
            self.k.store_as_is(value, self.rows, row * p.stride_k + part)

    # ---- products --------------------------------------------------------------------------------------------------
    def _multiply_keys_and_queries(self, queries: list[ir.Value], late: list[ir.Value]) -> None:
        """Sums of both with the state, in place of its terms; leaves ``to_k`` in the workgroup's memory."""
        k = self.k
        found: list[tuple[int, ir.Value]] = []
        if self.c.has_delta:
            found.append((0, self._times_state(2)))
            if self.plan.held == 2:
                k.barrier()
                self._put_tiles(queries)
                k.barrier()
        found.append((self.sums_q, self._times_state(self.plan.terms, 0 if self.plan.held == 2 else 2)))
        k.barrier()
        self._put_tiles(late)
        half, rest = self.subgroup.divide_unsigned(self.p.subgroups // 2)
        strip, column = rest.divide_unsigned(self.p.across)
        for start, sums in found:
            self._put_sums(sums, self.work, self._sums_place(strip, column) + half * self.plan.sums + start)
        k.barrier()

    def _times_state(self, terms: int, tile: int = 0) -> ir.Value:
        """The terms of a tile, from the ``tile``-th in memory on, times those of the state, over half of its rows."""
        k, p = self.k, self.p
        half, rest = self.subgroup.divide_unsigned(p.subgroups // 2)
        strip, column = rest.divide_unsigned(p.across)
        depths = p.dk // SIDE // 2
        sums, low = k.matrix_zero(), k.matrix_zero()
        for i in range(depths):
            depth = half * depths + i
            left_place = strip * (SIDE * p.stride_k) + depth * _HALF + tile * (CHUNK * p.stride_k)
            place = column * _HALF + depth * (SIDE * p.stride_s)
            left, right = self._left(self.rows, left_place, p.stride_k), self._right(place)
            sums = k.matrix_multiply_add(left, right, sums)
            low = k.matrix_multiply_add(left, self._right(place + p.dk * p.stride_s), low)
            if terms == 2:
                small = self._left(self.rows, left_place + CHUNK * p.stride_k, p.stride_k)
                low = k.matrix_multiply_add(small, right, low)
        return k.matrix_add_scaled(sums, low, 1 / LOW)

    def _seen(self, start: int) -> list[ir.Value]:
        """This thread's eight of sums over both halves of the state's rows."""
        halves = (self._sums(start), self._sums(start + self.plan.sums))
        return [self.k.add(x, y) for x, y in zip(*halves, strict=True)]

    def _updates(self, t: Scalar, value: list[ir.Value]) -> None:
        """The terms of u."""
        k, p, is_first = self.k, self.p, self.half.equals(0)
        values = self.o.eight_of(value)
        start = Scalar.constant(self.terms_u[0], "index")

        def remainders() -> None:
            self._put_terms([k.sub(value, held) for value, held in zip(values, self._seen(0), strict=True)], start)

        if self.c.has_delta:
            k.when(is_first, remainders)
            k.barrier()
            k.when(self.subgroup < p.subgroups // 2, self._solve)
            k.barrier()
            updates = self._sums(0)
        else:
            self._keep(within(k, self._seen(self.sums_q)))
            inside = t + self.token < self.tokens
            updates = [k.select(inside, value, k.constant(0.0)) for value in values]
        k.when(is_first, lambda: self._put_terms(updates, start))
        k.barrier()

    def _multiply_updates(self) -> None:
        """``mix`` u in place of sums of keys, and to_k^T u in place of to_k."""
        k, p = self.k, self.p
        k.when(self.subgroup >= Scalar.constant(p.subgroups // 2, "index"), self._mix)
        strip, column = self.subgroup.divide_unsigned(p.across)
        apart = p.subgroups // p.across
        right = [[self._update(terms, depth, column) for terms in self.terms_u] for depth in range(CHUNK // SIDE)]
        found: list[ir.Value] = []
        for i in range(p.dk // SIDE // apart):
            sums, low = k.matrix_zero(), k.matrix_zero()
            for depth in range(CHUNK // SIDE):
                start = (strip + i * apart) * _HALF + depth * SIDE * p.stride_k
                left, small = (
                    self._left(self.rows, start + term * (CHUNK * p.stride_k), p.stride_k, transposed=True)
                    for term in range(2)
                )
                sums = k.matrix_multiply_add(left, right[depth][0], sums)
                low = k.matrix_multiply_add(left, right[depth][1], low)
                low = k.matrix_multiply_add(small, right[depth][0], low)
            found.append(k.matrix_add_scaled(sums, low, 1 / LOW))
        k.barrier()
        for i, sums in enumerate(found):
            self._put_sums(sums, self.rows, self._sums_place(strip + i * apart, column))
        k.barrier()

    def _mix(self) -> None:
        k, p = self.k, self.p
        strip, column = (self.subgroup - p.subgroups // 2).divide_unsigned(p.across)
        first = self.plan.matrices - self.plan.terms
        sums, low = k.matrix_zero(), k.matrix_zero()
        for depth in range(CHUNK // SIDE):
            left = self._factor(first, strip, depth)
            high, small = (self._update(terms, depth, column) for terms in self.terms_u)
            sums = k.matrix_multiply_add(left, high, sums)
            low = k.matrix_multiply_add(left, small, low)
            if self.plan.terms == 2:
                low = k.matrix_multiply_add(self._factor(first + 1, strip, depth), high, low)
        self._put_sums(k.matrix_add_scaled(sums, low, 1 / LOW), self.work, self._sums_place(strip, column))

    def _end(self, t: Scalar, state: list[ir.Value], totals: list[ir.Value]) -> list[ir.Value]:
        """Write the outputs; the next state."""
        k, p = self.k, self.p
        token = t + self.token

        def write() -> None:
            scale = k.constant(self.c.scale)
            pairs = zip(self._seen(self.sums_q), self._sums(0), strict=True)
            self.write_output(token, self.vector, [k.mul(scale, k.add(seen, new)) for seen, new in pairs])

        k.when(self.half.equals(1) & (token < self.tokens), write)
        result: list[ir.Value] = []
        for (row, vector), total, eight in zip(self.places, totals, self._eights(state), strict=True):
            place = row * p.stride_f + vector * (NUMBERS // WORDS)
            result += [k.fma(total, held, k.load(self.rows, place + i)) for i, held in enumerate(eight)]
        return result
