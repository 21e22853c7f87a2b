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
from .warp_chunk_memory import STRIPS, TOLD, Staged, WarpPlan
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

    def emit(self) -> None:
        """Emit everything."""
        k, p, item = self.k, self.p, self.k.item()
        self.warp = Warp(k, self.c.dtype, k.shared_chunks(p.memory // (4 * WORDS)))
        self.slots = k.shared_chunks(p.slots)
        k.when(item < self.streams, lambda: self._stream(item))

    def _stream(self, item: Scalar) -> None:
        k, p, o = self.k, self.p, self.o
        o.choose(item)
        warp, self.lane = k.thread().divide_unsigned(LANES)
        self.row, self.place = self.lane.divide_unsigned(WORDS)  # g and t
        self.group, self.part = warp.divide_unsigned(p.parts)
        self.pair = (k.tile() * p.groups + self.group) * (COLUMNS // 2) + self.place
        """This lane's pair of columns."""
        self.strip, self.upper = self.part.divide_unsigned(p.parts // STRIPS)
        """Which tokens of a chunk this warp writes the outputs of: a matrix's, or half of one's."""
        self.staged = Staged(self.warp, p, o, self.factors, item, self.part)
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
        rows = self.p.tiles * SIDE
        first = self.o.state * self.c.dk + self.part * rows + self.row
        return [(first + i) * (self.c.dv // 2) + self.pair for i in range(0, rows, NUMBERS)]

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
        told = _values(warp, *self._times_state(self.p.queries, high))
        if self.c.has_delta:
            told = [*self._join(*self._times_state(0, high, low)), *told]
            self._tell(told)
            before = [self.staged.number(PRE + i, self.row) for i in range(0, CHUNK, NUMBERS)]
            held = [value for strip in range(STRIPS) for value in self._told(strip)]
            pairs = zip(values, held, strict=True)
            rest = [k.sub(value, k.mul(before[i // 2], known)) for i, (value, known) in enumerate(pairs)]
            largest = self._magnitude(rest)
            updates = self._solve(rest)
        else:
            self._tell(told)
            largest = self._magnitude([value for strip in range(STRIPS) for value in self._told(strip)])
            last = [t + (self.row + i) < self.tokens for i in range(0, CHUNK, NUMBERS)]
            updates = [k.select(last[i // 2], value, k.constant(0.0)) for i, value in enumerate(values)]
        factors = [self.staged.number(REST + i, self.row) for i in range(0, CHUNK, NUMBERS)]
        weighted = [k.mul(factors[i // 2], value) for i, value in enumerate(updates)]
        largest = k.maximum(largest, self._magnitude([*updates, *weighted]))
        bound = LARGEST if self.c.dtype == "f16" else _ANY_FINITE
        found = warp.largest(k.bits(largest))
        ordinary = (found <= k.bits(k.constant(bound))) & (Scalar(self.staged.number(ORDINARY)) > 0.5)
        types = [value.type for value in state]
        following = self._next(state, weighted)  # before it is known whether it is wanted

        def finish() -> list[ir.Value]:
            self._write(t, updates)
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
        for depth in range(self.p.tiles):
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

    # ---- what the warps with the same columns tell each other -----------------------------------------------------
    def _slot(self, part: Scalar | int, chunk: Scalar | int) -> Scalar:
        warp = self.group * self.p.parts + part
        if isinstance(chunk, int):
            chunk = Scalar.constant(chunk, "index")
        return (chunk * (self.p.groups * self.p.parts) + warp) * LANES + self.lane

    def _tell(self, values: Sequence[ir.Value]) -> None:
        """Sums over this warp's rows, for :meth:`_told`."""
        k = self.k
        for i in range(0, len(values), WORDS):
            k.store_as_is(k.join(values[i : i + WORDS]), self.slots, self._slot(self.part, i // WORDS))
        self.warp.meet(self.group, self.p.parts)

    def _told(self, chunk: Scalar | int) -> list[ir.Value]:
        """Four sums over all rows, to the last bit the same in all warps."""
        k = self.k
        parts = [k.load(self.slots, self._slot(part, chunk)) for part in range(self.p.parts)]
        total = parts[0]
        for part in parts[1:]:
            total = k.add(total, part)
        return k.elements(total)

    def over_rows(self, values: Sequence[ir.Value], turn: Scalar) -> list[ir.Value]:
        """The sums of two numbers a lane over all rows of their columns.

        Args:
            values: The numbers.
            turn: 1, then 0, then 1 and so on: told in two places, they need not be waited for twice.
        """
        k, chunk = self.k, turn * TOLD
        sums = [self.warp.add_rows(value) for value in values]
        k.store_as_is(k.join([*sums, *sums]), self.slots, self._slot(self.part, chunk))
        self.warp.meet(self.group, self.p.parts)
        return self._told(chunk)[:2]

    # ---- outputs, and the next state -------------------------------------------------------------------------------
    def _write(self, t: Scalar, updates: Sequence[ir.Value]) -> None:
        """The outputs of this warp's tokens of the chunk."""
        k, warp = self.k, self.warp
        right = self._once(updates)
        mixed = warp.zero()
        for depth in range(STRIPS):
            left = self.staged.matrix(matrices(self.c) - 1, self.strip.to("i32"), depth)
            mixed = warp.multiply_add(left, right[depth], mixed)
        seen = self._told(self.strip + (STRIPS if self.c.has_delta else 0))
        pairs = list(zip(seen, warp.values(mixed), strict=True))
        halves = [pairs[:2], pairs[2:]]
        if self.p.parts > STRIPS:
            first, second = ([value for pair in half for value in pair] for half in halves)
            chosen = [k.select(self.upper.equals(0), a, b) for a, b in zip(first, second, strict=True)]
            halves = [[(chosen[0], chosen[1]), (chosen[2], chosen[3])]]
        for i, half in enumerate(halves):
            place = self.strip * SIDE + (self.upper + i) * NUMBERS + self.row
            before = self.staged.number(PRE, place)
            values = [k.fma(before, old, new) for old, new in half]
            token = t + place
            k.when(token < self.tokens, lambda token=token, values=values: self.write_output(token, values))

    def _next(self, state: Sequence[ir.Value], weighted: Sequence[ir.Value]) -> list[ir.Value]:
        """The next state."""
        k, warp = self.k, self.warp
        high, low = self._factors_of(weighted)
        total, factor = self.staged.number(TOTAL), k.constant(1 / LOW)
        found: list[ir.Value] = []
        for tile in range(self.p.tiles):
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
