"""The body of strategy ``fused_simd`` of softmax attention for many query rows: 32 of a key head over their keys.

Rows are as of ``simd_kernel``. Scores are computed the other way round: a vector has a number of each of some rows, so
that maxima and sums take no sums over lanes, and an element of a key is a factor of whole vectors.

    for each 48 keys from the first to the last that a row sees:
      s[j, r] = k[j] . q[r]                    12 keys x 2 vectors of rows in registers (of 32), over the whole head
      m' = max(m, s); p = exp(s - m'); l = l exp(m - m') + sum p
      y[r, :] = y[r, :] exp(m - m') + p[j, r] v[j, :]      11 rows x 2 vectors of columns in registers, over all keys
    y / l

Only where not all rows see all 48 keys are there bounds to compare with. Keys that a row does not see weigh nothing,
but 0 times NaN or inf is NaN: where such a value is among those 48, they are done key by key, for the rows that see it.
Near the end of a cache a pass begins earlier; keys that were there before count no second time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..emit.kernel_text import Index, KernelText, vector_type
from ..linear_attention.simd_products import row_blocks
from .simd_many_operands import KEYS, Floats, Pairs
from .simd_plan import Plan
from .simd_seen import Row, Seen, capped

_LOWEST = -3.4028234663852886e38  # the lowest finite f32
_INFINITE = 0x7F800000


class ManyBody:
    """Writes the body; q [B, T, Hq * dk], k [B, Hkv, S, dk], v [B, Hkv, S, dv], y [B, T, Hq * dv].

    Args:
        k: Where to.
        p: Its sizes.
        keys: S.
        operands: How operands are read and multiplied.
        registers: Of vectors.
        memrefs: q, k, v; first position, limit and sinks where there are some; y.
    """

    def __init__(
        self,
        k: KernelText,
        p: Plan,
        keys: int,
        operands: type[Floats | Pairs],
        registers: int,
        memrefs: Sequence[str],
    ) -> None:
        self.k, self.p, self.keys = k, p, keys
        given = iter(memrefs)
        q, key, self.value = next(given), next(given), next(given)
        first = next(given) if p.needs_first else None
        limit = next(given) if p.has_limit else None
        self.sink = next(given) if p.has_sink else None
        (self.y,) = given
        self.tile = registers * 3 // 8
        self.operands = operands(k, p, self.tile, (q, key, self.value))
        self.scores = k.alloca([KEYS, p.rows])
        self.sums = k.alloca([p.rows, p.dv])
        self.peaks, self.totals, self.factors = (k.alloca([p.rows]) for _ in range(3))
        self.lows, self.highs = (k.alloca([p.rows], "i32") for _ in range(2))
        tile = k.op("hal.interface.workgroup.id[0] : index", "index")
        group = k.op("hal.interface.workgroup.id[1] : index", "index")
        self.batch, self.head = k.div(group, p.kv_heads), k.rem(group, p.kv_heads)
        self.seen = Seen(k, p, keys, (self.batch, self.head, tile), first, limit)

    # ---- small things ------------------------------------------------------------------------------------------------
    def _each(self, stop: Index, step: int, body: Callable[[Index], None], start: Index = 0) -> None:
        def once(index: str, _: list[str]) -> list[str]:
            body(index)
            return []

        self.k.loop(stop, [], once, start=start, step=step)

    def _i32(self, index: Index) -> str:
        return self.k.op(f"arith.index_cast {self.k.index(index)} : index to i32", "i32")

    def _ints(self, index: Index) -> str:
        """An index in all lanes, as i32."""
        ints = vector_type(self.p.lanes, "i32")
        return self.k.op(f"vector.broadcast {self._i32(index)} : i32 to {ints}", ints)

    def _bits(self, memref: str, place: Sequence[Index]) -> str:
        return self.k.load(memref, place, self.p.lanes, raw=True)

    # ---- the whole -------------------------------------------------------------------------------------------------
    def write(self) -> None:
        """The whole body."""
        k, p = self.k, self.p
        rows = self.seen.rows()
        for i, row in enumerate(rows):
            k.store(self._i32(row.low), self.lows, [i])
            k.store(self._i32(row.high), self.highs, [i])
            k.store(k.constant(_LOWEST, "f32") if self.sink is None else self._sink(row), self.peaks, [i])
        zero = k.constant(0.0, vector_type(p.lanes))
        before = k.constant(0.0 if self.sink is None else 1.0, vector_type(p.lanes))  # a sink is seen before all keys
        self._each(p.rows, p.lanes, lambda i: k.store(before, self.totals, [i]))
        self._each(p.rows, 1, lambda i: self._each(p.dv, p.lanes, lambda c: k.store(zero, self.sums, [i, c])))
        self.operands.read_queries(self.batch, rows)
        low, high = rows[0].low, rows[-1].high

        def some(start: Index) -> None:
            place = k.minimum(start, self.keys - KEYS)
            end = k.minimum(k.sub(high, place), KEYS)
            inside = self._all_see(start, rows)
            k.when(
                inside, [],
                lambda: self._weigh(place, start, KEYS, bounded=False),
                lambda: self._weigh(place, start, end, bounded=True),
            )  # fmt: skip
            first = k.sub(start, place)
            span = (k.sub(first, k.rem(first, 2)), k.add(end, k.rem(end, 2)))
            none = k.constant(0, "i1")
            (bad,) = k.when(inside, ["i1"], lambda: [none], lambda: [self._any_infinite(place, span)])
            k.when(bad, [], lambda: self._mix_by_key(place, span), lambda: self._mix(place, span))

        self._each(high, KEYS, some, start=low)
        self._each(p.rows, 1, self._finish)

    def _sink(self, row: Row) -> str:
        assert self.sink is not None
        return self.k.load(self.sink, [row.head])

    def _all_see(self, start: Index, rows: Sequence[Row]) -> str:
        """Whether all rows see all keys of a pass."""
        k = self.k
        condition = k.less(k.add(start, KEYS), rows[0].high, or_equal=True)
        if self.p.left is not None:
            condition = k.op(f"arith.andi {condition}, {k.less(rows[-1].low, start, or_equal=True)} : i1", "i1")
        return condition

    def _finish(self, i: Index) -> None:
        k, p = self.k, self.p
        token, head = self.seen.row(i)
        # A row that sees a key has a sum of at least 1 (its maximum): the bound only turns 0 / 0 into 0.
        divisor = k.splat(k.maxf(k.load(self.totals, [i]), k.constant(0.5, "f32")), p.lanes)

        def write(c: Index) -> None:
            result = k.divf(k.load(self.sums, [i, c], p.lanes), divisor)
            k.store(result, self.y, [self.batch, token, k.add(k.mul(head, p.dv), c)])

        self._each(p.dv, p.lanes, write)

    # ---- weights ---------------------------------------------------------------------------------------------------
    def _weigh(self, place: Index, start: Index, end: Index, *, bounded: bool) -> list[str]:
        """The weights of a pass, the factors of the sums so far, the new maxima and sums of weights."""
        p = self.p
        width = 2 * p.lanes
        for row in range(0, p.rows, width):
            self._weigh_some(place, start, end, range(row, row + width, p.lanes), bounded=bounded)
        return []

    def _weigh_some(self, place: Index, start: Index, end: Index, at: range, *, bounded: bool) -> None:
        """The same for two vectors of rows."""
        k, p = self.k, self.p
        before = [k.load(self.peaks, [row], p.lanes) for row in at]
        lows = highs = [""] * len(at)
        if bounded:
            ints, begin = vector_type(p.lanes, "i32"), self._ints(start)
            highs = [self._bits(self.highs, [row]) for row in at]
            lows = [k.op(f"arith.maxsi {self._bits(self.lows, [row])}, {begin} : {ints}", ints) for row in at]

        def tile(j: Index, peaks: list[str]) -> list[str]:
            products = self.operands.products([self.batch, self.head, k.add(place, j)], at)
            for u in range(self.tile):
                key = self._ints(k.add(k.add(place, j), u)) if bounded else ""
                for v, row in enumerate(at):
                    value = self._score(products[u * len(at) + v], key, lows[v], highs[v])
                    k.store(value, self.scores, [k.add(j, u), row])
                    peaks[v] = _larger(k, value, peaks[v])
            return peaks

        peaks = k.loop(end, before, lambda j, found: tile(j, list(found)), step=self.tile)
        totals: list[str] = []
        for row, old, new in zip(at, before, peaks, strict=True):
            factor = k.exp(k.subf(old, new))
            k.store(factor, self.factors, [row])
            k.store(new, self.peaks, [row])
            totals.append(k.mulf(k.load(self.totals, [row], p.lanes), factor))

        def two(j: Index, found: list[str]) -> list[str]:
            sums: list[str] = []
            for row, peak, total in zip(at, peaks, found, strict=True):
                places = [[k.add(j, u), row] for u in range(2)]
                weights = [k.exp(k.subf(k.load(self.scores, spot, p.lanes), peak)) for spot in places]
                if bounded or not self.operands.has_words:
                    for weight, spot in zip(weights, places, strict=True):
                        k.store(weight, self.scores, spot)
                self.operands.store_weights(weights, j, row)
                sums.append(k.addf(total, k.addf(*weights)))
            return sums

        for row, total in zip(at, k.loop(k.add(end, k.rem(end, 2)), totals, two, step=2), strict=True):
            k.store(total, self.totals, [row])

    def _score(self, value: str, key: str, low: str, high: str) -> str:
        """A key's scores as they count; ``key`` is empty where all rows see it."""
        k, p = self.k, self.p
        if not self.operands.is_scaled:
            value = k.mulf(value, k.constant(p.scale, vector_type(p.lanes)))
        if p.softcap:
            value = capped(k, p, value)
        if not key:
            return value
        ints, mask = vector_type(p.lanes, "i32"), vector_type(p.lanes, "i1")
        seen = [
            k.op(f"arith.cmpi slt, {key}, {high} : {ints}", mask),
            k.op(f"arith.cmpi sge, {key}, {low} : {ints}", mask),
        ]
        both = k.op(f"arith.andi {seen[0]}, {seen[1]} : {mask}", mask)
        return k.select(both, value, k.constant(float("-inf"), vector_type(p.lanes)))

    # ---- sums of values --------------------------------------------------------------------------------------------
    def _mix(self, place: Index, span: tuple[Index, Index]) -> list[str]:
        """Adds the weighed values of some keys, counted from ``place``."""
        k, p = self.k, self.p
        vectors = 2 if p.dv // p.lanes % 2 == 0 else 1

        def columns(column: Index) -> None:
            spots = [k.add(column, v * p.lanes) for v in range(vectors)]
            multiply = self.operands.values([self.batch, self.head, place], spots, span)
            for first, count in row_blocks(p.rows, self.tile):
                rows = range(first, first + count)
                sums: list[str] = []
                for i in rows:
                    factor = k.splat(k.load(self.factors, [i]), p.lanes)
                    sums += [k.mulf(k.load(self.sums, [i, spot], p.lanes), factor) for spot in spots]
                sums = multiply(self.scores, rows, sums)
                for number, value in enumerate(sums):
                    k.store(value, self.sums, [rows[number // vectors], spots[number % vectors]])

        self._each(p.dv, vectors * p.lanes, columns)
        return []

    def _any_infinite(self, place: Index, span: tuple[Index, Index]) -> str:
        """Whether a value of some keys is inf or NaN."""
        k, p = self.k, self.p
        ints, mask = vector_type(p.lanes, "i32"), vector_type(p.lanes, "i1")

        def key(j: Index, found: list[str]) -> list[str]:
            def some(c: Index, largest: list[str]) -> list[str]:
                value = k.load(self.value, [self.batch, self.head, k.add(place, j), c], p.lanes)
                magnitude = k.andi(k.as_type(value, ints, "arith.bitcast"), k.constant(0x7FFFFFFF, ints))
                return [k.op(f"arith.maxui {largest[0]}, {magnitude} : {ints}", ints)]

            return k.loop(p.dv, found, some, step=p.lanes)

        (largest,) = k.loop(span[1], [k.constant(0, ints)], key, start=span[0])
        bad = k.op(f"arith.cmpi uge, {largest}, {k.constant(_INFINITE, ints)} : {ints}", mask)
        return k.op(f"vector.reduction <or>, {bad} : {mask} into i1", "i1")

    def _mix_by_key(self, place: Index, span: tuple[Index, Index]) -> list[str]:
        """The same as :meth:`_mix`, of each key for the rows that see it."""
        k, p, zero = self.k, self.p, self.k.constant(0.0, "f32")

        def row(i: Index) -> None:
            factor = k.splat(k.load(self.factors, [i]), p.lanes)

            def scale(c: Index) -> None:
                k.store(k.mulf(k.load(self.sums, [i, c], p.lanes), factor), self.sums, [i, c])

            def key(j: Index) -> None:
                weight = k.load(self.scores, [j, i])
                counts = k.op(f"arith.cmpf une, {weight}, {zero} : f32", "i1")

                def add(c: Index) -> None:
                    value = k.load(self.value, [self.batch, self.head, k.add(place, j), c], p.lanes)
                    total = k.load(self.sums, [i, c], p.lanes)
                    k.store(k.fma(k.splat(weight, p.lanes), value, total), self.sums, [i, c])

                def all_of() -> list[str]:
                    self._each(p.dv, p.lanes, add)
                    return []

                k.when(counts, [], all_of, lambda: [])

            self._each(p.dv, p.lanes, scale)
            self._each(span[1], 1, key, start=span[0])

        self._each(p.rows, 1, row)
        return []


def _larger(k: KernelText, value: str, peak: str) -> str:
    """The larger one; ``peak`` where ``value`` is NaN, whose weight will be."""
    kind = k.types[value]
    mask = kind.replace("f32", "i1")
    return k.select(k.op(f"arith.cmpf ogt, {value}, {peak} : {kind}", mask), value, peak)
