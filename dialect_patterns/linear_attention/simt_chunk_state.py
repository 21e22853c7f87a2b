"""The second kernel of strategy ``fused_simt_chunks``: the state goes through the chunks, 16 columns a workgroup.

    r = v - pre * (k S);   u = solve r;   o = scaled * (q S) + mix u;   S <- total S + k^T (rest * u)

S from before the chunk, rows of 16 tokens; linear and gated: u = v. A column lies over 8 threads, in registers; the
sums over them of all 16 tokens are one tree. Keys, queries and factors (``simt_chunk_operands``) pass through the
workgroup's memory, those of the next chunk under way. A chunk whose decays grow too much goes through token by token.
"""

from __future__ import annotations

from iree.compiler import ir

from ..scalar import Scalar
from ..simt_kernel import Buffer, Kernel
from .contract import LinearAttention
from .simt_chunk_operands import (
    BOUNDED,
    CHUNK,
    COLUMNS,
    DECAY,
    LANES,
    PRE,
    RATE,
    REST,
    SCALED,
    STRIDE,
    THREADS,
    TOTAL,
    VECTORS,
    WIDTH,
    ChunkOperands,
    matrices,
    mix_start,
)

_OWN = CHUNK // LANES  # tokens whose updates and outputs a thread computes
_PAD = COLUMNS + 1  # numbers from token to token of the updates, against bank conflicts


