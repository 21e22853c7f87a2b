"""The second kernel of strategy ``fused_simt_chunks``: the state goes through the chunks, 16 columns a workgroup.

    r = v - pre * (k S);   u = solve r;   o = scaled * (q S) + mix u;   S <- total S + k^T (rest * u)

S from before the chunk, rows of 16 tokens; linear and gated: u = v. A column lies over several threads, in registers;
the sums over them of all 16 tokens are one tree. Values of a thread are as wide as it has columns. Keys, queries and
factors (``simt_chunk_operands``) pass through the workgroup's memory, those of the next chunk under way. A chunk whose
decays grow too much goes through token by token.
"""

from __future__ import annotations

from iree.compiler import ir

from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer, Kernel
from .contract import LinearAttention
from .simt_chunk_operands import (
    BOUNDED,
    CHUNK,
    COLUMNS,
    DECAY,
    PRE,
    RATE,
    REST,
    SCALED,
    STRIDE,
    TOTAL,
    VECTORS,
    WIDTH,
    ChunkOperands,
    ChunkPlan,
    matrices,
    mix_start,
    scatter,
)

_LARGEST = 3.4028234663852886e38  # finite f32
_PAD = COLUMNS + 1  # numbers from token to token of the updates, against bank conflicts


class Chunks:
    """Emits the kernel.

    Buffers: query, key, value, past state if there is one, factors, output, present state.

    Args:
        k: Emits instructions.
        c: What to compute.
        p: How the state lies over the threads.
        states: B * Hkv.
        tokens: T.
        whole: Whether that is a number of whole chunks.
    """

    def __init__(
        self, k: Kernel, c: LinearAttention, p: ChunkPlan, states: Scalar, tokens: Scalar, *, whole: bool
    ) -> None:
        self.k, self.c, self.p, self.states, self.tokens = k, c, p, states, tokens
        self.o = o = ChunkOperands(k, c, tokens, states, whole)
        o.bind_rows()
        self.value = o.buffer(c.kv_heads * c.dv, c.dtype, p.columns)
        self.past = o.buffer(c.dk * c.dv, c.state_dtype, p.columns, states) if c.has_past else None
        self.chunks = (tokens + (CHUNK - 1)).divide_unsigned(CHUNK)[0]
        self.factors = o.buffer(matrices(c) + VECTORS, "f32", WIDTH, states * self.chunks)
        self.output = o.buffer(c.out_heads * c.dv, c.dtype, p.columns)
        self.present = o.buffer(c.dk * c.dv, c.state_dtype, p.columns, states)
        self.loads = c.dk // WIDTH // p.lanes

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
        k, p, o = self.k, self.p, self.o
        self.item = item
        o.choose(item)
        subgroup, place = k.thread().divide_unsigned(p.subgroup)
        self.lane, column = place.divide_unsigned(p.apart)
        self.place = subgroup * p.apart + column
        self.column = k.tile() * (COLUMNS // p.columns) + self.place
        state = [self._past(i) for i in range(self.loads * WIDTH)]
        types = [value.type for value in state]
        found = k.choose(self.tokens > 0, lambda: self._chunks(state), lambda: state, types)
        for i, value in enumerate(found):
            k.store(value, self.present, self._state_index(i))

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
    def _state_index(self, element: int) -> Scalar:
        load, inside = divmod(element, WIDTH)
        row = (self.lane + load * self.p.lanes) * WIDTH + inside
        return (self.item * self.c.dk + row) * (self.c.dv // self.p.columns) + self.column

    def _past(self, element: int) -> ir.Value:
        if self.past is None:
            return self.k.constant(0.0, self.p.columns)
        return self.k.widen(self.past, self.k.load(self.past, self._state_index(element)))

    # ---- loads -----------------------------------------------------------------------------------------------------
    def _places(self) -> list[tuple[Scalar, Scalar]]:
        """Token and vector of each of this thread's loads of keys and queries."""
        vectors = self.c.dk // WIDTH
        return [(self.k.thread() + i).divide_unsigned(vectors) for i in range(0, CHUNK * vectors, self.p.threads)]

    def _matrix_places(self) -> list[Scalar]:
        count = matrices(self.c) // WIDTH
        return [(self.k.thread() + i).minimum(count - 1) for i in range(0, count, self.p.threads)]

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
            *(k.load(self.value, self._value_index(t + self._own(i))) for i in range(self.p.own)),
        ]

    def _unpack(self, t: Scalar, loaded: list[ir.Value]) -> list[ir.Value]:
        """Hand what was loaded to the workgroup; returns the values of this thread's own tokens."""
        k, o, places, others = self.k, self.o, self._places(), self._matrix_places()
        k.barrier()
        rest = iter(loaded)
        for buffer, tile in ((o.key, self.tile_k), (o.query, self.tile_q)):
            for i, (row, _) in enumerate(places):
                value = k.widen(buffer, next(rest))
                value = k.select(o.inside(t + row), value, k.constant(0.0, WIDTH))
                k.store(value, tile, k.thread() + i * self.p.threads)
        for place in others:
            k.store(next(rest), self.matrices, place)
        start = k.thread().minimum(VECTORS // WIDTH - 1) * WIDTH
        for e, element in enumerate(k.elements(next(rest))):
            k.store(element, self.vectors, start + e)
        own = [k.widen(self.value, value) for value in rest]
        k.barrier()
        return own

    def _value_index(self, t: Scalar) -> Scalar:
        return (self.o.row(t) * self.c.kv_heads + self.o.head) * (self.c.dv // self.p.columns) + self.column

    def _own(self, i: int) -> Scalar:
        """The i-th of the tokens whose updates and outputs this thread computes."""
        return self.lane * self.p.own + i

    def _vector(self, start: int, i: Scalar | int = 0) -> Scalar:
        return Scalar.constant(start + i, "index") if isinstance(i, int) else i + start

    def _part(self, tile: Buffer, token: Scalar | int, load: int) -> list[ir.Value]:
        """This lane's elements of a key or query."""
        base = token * (self.c.dk // WIDTH) + self.lane if isinstance(token, Scalar) else self.lane
        offset = (0 if isinstance(token, Scalar) else token * (self.c.dk // WIDTH)) + load * self.p.lanes
        return self.k.elements(self.k.load(tile, base + offset))

    def _write(self, value: ir.Value, t: Scalar) -> None:
        """This thread's columns of the output."""
        c, o = self.c, self.o
        row = o.batch * self.tokens + t
        self.k.store(value, self.output, (row * c.out_heads + o.head) * (c.dv // self.p.columns) + self.column)

    def _number(self, place: Scalar) -> ir.Value:
        """One of the vectors' numbers, for each column."""
        return self.k.splat(self.k.load(self.vectors, place), self.p.columns)

    def _products(self, tiles: list[Buffer], tokens: list[Scalar | int], state: list[ir.Value]) -> list[ir.Value]:
        """This lane's parts of products with the state: all tiles of the first token, then of the next."""
        k, sums = self.k, [self.k.constant(0.0, self.p.columns)] * (len(tiles) * len(tokens))
        for i in range(self.loads):
            for n, token in enumerate(tokens):
                for m, tile in enumerate(tiles):
                    place = n * len(tiles) + m
                    for a, held in zip(self._part(tile, token, i), state[i * WIDTH :], strict=False):
                        sums[place] = k.fma(k.splat(a, self.p.columns), held, sums[place])
        return sums

    # ---- a chunk ---------------------------------------------------------------------------------------------------
    def _together(self, t: Scalar, state: list[ir.Value], own: list[ir.Value]) -> list[ir.Value]:
        """All tokens at once; the next state."""
        k, c, p = self.k, self.c, self.p
        tiles = [self.tile_k, self.tile_q] if c.has_delta else [self.tile_q]
        read = scatter(k, self._products(tiles, list(range(CHUNK)), state), self.lane, p.lanes, p.apart)
        seen = [read[i * len(tiles) + len(tiles) - 1] for i in range(p.own)]
        if c.has_delta:
            assert self.rest is not None
            for i in range(p.own):
                before = self._number(self._vector(PRE, self._own(i)))
                self._put(k.sub(own[i], k.mul(before, read[i * len(tiles)])), self.rest, i)
            k.barrier()
            own = self._times_column(0, self.rest, [k.constant(0.0, p.columns)] * p.own)[0]
        for i in range(p.own):
            self._put(own[i], self.updates, i)
        k.barrier()
        scaled = [k.mul(self._number(self._vector(SCALED, self._own(i))), seen[i]) for i in range(p.own)]
        outputs, updates = self._times_column(mix_start(c), self.updates, scaled)
        for i, value in enumerate(outputs):
            token = t + self._own(i)
            k.when(self.o.inside(token), lambda value=value, token=token: self._write(value, token))
        weighed = [k.mul(self._number(self._vector(REST, j)), u) for j, u in enumerate(updates)]
        total = self._number(self._vector(TOTAL))
        result = [k.mul(total, value) for value in state]
        for i in range(self.loads):
            for j, update in enumerate(weighed):
                for e, factor in enumerate(self._part(self.tile_k, j, i), i * WIDTH):
                    result[e] = k.fma(k.splat(factor, p.columns), update, result[e])
        return result

    def _put(self, value: ir.Value, column: Buffer, i: int) -> None:
        """Hand the values of the i-th own token to the other lanes of these columns."""
        for e, element in enumerate(self.k.elements(value)):
            self.k.store(element, column, self._own(i) * _PAD + self.place * self.p.columns + e)

    def _times_column(
        self, start: int, column: Buffer, initial: list[ir.Value]
    ) -> tuple[list[ir.Value], list[ir.Value]]:
        """The own tokens' rows of a matrix of factors times this thread's columns; and the columns.

        Factors of later tokens are zeros. NaN or inf of such a token would spoil the sum all the same, so one that is
        not finite is taken again, without them: that costs a comparison where all is well.
        """
        k, width = self.k, self.p.columns
        places = [self.place * width + j * _PAD for j in range(CHUNK)]
        numbers = [k.join([k.load(column, place + e) for e in range(width)]) for place in places]

        def rows(causal: bool) -> list[ir.Value]:
            results: list[ir.Value] = []
            for i, total in enumerate(initial):
                place = self._own(i) * (STRIDE // WIDTH) + start // WIDTH
                for part in range(CHUNK // WIDTH):
                    row = k.elements(k.load(self.matrices, place + part))
                    for j, factor in enumerate(row, part * WIDTH):
                        added = k.fma(k.splat(factor, width), numbers[j], total)
                        if causal:
                            added = k.select(self._own(i) >= Scalar.constant(j, "index"), added, total)
                        total = added
                results.append(total)
            return results

        results = rows(causal=False)
        finite = self._are_finite([element for value in results for element in k.elements(value)])
        types = [value.type for value in results]
        return k.choose(finite, lambda: results, lambda: rows(causal=True), types), numbers

    def _are_finite(self, values: list[ir.Value]) -> Scalar:
        """Whether none is NaN or inf, which comparisons tell; the difference of a value with itself may be folded."""
        k = self.k
        lowest, highest = (Scalar(k.constant(bound)) for bound in (-_LARGEST, _LARGEST))
        checks = [check for value in values for check in (Scalar(value) >= lowest, Scalar(value) <= highest)]
        found = checks[0]
        for check in checks[1:]:
            found = found & check
        return found

    def _one_by_one(self, t: Scalar, state: list[ir.Value]) -> list[ir.Value]:
        """Token by token; the next state."""
        k, c, p = self.k, self.c, self.p

        def product(tile: Buffer, token: Scalar, state: list[ir.Value]) -> ir.Value:
            (total,) = self._products([tile], [token], state)
            offset = 1
            while offset < p.lanes:
                total = k.add(total, k.join([k.shuffle_xor(e, offset * p.apart) for e in k.elements(total)]))
                offset *= 2
            return total

        def step(i: Scalar, state: list[ir.Value]) -> list[ir.Value]:
            token = t + i
            decay = self._number(self._vector(DECAY, i))
            state = [k.mul(value, decay) for value in state]
            update = k.widen(self.value, k.load(self.value, self._value_index(token)))
            if c.has_delta:
                held = product(self.tile_k, i, state)
                update = k.mul(self._number(self._vector(RATE, i)), k.sub(update, held))
            keys = [factor for n in range(self.loads) for factor in self._part(self.tile_k, i, n)]
            state = [k.fma(k.splat(a, p.columns), update, value) for a, value in zip(keys, state, strict=True)]
            read = k.mul(k.constant(c.scale, p.columns), product(self.tile_q, i, state))
            k.when(self.o.inside(token) & self.lane.equals(0), lambda: self._write(read, token))
            return state

        return k.loop(Scalar.constant(0, "index"), Scalar.constant(CHUNK, "index"), 1, state, step)
