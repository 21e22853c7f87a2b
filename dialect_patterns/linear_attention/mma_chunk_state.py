"""The second kernel of strategy ``fused_mma_chunks``: the state over the chunks, and the outputs.

    r = v - pre (k S);  u = solve r;  o = scale (pre (q S) + mix u);  S <- total S + k^T (rest u)        delta rules
    u = v                                                                                               the others

A workgroup holds some columns of one state over all chunks, in f32 in its registers, eight neighbouring columns of a
few rows a thread. The products are made on the matrix units; what they are made of lies in the workgroup's memory: keys
and queries as they are, the state, r, u and ``solve`` in two terms of f16. Sums go through that memory too, in place of
what has been used: those of the state in place of keys and queries, the others in place of the state's terms. A chunk
whose numbers f16 cannot hold goes through token by token (``mma_chunk_steps``).
"""

from __future__ import annotations

from collections.abc import Callable

from iree.compiler import ir

from ..emit.chunk_words import LOW, NUMBERS, pack, split, unpack
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer, Kernel
from .contract import LinearAttention
from .mma_chunk_operands import (
    ACROSS,
    CHUNK,
    DECAY,
    MATRIX,
    ORDINARY,
    PRE,
    REST,
    SIDE,
    SUBGROUP,
    TOTAL,
    VECTORS,
    WORDS,
    MmaOperands,
    MmaPlan,
    matrices,
    record,
    within,
)
from .mma_chunk_steps import Steps

_HALF = SIDE // NUMBERS  # chunks of f16 across a matrix
_FULL = SIDE // WORDS  # of f32
Eight = tuple[ir.Value, ir.Value]
"""Eight neighbouring columns of a row in f32."""
Begun = tuple[list[ir.Value], list[ir.Value], Callable[[], list[ir.Value]]]
"""This thread's part of a chunk's values, what it has loaded of the next chunk, and what emits the next state."""


