"""The second kernel of strategy ``fused_warp_chunks``: the state over the chunks, and the outputs, in registers.

    r = v - pre (k S);  u = solve r;  o = scale (pre (q S) + mix u);  S <- total S + k^T (rest u)        delta rules
    u = v                                                                                               the others

A warp holds eight columns of one state over all chunks as sums [16, 8] of its products, and waits for no other warp:
sums become right factors of the next product by turning 8 x 8 numbers. The state, r and rest u enter in two terms of 16
bits where they lead to the next state, in one where they lead to outputs. Keys, queries and factors of a chunk are
copied to the workgroup's memory while the chunk before is computed; rows of 16-byte chunks lie there with the chunk's
number xor the row's, so that eight rows are in eight banks. A chunk whose numbers 16 bits cannot hold is done token by
token (``warp_chunk_steps``).
"""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir

from ..emit.chunk_words import LOW, NUMBERS
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Kernel
from ..emit.warp import LANES, Sums, Warp
from .contract import LinearAttention
from .mma_chunk_operands import (
    CHUNK,
    LARGEST,
    ORDINARY,
    PRE,
    REST,
    SIDE,
    TOTAL,
    WORDS,
    MmaOperands,
    matrices,
    record,
)
from .warp_chunk_memory import STRIPS, Staged, WarpPlan
from .warp_chunk_steps import Steps

COLUMNS = 8
"""Of a state, in a warp."""
_ANY_FINITE = 1.0e38