class Chunks:
    """Emits the kernel.

    Buffers: query, key, value, past state if there is one, factors, output, present state.

    Args:
        k: Emits instructions.
        c: What to compute.
        states: B * Hkv.
        tokens: T.
    """

    def __init__(self, k: Kernel, c: LinearAttention, states: Scalar, tokens: Scalar) -> None:
        self.k, self.c, self.states, self.tokens = k, c, states, tokens
        self.o = o = ChunkOperands(k, c, tokens, states)
        o.bind_rows()
        self.value = o.buffer(c.kv_heads * c.dv, c.dtype, 1)
        self.past = o.buffer(c.dk * c.dv, c.state_dtype, 1, states) if c.has_past else None
        self.chunks = (tokens + (CHUNK - 1)).divide_unsigned(CHUNK)[0]
        self.factors = o.buffer(matrices(c) + VECTORS, "f32", WIDTH, states * self.chunks)
        self.output = o.buffer(c.out_heads * c.dv, c.dtype, 1)
        self.present = o.buffer(c.dk * c.dv, c.state_dtype, 1, states)
        self.loads = c.dk // WIDTH // LANES

    def emit(self) -> None:
        """Emit everything."""
        k, c, item = self.k, self.c, self.k.item()
        self.tile_q, self.tile_k = (k.shared_chunks(CHUNK * c.dk // WIDTH) for _ in range(2))
        self.matrices = k.shared_chunks(matrices(c) // WIDTH)
        self.vectors = k.shared(VECTORS)
        self.rest = k.shared(CHUNK * _PAD) if c.has_delta else None
        self.updates = k.shared(CHUNK * _PAD)
        k.when(item < self.states, lambda: self._state(item))

    def _state(self, item: Scalar) -> None:
        k, o = self.k, self.o
        self.item = item
        o.choose(item)
        self.apart = k.group.subgroup // LANES  # neighbouring threads have neighbouring columns
        subgroup, place = k.thread().divide_unsigned(k.group.subgroup)
        self.lane, column = place.divide_unsigned(self.apart)
        self.place = subgroup * self.apart + column
        self.column = k.tile() * COLUMNS + self.place
        state = [k.join([self._past(i, e) for e in range(WIDTH)]) for i in range(self.loads)]
        types = [value.type for value in state]
        found = k.choose(self.tokens > 0, lambda: self._chunks(state), lambda: state, types)
        for i, value in enumerate(found):
            for e, element in enumerate(k.elements(value)):
                k.store(element, self.present, self._state_index(i, e))

    def _chunks(self, state: list[ir.Value]) -> list[ir.Value]:
        """All chunks; the last state."""
        k, count, types = self.k, len(state), [value.type for value in state]
        zero = Scalar.constant(0, "index")

        def chunk(t: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            state, loaded = carried[:count], carried[count:]
            own = self._unpack(t, loaded)
            following = self._fetch((t + CHUNK).minimum(self.tokens - 1))
            bounded = Scalar(k.load(self.vectors, self._vector(BOUNDED))) > 0.5
            state = k.choose(bounded, lambda: self._together(t, state, own), lambda: self._one_by_one(t, state), types)
            return [*state, *following]

        return k.loop(zero, self.tokens, CHUNK, [*state, *self._fetch(zero)], chunk)[:count]

    # ---- the state -------------------------------------------------------------------------------------------------
    def _state_index(self, load: int, element: int) -> Scalar:
        row = (self.lane + load * LANES) * WIDTH + element
        return (self.item * self.c.dk + row) * self.c.dv + self.column

    def _past(self, load: int, element: int) -> ir.Value:
        if self.past is None:
            return self.k.constant(0.0)
        return self.k.widen(self.past, self.k.load(self.past, self._state_index(load, element)))

    # ---- loads -----------------------------------------------------------------------------------------------------
    def _places(self) -> list[tuple[Scalar, Scalar]]:
        """Token and vector of each of this thread's loads of keys and queries."""
        vectors = self.c.dk // WIDTH
        return [(self.k.thread() + i).divide_unsigned(vectors) for i in range(0, CHUNK * vectors, THREADS)]

    def _matrix_places(self) -> list[Scalar]:
        count = matrices(self.c) // WIDTH
        return [(self.k.thread() + i).minimum(count - 1) for i in range(0, count, THREADS)]

    def _fetch(self, t: Scalar) -> list[ir.Value]:
        """All that this thread loads of a chunk, as stored."""
        k, c, o = self.k, self.c, self.o
        chunk = t.divide_unsigned(CHUNK)[0]
        t = chunk * CHUNK
        base = (self.item * self.chunks + chunk) * ((matrices(c) + VECTORS) // WIDTH)
        places = self._places()
        last = base + matrices(c) // WIDTH + k.thread().minimum(VECTORS // WIDTH - 1)
        return [
            *(o.load_key(t + row, vector) for row, vector in places),
            *(o.load_query(t + row, vector) for row, vector in places),
            *(k.load(self.factors, base + place) for place in self._matrix_places()),
            k.load(self.factors, last),
            *(k.load(self.value, self._value_index(t + self._own(i))) for i in range(_OWN)),
        ]

    def _unpack(self, t: Scalar, loaded: list[ir.Value]) -> list[ir.Value]:
        """Hand what was loaded to the workgroup; returns the values of this thread's own tokens."""
        k, o, places, others = self.k, self.o, self._places(), self._matrix_places()
        k.barrier()
        rest = iter(loaded)
        for buffer, tile in ((o.key, self.tile_k), (o.query, self.tile_q)):
            for i, (row, _) in enumerate(places):
                value = k.widen(buffer, next(rest))
                value = k.select(t + row < self.tokens, value, k.constant(0.0, WIDTH))
                k.store(value, tile, k.thread() + i * THREADS)
        for place in others:
            k.store(next(rest), self.matrices, place)
        start = k.thread().minimum(VECTORS // WIDTH - 1) * WIDTH
        for e, element in enumerate(k.elements(next(rest))):
            k.store(element, self.vectors, start + e)
        own = [k.widen(self.value, value) for value in rest]
        k.barrier()
        return own

    def _value_index(self, t: Scalar) -> Scalar:
        return (self.o.row(t) * self.c.kv_heads + self.o.head) * self.c.dv + self.column

    def _own(self, i: int) -> Scalar:
        """The i-th of the tokens whose updates and outputs this thread computes."""
        return self.lane * _OWN + i

    def _vector(self, start: int, i: Scalar | int = 0) -> Scalar:
        return Scalar.constant(start + i, "index") if isinstance(i, int) else i + start

    def _part(self, tile: Buffer, token: Scalar | int, load: int) -> list[ir.Value]:
        """This lane's elements of a key or query."""
        base = token * (self.c.dk // WIDTH) + self.lane if isinstance(token, Scalar) else self.lane
        offset = (0 if isinstance(token, Scalar) else token * (self.c.dk // WIDTH)) + load * LANES
        return self.k.elements(self.k.load(tile, base + offset))

    def _write(self, value: ir.Value, t: Scalar) -> None:
        """One element of the output."""
        c, o = self.c, self.o
        row = o.batch * self.tokens + t
        self.k.store(value, self.output, (row * c.out_heads + o.head) * c.dv + self.column)

    # ---- a chunk ---------------------------------------------------------------------------------------------------
    def _together(self, t: Scalar, state: list[ir.Value], own: list[ir.Value]) -> list[ir.Value]:
        """All tokens at once; the next state."""
        k, c = self.k, self.c
        wide = [k.elements(value) for value in state]
        tiles = [self.tile_k, self.tile_q] if c.has_delta else [self.tile_q]
        sums = [k.constant(0.0)] * (CHUNK * len(tiles))
        for i in range(self.loads):
            for token in range(CHUNK):
                for n, tile in enumerate(tiles):
                    place = token * len(tiles) + n
                    for a, b in zip(self._part(tile, token, i), wide[i], strict=True):
                        sums[place] = k.fma(a, b, sums[place])
        read = self.o.scatter(sums, self.lane, self.apart)
        seen = [read[i * len(tiles) + len(tiles) - 1] for i in range(_OWN)]
        if c.has_delta:
            assert self.rest is not None
            for i in range(_OWN):
                before = k.load(self.vectors, self._vector(PRE, self._own(i)))
                left = k.sub(own[i], k.mul(before, read[i * len(tiles)]))
                k.store(left, self.rest, self._own(i) * _PAD + self.place)
            k.barrier()
            own = self._times_column(0, self.rest, [k.constant(0.0)] * _OWN)[0]
        for i in range(_OWN):
            k.store(own[i], self.updates, self._own(i) * _PAD + self.place)
        k.barrier()
        scaled = [k.mul(k.load(self.vectors, self._vector(SCALED, self._own(i))), seen[i]) for i in range(_OWN)]
        outputs, updates = self._times_column(mix_start(c), self.updates, scaled)
        for i, value in enumerate(outputs):
            token = t + self._own(i)
            k.when(token < self.tokens, lambda value=value, token=token: self._write(value, token))
        weighed = [k.mul(k.load(self.vectors, self._vector(REST, j)), u) for j, u in enumerate(updates)]
        total = k.load(self.vectors, self._vector(TOTAL))
        result: list[ir.Value] = []
        for i in range(self.loads):
            elements = [k.mul(total, e) for e in wide[i]]
            for j, update in enumerate(weighed):
                key = self._part(self.tile_k, j, i)
                elements = [k.fma(a, update, e) for a, e in zip(key, elements, strict=True)]
            result.append(k.join(elements))
        return result

    def _times_column(
        self, start: int, column: Buffer, initial: list[ir.Value]
    ) -> tuple[list[ir.Value], list[ir.Value]]:
        """The own tokens' rows of a matrix of factors times this thread's column; and the column."""
        k = self.k
        numbers = [k.load(column, self.place + j * _PAD) for j in range(CHUNK)]
        results: list[ir.Value] = []
        for i, total in enumerate(initial):
            place = self._own(i) * (STRIDE // WIDTH) + start // WIDTH
            for part in range(CHUNK // WIDTH):
                row = k.elements(k.load(self.matrices, place + part))
                for factor, number in zip(row, numbers[part * WIDTH :], strict=False):
                    total = k.fma(factor, number, total)
            results.append(total)
        return results, numbers

    def _one_by_one(self, t: Scalar, state: list[ir.Value]) -> list[ir.Value]:
        """Token by token; the next state."""
        k, c = self.k, self.c

        def sum_lanes(value: ir.Value) -> ir.Value:
            offset = 1
            while offset < LANES:
                value = k.add(value, k.shuffle_xor(value, offset * self.apart))
                offset *= 2
            return value

        def product(tile: Buffer, token: Scalar, state: list[ir.Value]) -> ir.Value:
            total = k.constant(0.0)
            for i, value in enumerate(state):
                for a, b in zip(self._part(tile, token, i), k.elements(value), strict=True):
                    total = k.fma(a, b, total)
            return sum_lanes(total)

        def step(i: Scalar, state: list[ir.Value]) -> list[ir.Value]:
            token = t + i
            decay = k.splat(k.load(self.vectors, self._vector(DECAY, i)), WIDTH)
            state = [k.mul(value, decay) for value in state]
            update = k.widen(self.value, k.load(self.value, self._value_index(token)))
            if c.has_delta:
                held = product(self.tile_k, i, state)
                update = k.mul(k.load(self.vectors, self._vector(RATE, i)), k.sub(update, held))
            wide = k.splat(update, WIDTH)
            keys = [k.join(self._part(self.tile_k, i, n)) for n in range(self.loads)]
            state = [k.fma(key, wide, value) for key, value in zip(keys, state, strict=True)]
            read = k.mul(k.constant(c.scale), product(self.tile_q, i, state))
            k.when((token < self.tokens) & self.lane.equals(0), lambda: self._write(read, token))
            return state

        return k.loop(Scalar.constant(0, "index"), Scalar.constant(CHUNK, "index"), 1, state, step)
