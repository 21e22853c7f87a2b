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
    ORDINARY,
    SIDE,
    VECTORS,
    WORDS,
    within,
)
from .mma_chunk_state import MmaChunks
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
        self.sums_q = p.sums_q
        self.terms_u = p.updates, p.updates + CHUNK * p.stride_s

    @property
    def matrices_count(self) -> int:
        """How many matrices of factors there are."""
        return self.plan.matrices

    # ---- a chunk ---------------------------------------------------------------------------------------------------
    def _chunks(self, state: list[ir.Value]) -> list[ir.Value]:
        k, count = self.k, len(state)
        zero = Scalar.constant(0, "index")
        from_k, from_q, to_k = self.plan.tiles
        key_terms = 2 if self.c.has_delta else 0

        def fetch(t: Scalar) -> list[ir.Value]:
            base = self._base(t)
            tiles = [*self._tiles(base, from_k, key_terms), *self._tiles(base, from_q, self.plan.terms)]
            return [*tiles, *self._totals(base), *self._others(base, t)]

        def chunk(t: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            state, rest = carried[:count], carried[count:]
            each = self.plan.tile // self.plan.threads
            keys, rest = rest[: key_terms * each], rest[key_terms * each :]
            queries, rest = rest[: self.plan.terms * each], rest[self.plan.terms * each :]
            totals, rest = rest[: len(self.places)], rest[len(self.places) :]
            value = self._hand(state, rest)
            at_once = self.plan.held > 2
            self._put_tiles([*keys, *queries] if at_once else keys or queries)
            k.barrier()
            late = self._tiles(self._base(t), to_k, 2)
            following = fetch((t + CHUNK).minimum(self.tokens - 1))
            self._multiply_keys_and_queries(queries, late)
            self._updates(t, value)
            self._multiply_updates()
            ordinary = Scalar(k.load(self.vectors, Scalar.constant(ORDINARY, "index"))) > 0.5
            ordinary = ordinary & (Scalar(k.load(self.lost, zero)) < 0.5)
            types = [value.type for value in state]
            state = k.choose(ordinary, lambda: self._end(t, state, totals), lambda: self.steps.emit(t, state), types)
            k.barrier()
            return [*state, *following]

        return k.loop(zero, self.tokens, CHUNK, [*state, *fetch(zero)], chunk)[:count]

    # ---- loads -----------------------------------------------------------------------------------------------------
    def decays(self, t: Scalar, i: Scalar, part: Scalar) -> list[ir.Value]:
        """The decays of the ``part``-th eight rows by token ``t``, the ``i``-th of the chunk; each four times."""
        if self.log_decays is None:
            return super().decays(t, i, part)
        k, o = self.k, self.o
        place = (o.row(t) * self.c.kv_heads + o.head) * self.plan.line + part
        return [k.splat(k.exp(value), WORDS) for value in o.eight_of(o.load_eight(self.log_decays, place))]

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
        k, p = self.k, self.plan
        zero = Scalar.constant(0, "index")
        kind, rest = self.subgroup.divide_unsigned(p.subgroups // 2) if p.held > 2 else (zero, self.subgroup)
        part, strip = rest.divide_unsigned(CHUNK // SIDE)
        found: list[tuple[Scalar, ir.Value]] = []
        if p.held > 2:
            found.append((kind * self.sums_q, self._times_both(kind, part, strip)))
        else:
            if self.c.has_delta:
                found.append((zero, self._times_state(part, strip, 2)))
                k.barrier()
                self._put_tiles(queries)
                k.barrier()
            found.append((zero + self.sums_q, self._times_state(part, strip, p.terms)))
        k.barrier()
        self._put_tiles(late)
        for start, sums in found:
            self._put_sums(sums, self.work, start + part * p.sums + strip * (SIDE * p.stride_f))
        k.barrier()

    def _factors_of(self, part: Scalar, strip: Scalar) -> list[tuple[Scalar, ir.Value, ir.Value]]:
        """Over a part of the state's rows: where in a tile the left factor lies, and both terms of the right one."""
        p = self.plan
        found: list[tuple[Scalar, ir.Value, ir.Value]] = []
        depths = p.dk // SIDE // p.parts
        for i in range(depths):
            depth = part * depths + i
            place = depth * (SIDE * p.stride_s)
            left = strip * (SIDE * p.stride_k) + depth * _HALF
            found.append((left, self._right(place), self._right(place + p.dk * p.stride_s)))
        return found

    def _times_state(self, part: Scalar, strip: Scalar, terms: int) -> ir.Value:
        """The terms of the tile times those of the state, over a part of its rows."""
        k, p = self.k, self.plan
        sums, low = k.matrix_zero(), k.matrix_zero()
        for place, right, rest in self._factors_of(part, strip):
            left = self._left(self.rows, place, p.stride_k)
            sums = k.matrix_multiply_add(left, right, sums)
            low = k.matrix_multiply_add(left, rest, low)
            if terms == 2:
                low = k.matrix_multiply_add(self._left(self.rows, place + p.held_tile, p.stride_k), right, low)
        return k.matrix_add_scaled(sums, low, 1 / LOW)

    def _times_both(self, kind: Scalar, part: Scalar, strip: Scalar) -> ir.Value:
        """The same of keys in two terms or of queries in one; the keys' second one is left out by a factor."""
        k, p = self.k, self.plan
        sums, low, more = (k.matrix_zero() for _ in range(3))
        for place, right, rest in self._factors_of(part, strip):
            left = self._left(self.rows, place + kind * (2 * p.held_tile), p.stride_k)
            sums = k.matrix_multiply_add(left, right, sums)
            low = k.matrix_multiply_add(left, rest, low)
            more = k.matrix_multiply_add(self._left(self.rows, place + p.held_tile, p.stride_k), right, more)
        factor = k.select(kind.equals(0), k.constant(1 / LOW), k.constant(0.0))
        return k.matrix_add_scaled(k.matrix_add_scaled(sums, low, 1 / LOW), more, factor)

    def _seen(self, start: int) -> list[ir.Value]:
        """This thread's eight of sums over all of the state's rows."""
        found = self._sums(start)
        for part in range(1, self.plan.parts):
            found = [self.k.add(x, y) for x, y in zip(found, self._sums(start + part * self.plan.sums), strict=True)]
        return found

    def _updates(self, t: Scalar, value: list[ir.Value]) -> None:
        """The terms of u."""
        k, is_first = self.k, self.half.equals(0)
        values = self.o.eight_of(value)
        start = Scalar.constant(self.terms_u[0], "index")

        def remainders() -> None:
            self._put_terms([k.sub(value, held) for value, held in zip(values, self._seen(0), strict=True)], start)

        if self.c.has_delta:
            k.when(is_first, remainders)
            k.barrier()
            k.when(self.subgroup < CHUNK // SIDE, self._solve)
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
        k.when(self.subgroup >= Scalar.constant(p.subgroups - CHUNK // SIDE, "index"), self._mix)
        strip, column, apart = self.subgroup, Scalar.constant(0, "index"), p.subgroups
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
        strip, column = self.subgroup - (p.subgroups - CHUNK // SIDE), Scalar.constant(0, "index")
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