class WarpChunks:
    """Emits the kernel.

    Buffers: query, key, value, past state if there is one, factors, output, present state.

    Args:
        k: Emits instructions.
        c: What to compute.
        p: How a workgroup is made.
        streams: B * max(Hq, Hkv).
        tokens: T.
    """

    def __init__(self, k: Kernel, c: LinearAttention, p: WarpPlan, streams: Scalar, tokens: Scalar) -> None:
        self.k, self.c, self.p, self.streams, self.tokens = k, c, p, streams, tokens
        self.o = o = MmaOperands(k, c, tokens, streams)
        state = o.batches * (c.kv_heads * c.dk * c.dv // 2)
        self.value = o.pairs(c.dtype, o.all_rows * (c.kv_heads * c.dv // 2))
        self.past = o.pairs(c.state_dtype, state) if c.has_past else None
        self.factors = o.buffer(streams * o.chunks * record(c))
        self.output = o.pairs(c.dtype, o.all_rows * (c.out_heads * c.dv // 2))
        self.present = o.pairs(c.state_dtype, state)
        self.tiles = c.dk // SIDE
        """Matrices of sums that make up the columns of the state."""

    def emit(self) -> None:
        """Emit everything."""
        k, p, item = self.k, self.p, self.k.item()
        self.warp = Warp(k, self.c.dtype, k.shared_chunks(p.memory // (4 * WORDS)))
        k.when(item < self.streams, lambda: self._stream(item))

    def _stream(self, item: Scalar) -> None:
        k, p, o = self.k, self.p, self.o
        o.choose(item)
        warp, lane = k.thread().divide_unsigned(LANES)
        self.row, self.place = lane.divide_unsigned(WORDS)  # g and t
        self.pair = (k.tile() * p.warps + warp) * (COLUMNS // 2) + self.place
        """This lane's pair of columns."""
        self.staged = Staged(self.warp, p, o, self.factors, item)
        self.steps = Steps(self)
        state = [value for place in self._state_places() for value in self._past(place)]
        types = [value.type for value in state]
        found = k.choose(self.tokens > 0, lambda: self._chunks(state), lambda: state, types)

        def write() -> None:
            for i, place in enumerate(self._state_places()):
                k.store(k.join(found[2 * i : 2 * i + 2]), self.present, place)

        k.when(o.reader.equals(0), write)

    # ---- the state -------------------------------------------------------------------------------------------------
    def _state_places(self) -> list[Scalar]:
        """Where this lane's pairs lie, matrix by matrix."""
        first = self.o.state * self.c.dk + self.row
        return [(first + i) * (self.c.dv // 2) + self.pair for i in range(0, self.c.dk, NUMBERS)]

    def _past(self, place: Scalar) -> list[ir.Value]:
        k = self.k
        if self.past is None:
            return [k.constant(0.0)] * 2
        return k.elements(k.widen(self.past, k.load(self.past, place)))

    # ---- loads -----------------------------------------------------------------------------------------------------
    def load_value(self, t: Scalar) -> ir.Value:
        """This lane's pair of the value of a token, as stored."""
        c, o = self.c, self.o
        return self.k.load(self.value, (o.row(t) * c.kv_heads + o.head) * (c.dv // 2) + self.pair)

    def value_parts(self, stored: ir.Value) -> list[ir.Value]:
        """The two numbers of such a pair."""
        return self.k.elements(self.k.widen(self.value, stored))

    def write_output(self, t: Scalar, values: Sequence[ir.Value]) -> None:
        """This lane's pair of the output of a token."""
        k, c, o = self.k, self.c, self.o
        row = (o.batch * self.tokens + t) * c.out_heads + o.out_head
        scale = k.constant(c.scale)
        k.store(k.join([k.mul(scale, value) for value in values]), self.output, row * (c.dv // 2) + self.pair)

    def _values_of(self, t: Scalar) -> list[ir.Value]:
        return [self.load_value(t + (self.row + i)) for i in range(0, CHUNK, NUMBERS)]

    # ---- the chunks ------------------------------------------------------------------------------------------------
    def _chunks(self, state: list[ir.Value]) -> list[ir.Value]:
        """All chunks; the last state."""
        k, count = self.k, len(state)
        zero = Scalar.constant(0, "index")
        self.staged.copy(zero, self.staged.base)

        def chunk(t: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            state, values = carried[:count], carried[count:]
            other = self.staged.choose(t)
            self.warp.wait()
            k.barrier()
            following = t + CHUNK
            k.when(following < self.tokens, lambda: self.staged.copy(following, other))
            next_values = self._values_of(following)
            return [*self._chunk(t, state, values), *next_values]

        return k.loop(zero, self.tokens, CHUNK, [*state, *self._values_of(zero)], chunk)[:count]

    def _chunk(self, t: Scalar, state: list[ir.Value], loaded: list[ir.Value]) -> list[ir.Value]:
        """One chunk; the next state."""
        k, warp = self.k, self.warp
        values = [part for stored in loaded for part in self.value_parts(stored)]
        high, low = self._factors_of(state)
        before = [self.staged.number(PRE, self.row + i) for i in range(0, CHUNK, NUMBERS)]
        (seen,) = self._times_state(self.p.queries, high)
        if self.c.has_delta:
            held = self._join(*self._times_state(0, high, low))
            pairs = zip(values, held, strict=True)
            rest = [k.sub(value, k.mul(before[i // 2], known)) for i, (value, known) in enumerate(pairs)]
            largest = self._magnitude(rest)
            updates = self._solve(rest)
        else:
            largest = self._magnitude(_values(warp, seen))
            last = [t + (self.row + i) < self.tokens for i in range(0, CHUNK, NUMBERS)]
            updates = [k.select(last[i // 2], value, k.constant(0.0)) for i, value in enumerate(values)]
        factors = [self.staged.number(REST, self.row + i) for i in range(0, CHUNK, NUMBERS)]
        weighted = [k.mul(factors[i // 2], value) for i, value in enumerate(updates)]
        largest = k.maximum(largest, self._magnitude([*updates, *weighted]))
        bound = LARGEST if self.c.dtype == "f16" else _ANY_FINITE
        found = warp.largest(k.bits(largest))
        ordinary = (found <= k.bits(k.constant(bound))) & (Scalar(self.staged.number(ORDINARY)) > 0.5)
        types = [value.type for value in state]
        following = self._next(state, weighted)  # before it is known whether it is wanted

        def finish() -> list[ir.Value]:
            self._write(t, before, seen, updates)
            return following

        return k.choose(ordinary, finish, lambda: self.steps.emit(t, state), types)

    def _magnitude(self, values: Sequence[ir.Value]) -> ir.Value:
        """The largest magnitude; NaN wins."""
        k = self.k
        found = [k.magnitude(value) for value in values]
        while len(found) > 1:
            found = [k.maximum(*found[i : i + 2]) if i + 1 < len(found) else found[i] for i in range(0, len(found), 2)]
        return found[0]

    # ---- products --------------------------------------------------------------------------------------------------
    def _factors_of(self, values: Sequence[ir.Value]) -> tuple[list[list[ir.Value]], list[list[ir.Value]]]:
        """Sums, four values each, as right factors of 16 rows in two terms."""
        k, warp, scale = self.k, self.warp, self.k.constant(LOW)
        words: list[ir.Value] = []
        for i in range(0, len(values), 2):
            pair = values[i : i + 2]
            words.append(warp.pair(*pair))
            rest = [k.mul(scale, k.sub(x, y)) for x, y in zip(pair, warp.parts(words[-1]), strict=True)]
            words.append(warp.pair(*rest))
        turned = warp.turn(words)
        return self._twos(turned[::2]), self._twos(turned[1::2])

    def _once(self, values: Sequence[ir.Value]) -> list[list[ir.Value]]:
        """The same in one term."""
        return self._twos(self.warp.turn([self.warp.pair(*values[i : i + 2]) for i in range(0, len(values), 2)]))

    @staticmethod
    def _twos(words: Sequence[ir.Value]) -> list[list[ir.Value]]:
        return [list(words[i : i + 2]) for i in range(0, len(words), 2)]

    def _times_state(self, start: int, *terms: Sequence[Sequence[ir.Value]]) -> list[list[Sums]]:
        """Keys or queries, from there on, times the state's terms: of each, two matrices of 16 tokens."""
        warp = self.warp
        sums = [[warp.zero() for _ in range(STRIPS)] for _ in terms]
        for depth in range(self.tiles):
            for strip in range(STRIPS):
                left = self.staged.rows(start, strip, depth)
                for found, factors in zip(sums, terms, strict=True):
                    found[strip] = warp.multiply_add(left, factors[depth], found[strip])
        return sums

    def _join(self, high: Sequence[Sums], low: Sequence[Sums]) -> list[ir.Value]:
        """The values of sums of two terms."""
        k, factor = self.k, self.k.constant(1 / LOW)
        pairs = zip(_values(self.warp, high), _values(self.warp, low), strict=True)
        return [k.fma(small, factor, large) for large, small in pairs]

    def _solve(self, rest: Sequence[ir.Value]) -> list[ir.Value]:
        """``solve`` r; what is above its diagonal is not read."""
        warp = self.warp
        first, second = self._factors_of(rest)
        high, low = [[warp.zero() for _ in range(STRIPS)] for _ in range(2)]
        for strip in range(STRIPS):
            for depth in range(strip + 1):
                large, small = (self.staged.matrix(which, strip, depth) for which in range(2))
                high[strip] = warp.multiply_add(large, first[depth], high[strip])
                low[strip] = warp.multiply_add(large, second[depth], low[strip])
                low[strip] = warp.multiply_add(small, first[depth], low[strip])
        return self._join(high, low)

    def _write(self, t: Scalar, before: Sequence[ir.Value], seen: Sequence[Sums], updates: Sequence[ir.Value]) -> None:
        """The outputs of the chunk."""
        k, warp = self.k, self.warp
        right = self._once(updates)
        mixed = [warp.zero() for _ in range(STRIPS)]
        for strip in range(STRIPS):
            for depth in range(strip + 1):
                left = self.staged.matrix(matrices(self.c) - 1, strip, depth)
                mixed[strip] = warp.multiply_add(left, right[depth], mixed[strip])
        pairs = zip(_values(warp, seen), _values(warp, mixed), strict=True)
        values = [k.fma(before[i // 2], old, new) for i, (old, new) in enumerate(pairs)]
        for i in range(CHUNK // NUMBERS):
            token = t + (self.row + i * NUMBERS)
            pair = values[2 * i : 2 * i + 2]
            k.when(token < self.tokens, lambda token=token, pair=pair: self.write_output(token, pair))

    def _next(self, state: Sequence[ir.Value], weighted: Sequence[ir.Value]) -> list[ir.Value]:
        """The next state."""
        k, warp = self.k, self.warp
        high, low = self._factors_of(weighted)
        total, factor = self.staged.number(TOTAL), k.constant(1 / LOW)
        found: list[ir.Value] = []
        for tile in range(self.tiles):
            left = [self.staged.columns(tile, strip) for strip in range(STRIPS)]
            small = warp.zero()
            for i in range(STRIPS):
                small = warp.multiply_add(left[i], low[i], small)
            old = state[4 * tile : 4 * tile + 4]
            kept = [k.fma(total, x, k.mul(factor, y)) for x, y in zip(old, warp.values(small), strict=True)]
            sums = warp.sums(kept)
            for i in range(STRIPS):
                sums = warp.multiply_add(left[i], high[i], sums)
            found += warp.values(sums)
        return found


def _values(warp: Warp, sums: Sequence[Sums]) -> list[ir.Value]:
    """This lane's values of several sums."""
    return [value for one in sums for value in warp.values(one)]
