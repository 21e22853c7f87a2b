"""The body of strategy ``fused_amx`` of softmax attention: 32 query rows of a key head over the keys they see.

Rows are as of ``simd_kernel``. Scores are computed the other way round: a cache's rows are registers as they lie, and a
vector has a number of each of 16 rows, so that their maxima and sums take no sums over lanes.

    for each 32 keys from the first to the last that a row sees:
      s[j, r] = k[j] . q[r]                    2 x 2 registers of 16 keys by 16 rows
      m' = max(m, s); p = exp(s - m'); l = l exp(m - m') + sum p              p in bf16, turned round
      for each 32 columns:  y[r, :] = y[r, :] exp(m - m') + p[r, j] v[j, :]   2 x 2 registers; v in pairs of keys
    y / l

Products are of bf16, three for one where ``amx_operands`` has two terms of each number. Keys that a row does not see
weigh nothing, but 0 times NaN or inf is NaN: columns where a value is either are done key by key, for the rows that see
it. Keys past the last one are read as that, and near the end of a cache 16 keys begin earlier; those that were there
before count no second time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..emit.amx_tiles import ROWS, SUMS, A, AmxTiles, B
from ..emit.kernel_text import Index, KernelText, vector_type
from ..mat_mul.bf16_terms import PRODUCTS
from .amx_operands import COLUMNS, GROUPS, KEYS, WORDS, UnitOperands
from .simd_plan import Plan
from .simd_seen import Row, Seen, capped

_LOWEST = -3.4028234663852886e38  # the lowest finite f32
_INTS, _FLOATS, _MASK = vector_type(ROWS, "i32"), vector_type(ROWS), vector_type(ROWS, "i1")


class AmxBody:
    """Writes the body; q [B, T, Hq * dk], k [B, Hkv, S, dk], v [B, Hkv, S, dv], y [B, T, Hq * dv].

    Args:
        k: Where to.
        p: Its sizes, with 32 rows.
        keys: S.
        terms: bf16 of each number.
        memrefs: q, k, v; first position, limit and sinks where there are some; y; memory for sums [B, workgroups of a
            batch row, 32, dv].
    """

    def __init__(self, k: KernelText, p: Plan, keys: int, terms: int, memrefs: Sequence[str]) -> None:
        self.k, self.p, self.keys = k, p, keys
        given = iter(memrefs)
        operands = [next(given) for _ in range(3)]
        self.value = operands[-1]
        first = next(given) if p.needs_first else None
        limit = next(given) if p.has_limit else None
        self.sink = next(given) if p.has_sink else None
        self.y, self.sums = given
        self.unit = AmxTiles(k)
        self.operands = UnitOperands(k, p, terms, operands)
        self.terms = PRODUCTS[terms, terms]
        self.scores = k.alloca([KEYS, p.rows])
        self.part = k.alloca([p.rows, COLUMNS])
        self.factors = k.alloca([p.rows])
        tile = k.op("hal.interface.workgroup.id[0] : index", "index")
        group = k.op("hal.interface.workgroup.id[1] : index", "index")
        self.batch, self.head = k.div(group, p.kv_heads), k.rem(group, p.kv_heads)
        self.own = [self.batch, k.add(k.mul(self.head, p.tiles), tile)]
        self.seen = Seen(k, p, keys, (self.batch, self.head, tile), first, limit)

    # ---- small things ------------------------------------------------------------------------------------------------
    def _vector(self, values: Sequence[Index]) -> str:
        """Indices as a vector of i32."""
        k = self.k
        words = [k.op(f"arith.index_cast {k.index(value)} : index to i32", "i32") for value in values]
        return k.op(f"vector.from_elements {', '.join(words)} : {_INTS}", _INTS)

    def _splat(self, value: Index) -> str:
        k = self.k
        word = k.op(f"arith.index_cast {k.index(value)} : index to i32", "i32")
        return k.op(f"vector.broadcast {word} : i32 to {_INTS}", _INTS)

    def _each(self, stop: Index, step: int, body: Callable[[Index], None], start: Index = 0) -> None:
        def once(index: str, _: list[str]) -> list[str]:
            body(index)
            return []

        self.k.loop(stop, [], once, start=start, step=step)

    # ---- the whole -------------------------------------------------------------------------------------------------
    def write(self) -> None:
        """The whole body."""
        k, p = self.k, self.p
        rows = self.seen.rows()
        groups = [rows[first : first + ROWS] for first in range(0, p.rows, ROWS)]
        lows = [self._vector([row.low for row in group]) for group in groups]
        highs = [self._vector([row.high for row in group]) for group in groups]
        low, high = rows[0].low, rows[-1].high
        zero = k.constant(0.0, _FLOATS)
        for number, group in enumerate(groups):
            self.operands.read_queries(self.batch, number, group)
        self._each(p.rows, 1, lambda i: self._each(p.dv, ROWS, lambda c: k.store(zero, self.sums, [*self.own, i, c])))
        if self.sink is None:
            initial = [k.constant(_LOWEST, _FLOATS)] * GROUPS + [zero] * GROUPS
        else:  # as a key that is seen first, whose value is zero
            initial = [self._sinks(group) for group in groups] + [k.constant(1.0, _FLOATS)] * GROUPS

        def some(start: str, carried: list[str]) -> list[str]:
            floors = [k.add(start, group * ROWS) for group in range(GROUPS)]
            places = [k.minimum(floor, self.keys - ROWS) for floor in floors]
            self.operands.read_keys([self.batch, self.head], places)
            self._products(places)
            state = self._soften(places, floors, lows, highs, carried)
            last = k.sub(high, 1)
            self._each(p.dv, COLUMNS, lambda column: self._mix(places, last, column))
            return state

        state = k.loop(high, initial, some, start=low, step=KEYS)
        for group, total in enumerate(state[GROUPS:]):
            # A row that sees a key has a sum of at least 1 (its maximum): the bound only turns 0 / 0 into 0.
            k.store(k.maxf(total, k.constant(0.5, _FLOATS)), self.factors, [group * ROWS])
        self._each(p.rows, 1, self._finish)
        self.unit.release()

    def _finish(self, i: Index) -> None:
        k, p = self.k, self.p
        (token, head), divisor = self.seen.row(i), k.splat(k.load(self.factors, [i]), ROWS)

        def write(c: Index) -> None:
            result = k.divf(k.load(self.sums, [*self.own, i, c], ROWS), divisor)
            k.store(result, self.y, [self.batch, token, k.add(k.mul(head, p.dv), c)])

        self._each(p.dv, ROWS, write)

    def _sinks(self, group: Sequence[Row]) -> str:
        k = self.k
        assert self.sink is not None
        values = [k.load(self.sink, [row.head]) for row in group]
        return k.op(f"vector.from_elements {', '.join(values)} : {_FLOATS}", _FLOATS)

    def _multiply(self, load_left: Callable[[int], None], load_right: Callable[[int], None]) -> None:
        """Adds what registers multiply, of all terms that are."""
        last = (-1, -1)
        for terms in self.terms:
            if terms[0] != last[0]:
                load_left(terms[0])
            if terms[1] != last[1]:
                load_right(terms[1])
            for register in SUMS:
                self.unit.multiply_bf16(register, A[register // 2], B[register % 2])
            last = terms

    # ---- the three steps of a pass ---------------------------------------------------------------------------------
    def _products(self, places: Sequence[Index]) -> None:
        """The scores of some keys without anything done to them."""
        unit = self.unit
        for register in SUMS:
            unit.zero(register)

        def load_keys(term: int, word: Index) -> None:
            for group, (register, place) in enumerate(zip(A, places, strict=True)):
                self.operands.load_keys(unit, register, term, group, [self.batch, self.head, place], word)

        def load_queries(term: int, word: Index) -> None:
            for group, register in enumerate(B):
                unit.load(register, self.operands.queries[term], [word, group * ROWS])

        def step(word: Index) -> None:
            self._multiply(lambda term: load_keys(term, word), lambda term: load_queries(term, word))

        self._each(self.p.dk // 2, WORDS, step)
        for register in SUMS:
            unit.store(register, self.scores, [register // 2 * ROWS, register % 2 * ROWS])

    def _soften(
        self,
        places: Sequence[Index],
        floors: Sequence[Index],
        lows: Sequence[str],
        highs: Sequence[str],
        carried: Sequence[str],
    ) -> list[str]:
        """Scores to weights, and to words of them row by row; the factors of the sums so far.

        Returns:
            The maxima and the sums of all rows.
        """
        k = self.k
        peaks, totals = list(carried[:GROUPS]), list(carried[GROUPS:])
        highest = list(peaks)
        for keys, (place, floor) in enumerate(zip(places, floors, strict=True)):
            least = [k.op(f"arith.maxsi {low}, {self._splat(floor)} : {_INTS}", _INTS) for low in lows]

            def score(
                j: str, found: list[str], keys: int = keys, place: Index = place, least: Sequence[str] = least
            ) -> list[str]:
                key, own = self._splat(k.add(place, j)), k.add(j, keys * ROWS)
                return [
                    self._score(own, key, group, least[group], highs[group], found[group]) for group in range(GROUPS)
                ]

            highest = k.loop(ROWS, highest, score)
        for group, (before, peak) in enumerate(zip(peaks, highest, strict=True)):
            factor = k.exp(k.subf(before, peak))
            k.store(factor, self.factors, [group * ROWS])
            totals[group] = k.mulf(totals[group], factor)
            weights = [self._weight(j, group, peak) for j in range(KEYS)]
            for first, second in zip(weights[::2], weights[1::2], strict=True):
                totals[group] = k.addf(totals[group], k.addf(first, second))
            self.operands.store_weights(group, weights)
        return [*highest, *totals]

    def _score(self, own: Index, key: str, group: int, low: str, high: str, peak: str) -> str:
        """A key's scores of 16 rows as they count, on the stack; the larger ones of these and ``peak``."""
        k, p = self.k, self.p
        value = k.mulf(k.load(self.scores, [own, group * ROWS], ROWS), k.constant(p.scale, _FLOATS))
        if p.softcap:
            value = capped(k, p, value)
        seen = [
            k.op(f"arith.cmpi slt, {key}, {high} : {_INTS}", _MASK),
            k.op(f"arith.cmpi sge, {key}, {low} : {_INTS}", _MASK),
        ]
        both = k.op(f"arith.andi {seen[0]}, {seen[1]} : {_MASK}", _MASK)
        value = k.select(both, value, k.constant(float("-inf"), _FLOATS))
        k.store(value, self.scores, [own, group * ROWS])
        return k.maxf(peak, value)

    def _weight(self, own: int, group: int, peak: str) -> str:
        k, place = self.k, [own, group * ROWS]
        weight = k.exp(k.subf(k.load(self.scores, place, ROWS), peak))
        k.store(weight, self.scores, place)
        return weight

    def _mix(self, places: Sequence[Index], last: Index, column: Index) -> None:
        """32 columns of the sums."""
        k = self.k

        def key(group: int, j: Index) -> Index:
            """Past the last one that one."""
            return k.minimum(k.add(places[group], j), last)

        some = self.operands.read_values([self.batch, self.head], key, column)
        k.when(some, [], lambda: self._mix_by_key(places, last, column), lambda: self._mix_all(column))

    def _mix_all(self, column: Index) -> list[str]:
        k, unit = self.k, self.unit
        for register in SUMS:
            unit.zero(register)

        def load_weights(term: int) -> None:
            for group, register in enumerate(A):
                unit.load(register, self.operands.weights[term], [group, 0, 0])

        def load_values(term: int) -> None:
            for half, register in enumerate(B):
                unit.load(register, self.operands.values[term], [0, half * ROWS])

        self._multiply(load_weights, load_values)
        for register in SUMS:
            unit.store(register, self.part, [register // 2 * ROWS, register % 2 * ROWS])

        def row(i: Index) -> None:
            factor = k.splat(k.load(self.factors, [i]), ROWS)
            for half in range(0, COLUMNS, ROWS):
                place = [*self.own, i, k.add(column, half)]
                part = k.load(self.part, [i, half], ROWS)
                k.store(k.fma(k.load(self.sums, place, ROWS), factor, part), self.sums, place)

        self._each(self.p.rows, 1, row)
        return []

    def _mix_by_key(self, places: Sequence[Index], last: Index, column: Index) -> list[str]:
        """The same where a value is NaN or inf: for the rows that see its key only."""
        k, zero = self.k, self.k.constant(0.0, "f32")

        def row(i: Index) -> None:
            factor = k.splat(k.load(self.factors, [i]), ROWS)
            spots = [[*self.own, i, k.add(column, half)] for half in range(0, COLUMNS, ROWS)]
            for spot in spots:
                k.store(k.mulf(k.load(self.sums, spot, ROWS), factor), self.sums, spot)
            for keys, start in enumerate(places):

                def one(j: Index, keys: int = keys, start: Index = start) -> None:
                    weight = k.load(self.scores, [k.add(j, keys * ROWS), i])
                    counts = k.op(f"arith.cmpf une, {weight}, {zero} : f32", "i1")
                    key = k.minimum(k.add(start, j), last)

                    def add() -> list[str]:
                        for half, spot in enumerate(spots):
                            place = [self.batch, self.head, key, k.add(column, half * ROWS)]
                            value, before = k.load(self.value, place, ROWS), k.load(self.sums, spot, ROWS)
                            k.store(k.fma(k.splat(weight, ROWS), value, before), self.sums, spot)
                        return []

                    k.when(counts, [], add, lambda: [])

                self._each(ROWS, 1, one)

        self._each(self.p.rows, 1, row)
        return []