class MmaChunks:
    """Emits the kernel.

    Buffers: query, key, value, past state if there is one, factors, output, present state.

    Args:
        k: Emits instructions.
        c: What to compute.
        p: How the state is held.
        streams: B * max(Hq, Hkv).
        tokens: T.
        size: Chunks of the factors of a chunk of tokens; None: as ``mma_chunk_operands`` has them.
    """

    def __init__(
        self, k: Kernel, c: LinearAttention, p: MmaPlan, streams: Scalar, tokens: Scalar, size: int | None = None
    ) -> None:
        self.k, self.c, self.p, self.streams, self.tokens = k, c, p, streams, tokens
        self.o = o = MmaOperands(k, c, tokens, streams)
        self.state_width = WORDS if c.state_dtype == "f32" else NUMBERS
        state = o.batches * (c.kv_heads * c.dk * c.dv // self.state_width)
        self.value = o.eights(c.kv_heads * c.dv)
        self.past = o.buffer(state) if c.has_past else None
        self.log_decays = o.eights(c.kv_heads * c.dk) if c.decay == "key" else None
        self.factors = o.buffer(streams * o.chunks * (record(c) if size is None else size))
        self.output = o.eights(c.out_heads * c.dv)
        self.present = o.buffer(state)
        rest = 2 * CHUNK * p.stride_f
        each = CHUNK * p.stride_s
        self.sums_q = CHUNK * p.stride_f
        """Where the sums of queries lie; those of keys, then of updates, then of outputs are first."""
        self.terms_u = rest, rest + each
        self.terms_w = rest + 2 * each, rest + 3 * each
        self.queries = CHUNK * p.stride_k

    @property
    def matrices_count(self) -> int:
        """How many matrices of factors there are."""
        return matrices(self.c)

    def emit(self) -> None:
        """Emit everything."""
        k, p, item = self.k, self.p, self.k.item()
        self.rows, self.work = k.shared_chunks(p.rows), k.shared_chunks(p.work)
        self.matrices = k.shared_chunks(self.matrices_count * CHUNK * (ACROSS + 1))
        self.vectors, self.lost = k.shared(VECTORS), k.shared(1)
        k.when(item < self.streams, lambda: self._stream(item))

    def _stream(self, item: Scalar) -> None:
        k, p, o = self.k, self.p, self.o
        self.item, self.thread, self.tile = item, k.thread(), k.tile()
        o.choose(item)
        self.half, self.own = self.thread.divide_unsigned(p.items)
        self.token, self.vector = self.own.divide_unsigned(p.vectors)
        self.subgroup = self.thread.divide_unsigned(SUBGROUP)[0]
        self.places = [(self.thread + i).divide_unsigned(p.vectors) for i in range(0, p.dk * p.vectors, p.threads)]
        self.steps = Steps(self)
        state = [self._past(row, vector) for row, vector in self.places]
        flat = [value for eight in state for value in eight]
        types = [value.type for value in flat]
        found = k.choose(self.tokens > 0, lambda: self._chunks(flat), lambda: flat, types)

        def write() -> None:
            for (row, vector), eight in zip(self.places, self._eights(found), strict=True):
                self._write_state(eight, row, vector)

        k.when(o.reader.equals(0), write)

    @staticmethod
    def _eights(values: list[ir.Value]) -> list[Eight]:
        return list(zip(values[::2], values[1::2], strict=True))

    def _chunks(self, state: list[ir.Value]) -> list[ir.Value]:
        """All chunks; the last state."""
        k, count = self.k, len(state)
        zero = Scalar.constant(0, "index")

        def chunk(t: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            state = carried[:count]
            value, following, finish = self._begin(t, state, carried[count:])
            self._updates(t, value)
            self._multiply_updates()
            ordinary = Scalar(k.load(self.vectors, Scalar.constant(ORDINARY, "index"))) > 0.5
            ordinary = ordinary & (Scalar(k.load(self.lost, zero)) < 0.5)
            types = [value.type for value in state]
            state = k.choose(ordinary, finish, lambda: self.steps.emit(t, state), types)
            k.barrier()
            return [*state, *following]

        return k.loop(zero, self.tokens, CHUNK, [*state, *self._fetch(zero)], chunk)[:count]

    def _begin(self, t: Scalar, state: list[ir.Value], loaded: list[ir.Value]) -> Begun:
        """All of a chunk before its updates."""
        value = self._unpack(state, loaded)
        self.k.barrier()
        following = self._fetch((t + CHUNK).minimum(self.tokens - 1))
        self._multiply_state()
        return value, following, lambda: self._finish(t, state)

    # ---- the state -------------------------------------------------------------------------------------------------
    def _state_place(self, row: Scalar, vector: Scalar) -> Scalar:
        width = self.state_width
        line = (self.o.state * self.c.dk + row) * (self.c.dv // width)
        return line + self.tile * (self.p.columns // width) + vector * (NUMBERS // width)

    def _past(self, row: Scalar, vector: Scalar) -> Eight:
        k = self.k
        if self.past is None:
            return k.constant(0.0, WORDS), k.constant(0.0, WORDS)
        place = self._state_place(row, vector)
        if self.c.state_dtype == "f32":
            return k.load(self.past, place), k.load(self.past, place + 1)
        return self.eight(unpack(k, k.load(self.past, place), self.c.state_dtype))

    def _write_state(self, eight: Eight, row: Scalar, vector: Scalar) -> None:
        k, place = self.k, self._state_place(row, vector)
        if self.c.state_dtype == "f32":
            for i, value in enumerate(eight):
                k.store_as_is(value, self.present, place + i)
        else:
            k.store_as_is(pack(k, self.flat(eight), self.c.state_dtype), self.present, place)

    def eight(self, values: list[ir.Value]) -> Eight:
        """Eight numbers as two values."""
        return self.k.join(values[:WORDS]), self.k.join(values[WORDS:])

    def flat(self, eight: Eight) -> list[ir.Value]:
        """Two values as eight numbers."""
        return [element for value in eight for element in self.k.elements(value)]

    # ---- loads -----------------------------------------------------------------------------------------------------
    def _row_places(self) -> list[tuple[Scalar, Scalar]]:
        """Token and chunk of each of this thread's loads of keys and queries."""
        vectors = self.p.dk // NUMBERS
        return [(self.thread + i).divide_unsigned(vectors) for i in range(0, CHUNK * vectors, self.p.threads)]

    def _matrix_places(self) -> list[Scalar]:
        count = self.matrices_count * MATRIX
        return [(self.thread + i).minimum(count - 1) for i in range(0, count, self.p.threads)]

    def load_value(self, t: Scalar, vector: Scalar) -> list[ir.Value]:
        """Eight columns of the value of a token, as stored."""
        c, o = self.c, self.o
        place = (o.row(t) * c.kv_heads + o.head) * (c.dv // NUMBERS)
        return o.load_eight(self.value, place + self.tile * self.p.vectors + vector)

    def decays(self, t: Scalar, i: Scalar, part: Scalar) -> list[ir.Value]:
        """The decays of the ``part``-th eight rows by token ``t``, the ``i``-th of the chunk; each four times."""
        del t, part
        return [self.k.splat(self._number(DECAY, i), WORDS)] * NUMBERS

    def write_output(self, t: Scalar, vector: Scalar, values: list[ir.Value]) -> None:
        """Eight columns of the output of a token."""
        c, o = self.c, self.o
        row = (o.batch * self.tokens + t) * c.out_heads + o.out_head
        place = row * (c.dv // NUMBERS) + self.tile * self.p.vectors + vector
        o.store_eight(values, self.output, place)

    def _fetch(self, t: Scalar) -> list[ir.Value]:
        """All that this thread loads of a chunk, as stored."""
        k, c, o = self.k, self.c, self.o
        chunk = t.divide_unsigned(CHUNK)[0]
        t = chunk * CHUNK
        base = (self.item * o.chunks + chunk) * record(c)
        vector = base + matrices(c) * MATRIX + self.thread.minimum(VECTORS // WORDS - 1)
        places = self._row_places()
        return [
            *(o.load_key(t + row, part) for row, part in places),
            *(o.load_query(t + row, part) for row, part in places),
            *(k.load(self.factors, base + place) for place in self._matrix_places()),
            k.load(self.factors, vector),
            *self.load_value(t + self.token, self.vector),
        ]

    def _unpack(self, state: list[ir.Value], loaded: list[ir.Value]) -> list[ir.Value]:
        """Hand what was loaded, and the state, to the workgroup; returns this thread's part of the values."""
        k, p, o = self.k, self.p, self.o
        rest = iter(loaded)
        for start in (0, self.queries):
            for row, part in self._row_places():
                k.store_as_is(o.as_f16(next(rest)), self.rows, row * p.stride_k + part + start)
        return self._hand(state, list(rest))

    def _hand(self, state: list[ir.Value], loaded: list[ir.Value]) -> list[ir.Value]:
        """The same without keys and queries."""
        k, p = self.k, self.p
        rest = iter(loaded)
        for place in self._matrix_places():
            row, part = place.divide_unsigned(ACROSS)
            k.store_as_is(next(rest), self.matrices, row * (ACROSS + 1) + part)
        start = self.thread.minimum(VECTORS // WORDS - 1) * WORDS
        for e, element in enumerate(k.elements(next(rest))):
            k.store(element, self.vectors, start + e)
        zero = Scalar.constant(0, "index")
        k.when(self.thread.equals(0), lambda: k.store(k.constant(0.0), self.lost, zero))
        for (row, vector), eight in zip(self.places, self._eights(state), strict=True):
            place = row * p.stride_s + vector
            for i, term in enumerate(self._terms(self.flat(eight))):
                k.store_as_is(term, self.work, place + i * (p.dk * p.stride_s))
        return list(rest)

    # ---- products --------------------------------------------------------------------------------------------------
    def _left(self, buffer: Buffer, start: Scalar, stride: int, *, transposed: bool = False) -> ir.Value:
        return self.k.matrix_load("AOp", buffer, start, self.p.half_stride(stride), transposed)

    def _right(self, start: Scalar) -> ir.Value:
        return self.k.matrix_load("BOp", self.work, start, self.p.half_stride(self.p.stride_s))

    def _put_sums(self, sums: ir.Value, buffer: Buffer, start: Scalar) -> None:
        self.k.matrix_store(sums, buffer, start, self.p.sum_stride(self.p.stride_f))

    def _multiply_state(self) -> None:
        """K S and Q S, to the workgroup's memory in place of the state's terms; a matrix each subgroup."""
        k, p = self.k, self.p
        kind, rest = self.subgroup.divide_unsigned(p.subgroups // 2)
        strip, column = rest.divide_unsigned(p.across)
        tile = kind * self.queries if self.c.has_delta else Scalar.constant(self.queries, "index")
        sums, low = k.matrix_zero(), k.matrix_zero()
        for depth in range(p.dk // SIDE):
            left = self._left(self.rows, tile + strip * (SIDE * p.stride_k) + depth * _HALF, p.stride_k)
            place = column * _HALF + depth * SIDE * p.stride_s
            sums = k.matrix_multiply_add(left, self._right(place), sums)
            low = k.matrix_multiply_add(left, self._right(place + p.dk * p.stride_s), low)
        sums = k.matrix_add_scaled(sums, low, 1 / LOW)
        k.barrier()
        self._put_sums(sums, self.work, self._sums_place(strip, column) + kind * self.sums_q)
        k.barrier()

    def _sums_place(self, strip: Scalar, column: Scalar) -> Scalar:
        return strip * (SIDE * self.p.stride_f) + column * _FULL

    def _number(self, start: int, i: Scalar | int = 0) -> ir.Value:
        place = i + start if isinstance(i, Scalar) else Scalar.constant(start + i, "index")
        return self.k.load(self.vectors, place)

    def _sums(self, start: int) -> list[ir.Value]:
        """This thread's eight of some sums."""
        place = self.token * self.p.stride_f + self.vector * (NUMBERS // WORDS)
        return self.flat((self.k.load(self.work, place + start), self.k.load(self.work, place + (start + 1))))

    def _put_terms(self, values: list[ir.Value], terms: Scalar) -> None:
        """Two terms of this thread's eight numbers, and whether they are in range."""
        k, place = self.k, self.token * self.p.stride_s + self.vector
        self._keep(within(k, values))
        for i, term in enumerate(self._terms(values)):
            k.store_as_is(term, self.work, place + terms + i * (CHUNK * self.p.stride_s))

    def _terms(self, values: list[ir.Value]) -> tuple[ir.Value, ir.Value]:
        return split(self.k, values, self.o.zero)

    def _keep(self, condition: Scalar) -> None:
        """Unless that holds the chunk is to go through token by token."""
        k, zero = self.k, Scalar.constant(0, "index")
        otherwise = condition ^ Scalar.constant(1, "i1")
        k.when(otherwise, lambda: k.store(k.constant(1.0), self.lost, zero))

    def _updates(self, t: Scalar, value: list[ir.Value]) -> None:
        """The terms of u, and of rest u."""
        k, p = self.k, self.p
        values = self.o.eight_of(value)
        if self.c.has_delta:
            k.when(self.half.equals(0), lambda: self._remainders(values))
            k.barrier()
            k.when(self.subgroup < p.subgroups // 2, self._solve)
            k.barrier()
            updates = self._sums(0)
        else:
            self._keep(within(k, self._sums(self.sums_q)))
            inside = t + self.token < self.tokens
            updates = [k.select(inside, value, k.constant(0.0)) for value in values]
        last = self.half.equals(1)
        factor = k.select(last, self._number(REST, self.token), k.constant(1.0))
        first, second = (Scalar.constant(terms[0], "index") for terms in (self.terms_u, self.terms_w))
        self._put_terms([k.mul(factor, value) for value in updates], last.select(second, first))
        k.barrier()

    def _remainders(self, values: list[ir.Value]) -> None:
        """The terms of r; for tokens after the last one ``solve`` has zeros."""
        k, before = self.k, self._number(PRE, self.token)
        rest = [k.sub(value, k.mul(before, held)) for value, held in zip(values, self._sums(0), strict=True)]
        self._put_terms(rest, Scalar.constant(self.terms_u[0], "index"))

    def _solve(self) -> None:
        """Solve r, in place of K S."""
        k, p = self.k, self.p
        strip, column = self.subgroup.divide_unsigned(p.across)
        sums, low = k.matrix_zero(), k.matrix_zero()
        for depth in range(CHUNK // SIDE):
            high, small = (self._factor(i, strip, depth) for i in range(2))
            right, rest = (self._update(terms, depth, column) for terms in self.terms_u)
            sums = k.matrix_multiply_add(high, right, sums)
            low = k.matrix_multiply_add(high, rest, low)
            low = k.matrix_multiply_add(small, right, low)
        self._put_sums(k.matrix_add_scaled(sums, low, 1 / LOW), self.work, self._sums_place(strip, column))

    def _factor(self, matrix: int, strip: Scalar, depth: int) -> ir.Value:
        stride = ACROSS + 1
        return self._left(self.matrices, strip * (SIDE * stride) + (matrix * CHUNK * stride + depth * _HALF), stride)

    def _update(self, start: int, depth: int, column: Scalar) -> ir.Value:
        return self._right(column * _HALF + (start + depth * SIDE * self.p.stride_s))

    def _multiply_updates(self) -> None:
        """``mix`` u in place of the sums before it, and k^T (rest u) in place of keys and queries."""
        k, p = self.k, self.p
        k.when(self.subgroup >= Scalar.constant(p.subgroups // 2, "index"), self._mix)
        strip, column = self.subgroup.divide_unsigned(p.across)
        apart = p.subgroups // p.across
        count = p.dk // SIDE // apart
        right = [[self._update(terms, depth, column) for terms in self.terms_w] for depth in range(CHUNK // SIDE)]
        found: list[ir.Value] = []
        for i in range(count):
            sums, low = k.matrix_zero(), k.matrix_zero()
            for depth in range(CHUNK // SIDE):
                start = (strip + i * apart) * _HALF + depth * SIDE * p.stride_k
                left = self._left(self.rows, start, p.stride_k, transposed=True)
                sums = k.matrix_multiply_add(left, right[depth][0], sums)
                low = k.matrix_multiply_add(left, right[depth][1], low)
            found.append(k.matrix_add_scaled(sums, low, 1 / LOW))
        k.barrier()
        for i, sums in enumerate(found):
            self._put_sums(sums, self.rows, self._sums_place(strip + i * apart, column))
        k.barrier()

    def _mix(self) -> None:
        k, p = self.k, self.p
        strip, column = (self.subgroup - p.subgroups // 2).divide_unsigned(p.across)
        sums, low = k.matrix_zero(), k.matrix_zero()
        for depth in range(CHUNK // SIDE):
            left = self._factor(matrices(self.c) - 1, strip, depth)
            high, small = (self._update(terms, depth, column) for terms in self.terms_u)
            sums = k.matrix_multiply_add(left, high, sums)
            low = k.matrix_multiply_add(left, small, low)
        self._put_sums(k.matrix_add_scaled(sums, low, 1 / LOW), self.work, self._sums_place(strip, column))

    def _finish(self, t: Scalar, state: list[ir.Value]) -> list[ir.Value]:
        """Write the outputs; the next state."""
        k, p = self.k, self.p
        token = t + self.token

        def write() -> None:
            before, scale = self._number(PRE, self.token), k.constant(self.c.scale)
            pairs = zip(self._sums(self.sums_q), self._sums(0), strict=True)
            self.write_output(token, self.vector, [k.mul(scale, k.fma(before, seen, new)) for seen, new in pairs])

        k.when(self.half.equals(1) & (token < self.tokens), write)
        total = k.splat(self._number(TOTAL), WORDS)
        result: list[ir.Value] = []
        for (row, vector), eight in zip(self.places, self._eights(state), strict=True):
            place = row * p.stride_f + vector * (NUMBERS // WORDS)
            result += [k.fma(total, held, k.load(self.rows, place + i)) for i, held in enumerate(eight)]
        return result
