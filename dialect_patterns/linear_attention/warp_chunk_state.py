"""The second kernel of strategy ``fused_warp_chunks``: the state over the chunks, and the outputs, in registers.

    r = v - pre (k S);  u = solve r;  o = scale (pre (q S) + mix u);  S <- total S + k^T (rest u)        delta rules
    u = v                                                                                               the others

A warp holds eight columns of some rows of one state over all chunks as sums [16, 8] of its products; sums become right
factors of the next product by turning 8 x 8 numbers. The warps with the same columns add up k S and q S, find r and u
each for its own tokens, and tell each other the right factors of these: all of them doing all of it took 224 us where
this takes 163 (T=4096 of 16 heads on an H100). The state, r and rest u enter in two terms of 16 bits where they lead to
the next state, in one where they lead to outputs. Keys, queries and factors of a chunk are copied to the workgroup's
memory while the chunk before is computed (two chunks ahead are no faster); rows of 16-byte chunks lie there with the
chunk's number xor the row's, so that eight rows are in eight banks. A chunk whose numbers 16 bits cannot hold is done
token by token (``warp_chunk_steps``).
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
from .warp_chunk_memory import BLOCKS, SHOWN, STRIPS, Staged, WarpPlan
from .warp_chunk_steps import Steps

COLUMNS = 8
"""Of a state, in a warp."""
Twos = list[list[ir.Value]]
"""This lane's two words of each right factor of 16 rows."""
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
        if p.words:
            self.words = k.shared(p.words)
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
        self.own = [(self.part * p.blocks + i) * NUMBERS + self.row for i in range(p.blocks)]
        """Its tokens of this lane's row."""
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
        """The values that this warp needs: for r those of its own tokens, else all."""
        if self.c.has_delta:
            return [self.load_value(t + place) for place in self.own]
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
        k = self.k
        values = [part for stored in loaded for part in self.value_parts(stored)]
        high, low = self._factors_of(state)
        seen = _values(self.warp, *self._times_state(self.p.queries, high))
        if self.c.has_delta:
            held = self._join(*self._times_state(0, high, low))
            seen, largest, updates, weighted = self._updates(values, held, seen)
        else:
            self._tell(seen)
            largest = self._magnitude([value for strip in range(STRIPS) for value in self._told(strip)])
            last = [t + (self.row + i) < self.tokens for i in range(0, CHUNK, NUMBERS)]
            new = [k.select(last[i // 2], value, k.constant(0.0)) for i, value in enumerate(values)]
            factors = [self.staged.number(REST + i, self.row) for i in range(0, CHUNK, NUMBERS)]
            scaled = [k.mul(factors[i // 2], value) for i, value in enumerate(new)]
            largest = k.maximum(largest, self._magnitude([*new, *scaled]))
            seen, updates, weighted = self._halves(self._told(self.strip)), self._once(new), self._factors_of(scaled)
        bound = LARGEST if self.c.dtype == "f16" else _ANY_FINITE
        found = self.warp.largest(k.bits(largest))
        ordinary = (found <= k.bits(k.constant(bound))) & (Scalar(self.staged.number(ORDINARY)) > 0.5)
        types = [value.type for value in state]
        following = self._next(state, *weighted)  # before it is known whether it is wanted

        def finish() -> list[ir.Value]:
            self._write(t, seen, updates)
            return following

        return k.choose(ordinary, finish, lambda: self.steps.emit(t, state), types)

    def _updates(
        self, values: Sequence[ir.Value], held: Sequence[ir.Value], seen: Sequence[ir.Value]
    ) -> tuple[list[ir.Value], ir.Value, Twos, tuple[Twos, Twos]]:
        """What the warps with the same columns find together, each for its own tokens.

        Args:
            values: Of the own tokens.
            held: K S, over this warp's rows.
            seen: Q S, over these.

        Returns:
            Q S of the own tokens over all rows, the largest magnitude, u in one term, rest u in two.
        """
        k, p = self.k, self.p
        self._tell([value for i in range(0, len(held), 2) for value in (*held[i : i + 2], *seen[i : i + 2])])
        sums = [self._told(self.part * p.blocks + i) for i in range(p.blocks)]
        seen = [value for both in sums for value in both[2:]]
        rest: list[ir.Value] = []
        for i, both in enumerate(sums):
            before = self.staged.number(PRE, self.own[i])
            rest += [k.sub(x, k.mul(before, y)) for x, y in zip(values[2 * i : 2 * i + 2], both[:2], strict=True)]
        terms = self.warp.turn(self._terms(rest))
        self._show(terms[::2], 0)
        self._show(terms[1::2], BLOCKS)
        self.warp.meet(self.group, p.parts)
        new = self._halves(self._solve(self._shown(0), self._shown(BLOCKS)))
        weighted: list[ir.Value] = []
        for i in range(p.blocks):
            factor = self.staged.number(REST, self.own[i])
            weighted += [k.mul(factor, value) for value in new[2 * i : 2 * i + 2]]
        once = [self.warp.pair(*new[i : i + 2]) for i in range(0, len(new), 2)]
        turned = self.warp.turn([*self._terms(weighted), *once])
        count = 2 * p.blocks
        for i, words in enumerate((turned[:count:2], turned[1:count:2], turned[count:]), 2):
            self._show(words, i * BLOCKS)
        largest = self._magnitude([*rest, *new, *weighted])
        k.store(largest, self.words, self._word(self.part + SHOWN))
        self.warp.meet(self.group, p.parts)
        largest = self._magnitude([k.load(self.words, self._word(SHOWN + i)) for i in range(p.parts)])
        high, low, updates = (self._shown(i * BLOCKS) for i in range(2, 5))
        return seen, largest, updates, (high, low)

    def _magnitude(self, values: Sequence[ir.Value]) -> ir.Value:
        """The largest magnitude; NaN wins."""
        k = self.k
        found = [k.magnitude(value) for value in values]
        while len(found) > 1:
            found = [k.maximum(*found[i : i + 2]) if i + 1 < len(found) else found[i] for i in range(0, len(found), 2)]
        return found[0]

    # ---- products --------------------------------------------------------------------------------------------------
    def _factors_of(self, values: Sequence[ir.Value]) -> tuple[Twos, Twos]:
        """Sums, four values each, as right factors of 16 rows in two terms."""
        turned = self.warp.turn(self._terms(values))
        return _twos(turned[::2]), _twos(turned[1::2])

    def _terms(self, values: Sequence[ir.Value]) -> list[ir.Value]:
        """Of each pair of values two words: the first terms, and the second ones."""
        k, warp, scale = self.k, self.warp, self.k.constant(LOW)
        words: list[ir.Value] = []
        for i in range(0, len(values), 2):
            pair = values[i : i + 2]
            words.append(warp.pair(*pair))
            rest = [k.mul(scale, k.sub(x, y)) for x, y in zip(pair, warp.parts(words[-1]), strict=True)]
            words.append(warp.pair(*rest))
        return words

    def _once(self, values: Sequence[ir.Value]) -> Twos:
        """The same in one term."""
        return _twos(self.warp.turn([self.warp.pair(*values[i : i + 2]) for i in range(0, len(values), 2)]))

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

    def _solve(self, first: Twos, second: Twos) -> list[ir.Value]:
        """``solve`` r, of this warp's matrix of tokens, from the terms of r."""
        warp, strip = self.warp, self.strip.to("i32")
        high, low = warp.zero(), warp.zero()
        for depth in range(STRIPS):
            large, small = (self.staged.matrix(which, strip, depth) for which in range(2))
            high = warp.multiply_add(large, first[depth], high)
            low = warp.multiply_add(large, second[depth], low)
            low = warp.multiply_add(small, first[depth], low)
        return self._join([high], [low])

    def _halves(self, values: Sequence[ir.Value]) -> list[ir.Value]:
        """Of the four values of this warp's matrix of tokens those of its own tokens."""
        if self.p.parts == STRIPS:
            return list(values)
        k, is_lower = self.k, self.upper.equals(0)
        return [k.select(is_lower, x, y) for x, y in zip(values[:2], values[2:], strict=True)]

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

    def _word(self, number: Scalar | int) -> Scalar:
        """Where this lane's word lies, of those of the warps with the same columns."""
        return (self.group * (SHOWN + self.p.parts) + number) * LANES + self.lane

    def _show(self, words: Sequence[ir.Value], start: int) -> None:
        """The own tokens' right factors, for :meth:`_shown`."""
        for i, word in enumerate(words):
            place = self._word(self.part * self.p.blocks + (start + i))
            self.k.store(self.k.from_bits(Scalar(word)), self.words, place)

    def _shown(self, start: int) -> Twos:
        """Right factors of all tokens."""
        places = [self._word(start + i) for i in range(BLOCKS)]
        return _twos([self.k.bits(self.k.load(self.words, place)).value for place in places])

    def over_rows(self, values: Sequence[ir.Value], turn: Scalar) -> list[ir.Value]:
        """The sums of two numbers a lane over all rows of their columns.

        Args:
            values: The numbers.
            turn: 1, then 0, then 1 and so on: told in two places, they need not be waited for twice.
        """
        k, chunk = self.k, turn * STRIPS  # without a delta rule the first ones may still be read
        sums = [self.warp.add_rows(value) for value in values]
        k.store_as_is(k.join([*sums, *sums]), self.slots, self._slot(self.part, chunk))
        self.warp.meet(self.group, self.p.parts)
        return self._told(chunk)[:2]

    # ---- outputs, and the next state -------------------------------------------------------------------------------
    def _write(self, t: Scalar, seen: Sequence[ir.Value], updates: Twos) -> None:
        """The outputs of this warp's tokens of the chunk."""
        k, warp = self.k, self.warp
        mixed = warp.zero()
        for depth in range(STRIPS):
            left = self.staged.matrix(matrices(self.c) - 1, self.strip.to("i32"), depth)
            mixed = warp.multiply_add(left, updates[depth], mixed)
        new = self._halves(warp.values(mixed))
        for i, place in enumerate(self.own):
            before = self.staged.number(PRE, place)
            pairs = zip(seen[2 * i : 2 * i + 2], new[2 * i : 2 * i + 2], strict=True)
            values = [k.fma(before, old, added) for old, added in pairs]
            token = t + place
            k.when(token < self.tokens, lambda token=token, values=values: self.write_output(token, values))

    def _next(self, state: Sequence[ir.Value], high: Twos, low: Twos) -> list[ir.Value]:
        """The next state, from the terms of rest u."""
        k, warp = self.k, self.warp
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


def _twos(words: Sequence[ir.Value]) -> Twos:
    return [list(words[i : i + 2]) for i in range(0, len(words), 2)]
