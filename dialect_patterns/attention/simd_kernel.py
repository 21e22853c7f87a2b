"""The body of strategy ``fused_simd`` of softmax attention: some query rows of one key head, over the keys they see.

Rows m = t * G + g of a key head are its G query heads at each token, so one pass over keys and values serves a group.

    for each 64 keys from the first to the last that a row sees:
      s[r, j] = q[r] . k[j]                                  rows x 2 keys in registers, vectors along the head
      s = softcap(s) + bias, -inf where hidden; m' = max(m, s); p = exp(s - m'); l = l exp(m - m') + sum p
      y[r, :] = y[r, :] exp(m - m') + p[r, j] v[j, :]        rows x 2 vectors, 8 keys at a time
    y / l

Keys past the last one are read as the last one and weigh nothing, so neither the rest of a cache's capacity nor memory
behind it is ever read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..emit.kernel_text import Index, KernelText, vector_type
from .simd_plan import KEYS, Plan
from .simd_seen import Row, Seen, capped
from .simd_values import Mix

_KEYS_OF_SCORES = 2
_LOWEST = -3.4028234663852886e38  # the lowest finite f32


class Body:
    """Writes the body; q [B, T, Hq * dk], k [B, Hkv, S, dk], v [B, Hkv, S, dv], y [B, T, Hq * dv]."""

    def __init__(self, k: KernelText, p: Plan, keys: Index, memrefs: Sequence[str]) -> None:
        self.k, self.p, self.keys = k, p, keys
        given = iter(memrefs)
        self.q, self.key, self.value = next(given), next(given), next(given)
        self.first = next(given) if p.needs_first else None
        self.limit = next(given) if p.has_limit else None
        self.sink = next(given) if p.has_sink else None
        self.bias = next(given) if p.bias_dims is not None else None
        self.y = next(given)
        self.queries = k.alloca([p.rows, p.dk])
        self.scores = k.alloca([p.rows, KEYS])
        self.sums = k.alloca([p.rows, p.dv])
        self.tile = k.op("hal.interface.workgroup.id[0] : index", "index")
        group = k.op("hal.interface.workgroup.id[1] : index", "index")
        self.batch, self.head = k.div(group, p.kv_heads), k.rem(group, p.kv_heads)
        steps = ", ".join(map(str, range(p.lanes)))
        self.steps = k.op(f"arith.constant dense<[{steps}]> : vector<{p.lanes}xi32>", f"vector<{p.lanes}xi32>")

    # ---- the whole -------------------------------------------------------------------------------------------------
    def write(self) -> None:
        """The whole body."""
        k, p = self.k, self.p
        place = (self.batch, self.head, self.tile)
        rows = Seen(k, p, self.keys, place, self.first, self.limit).rows()
        zero = k.constant(0.0, vector_type(p.lanes))
        scale = k.constant(p.scale, vector_type(p.lanes))

        def read(at: Index) -> None:
            for i, row in enumerate(rows):
                place = k.add(k.mul(row.head, p.dk), at)
                k.store(k.mulf(k.load(self.q, [self.batch, row.token, place], p.lanes), scale), self.queries, [i, at])

        def clear(at: Index) -> None:
            for i in range(p.rows):
                k.store(zero, self.sums, [i, at])

        self._each(p.dk, p.lanes, read)
        self._each(p.dv, p.lanes, clear)
        if self.sink is None:
            initial = [k.constant(_LOWEST, "f32"), k.constant(0.0, "f32")] * p.rows
        else:  # as a key that is seen first, whose value is zero
            initial = [x for row in rows for x in (k.load(self.sink, [row.head]), k.constant(1.0, "f32"))]
        low, high = rows[0].low, rows[-1].high
        mix = Mix(k, p, (self.value, self.scores, self.sums), (self.batch, self.head), (rows[-1].low, rows[0].high))

        def keys(start: str, carried: list[str]) -> list[str]:
            count = k.minimum(k.sub(high, start), KEYS)
            last = k.sub(high, 1)
            self._products(start, count, last)
            state: list[str] = []
            for i, row in enumerate(rows):
                state += self._soften(i, row, start, carried[2 * i], carried[2 * i + 1])
            mix.add(start, count, last)
            return state

        state = k.loop(high, initial, keys, start=low, step=KEYS)

        def finish(at: Index) -> None:
            for i, row in enumerate(rows):
                # A row that sees a key has a sum of at least 1 (its maximum): the bound only turns 0 / 0 into 0.
                divisor = k.splat(k.maxf(state[2 * i + 1], k.constant(0.5, "f32")), p.lanes)
                result = k.divf(k.load(self.sums, [i, at], p.lanes), divisor)
                k.store(result, self.y, [self.batch, row.token, k.add(k.mul(row.head, p.dv), at)])

        self._each(p.dv, p.lanes, finish)

    def _each(self, stop: Index, step: int, body: Callable[[Index], None]) -> None:
        def once(index: str, _: list[str]) -> list[str]:
            body(index)
            return []

        self.k.loop(stop, [], once, step=step)

    # ---- two of the three steps of a pass --------------------------------------------------------------------------
    def _products(self, start: str, count: Index, last: Index) -> None:
        """The scores of some keys without anything done to them."""
        k, p = self.k, self.p
        zero = k.constant(0.0, vector_type(p.lanes))

        def pair(j: Index) -> None:
            at = [k.minimum(k.add(k.add(start, j), u), last) for u in range(_KEYS_OF_SCORES)]
            for tile in p.row_tiles:

                def step(c: str, sums: list[str], tile: range = tile) -> list[str]:
                    keys = [k.load(self.key, [self.batch, self.head, s, c], p.lanes) for s in at]
                    queries = [k.load(self.queries, [i, c], p.lanes) for i in tile]
                    pairs = [(q, key) for q in queries for key in keys]
                    return [k.fma(q, key, acc) for (q, key), acc in zip(pairs, sums, strict=True)]

                sums = k.loop(p.dk, [zero] * (len(tile) * len(at)), step, step=p.lanes)
                totals = iter(k.sum_lanes(sums))
                for i in tile:
                    for u in range(len(at)):
                        k.store(next(totals), self.scores, [i, k.add(j, u)])

        self._each(count, _KEYS_OF_SCORES, pair)

    def _soften(self, i: int, row: Row, start: str, highest: str, total: str) -> list[str]:
        """Scores of a row to weights; the sums so far to the new maximum. Returns maximum and total."""
        k, p = self.k, self.p
        lanes, vector = p.lanes, vector_type(p.lanes)
        infinity = k.constant(float("-inf"), vector)
        low, high = (self._splat_i32(bound) for bound in (row.low, row.high))
        origin = k.op(f"arith.index_cast {start} : index to i32", "i32")

        def visible(j: Index, value: str) -> str:
            index = k.op(f"arith.index_cast {k.index(j)} : index to i32", "i32")
            base = k.op(f"arith.addi {origin}, {index} : i32", "i32")
            ints, mask = f"vector<{lanes}xi32>", f"vector<{lanes}xi1>"
            key = k.op(f"arith.addi {self._splat(base)}, {self.steps} : {ints}", ints)
            before = k.op(f"arith.cmpi slt, {key}, {high} : {ints}", mask)
            if p.left is not None:
                after = k.op(f"arith.cmpi sge, {key}, {low} : {ints}", mask)
                before = k.op(f"arith.andi {before}, {after} : {mask}", mask)
            return k.op(f"arith.select {before}, {value}, {infinity} : {mask}, {vector}", vector)

        def score(j: str, carried: list[str]) -> list[str]:
            value = k.load(self.scores, [i, j], lanes)
            if p.softcap:
                value = capped(k, p, value)
            if self.bias is not None:
                bias = self._bias(row, k.add(start, j))
                hides = k.op(f"arith.cmpf oeq, {bias}, {infinity} : {vector}", vector_type(lanes, "i1"))
                value = k.select(hides, infinity, k.addf(value, bias))  # NaN - inf would be NaN
            value = visible(j, value)
            k.store(value, self.scores, [i, j])
            return [k.maxf(carried[0], value)]

        lowest = k.constant(_LOWEST, vector)
        (peaks,) = k.loop(KEYS, [lowest], score, step=lanes)
        peak = k.maxf(highest, k.op(f"vector.reduction <maximumf>, {peaks} : {vector} into f32", "f32"))
        factor = k.exp(k.subf(highest, peak))
        offset = k.splat(peak, lanes)

        def weigh(j: str, carried: list[str]) -> list[str]:
            weight = k.exp(k.subf(k.load(self.scores, [i, j], lanes), offset))
            k.store(weight, self.scores, [i, j])
            return [k.addf(carried[0], weight)]

        (weights,) = k.loop(KEYS, [k.constant(0.0, vector)], weigh, step=lanes)
        total = k.fma(total, factor, k.op(f"vector.reduction <add>, {weights} : {vector} into f32", "f32"))
        factors = k.splat(factor, lanes)
        self._each(p.dv, lanes, lambda c: k.store(k.mulf(k.load(self.sums, [i, c], lanes), factors), self.sums, [i, c]))
        return [peak, total]

    # ---- parts of a score ------------------------------------------------------------------------------------------
    def _bias(self, row: Row, key: Index) -> str:
        """The bias of some keys; those behind the last are read as keys before it, and hidden later."""
        k, p = self.k, self.p
        assert self.bias is not None
        assert p.bias_dims is not None
        chosen = (self.batch, row.head, row.token)
        place = [index if has else 0 for index, has in zip(chosen, p.bias_dims, strict=True)]
        last = k.sub(self.keys, 1)
        elements = [k.load(self.bias, [*place, k.minimum(k.add(key, lane), last)]) for lane in range(p.lanes)]
        vector = vector_type(p.lanes)
        return k.op(f"vector.from_elements {', '.join(elements)} : {vector}", vector)

    def _splat(self, value: str) -> str:
        """An i32 in all lanes."""
        ints = f"vector<{self.p.lanes}xi32>"
        return self.k.op(f"vector.broadcast {value} : i32 to {ints}", ints)

    def _splat_i32(self, index: str) -> str:
        """An index in all lanes, as i32."""
        return self._splat(self.k.op(f"arith.index_cast {index} : index to i32", "i32"))
