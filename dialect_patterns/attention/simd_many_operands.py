"""How ``simd_many`` reads queries, keys and values and multiplies them: as f32, or as words of two bf16.

    Floats:  s[j, r] += k[j, d] * q[r, d]                          y[r, c] += p[j, r] * v[j, c]
    Pairs:   s[j, r] += k[j, 2w] * q[r, 2w] + the same of 2w + 1   y[r, c] += p[2w, r] * v[2w, c] + the same of 2w + 1

Pairs take half as many instructions where the machine has one for them; scores and sums are in f32 either way, weights
are rounded to bf16 as values are. A cache's rows of f32, or of pairs, are read where they lie. Others are widened: 12
keys at a time, and 48 values of two vectors' columns.

Keys and values of f32 are asked for a pass ahead, some lines in each step of the loops over those at hand: a pass has
96 KiB of them, twice what the first cache holds, and two vectors' columns of values lie a row apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..emit.kernel_text import Index, KernelText, vector_type
from ..linear_attention.simd_products import transpose
from ..mat_mul import simd_pairs
from .simd_plan import Plan
from .simd_seen import Row

KEYS = 48
"""Keys of a pass."""
PAIR_LANES = 16
"""Of vectors of pairs."""
_LINE = 16  # elements of f32

Place = Sequence[Index]
Multiply = Callable[[str, Sequence[int], list[str]], list[str]]


class _Operands:
    """What both have.

    Args:
        k: Where to.
        p: Sizes of the kernel.
        tile: Keys whose scores are in registers at once.
        memrefs: q, k, v.
    """

    def __init__(self, k: KernelText, p: Plan, tile: int, memrefs: tuple[str, str, str]) -> None:
        self.k, self.p, self.tile = k, p, tile
        self.q, self.key, self.value = memrefs

    def _each(self, stop: Index, step: int, body: Callable[[Index], None], start: Index = 0) -> None:
        def once(index: str, _: list[str]) -> list[str]:
            body(index)
            return []

        self.k.loop(stop, [], once, start=start, step=step)


class Floats(_Operands):
    """Operands in f32."""

    is_scaled, has_words = True, False
    """Whether queries are times the scale; whether weights are stored in words as well."""

    def __init__(self, k: KernelText, p: Plan, tile: int, memrefs: tuple[str, str, str]) -> None:
        super().__init__(k, p, tile, memrefs)
        self.queries = k.alloca([p.dk, p.rows])
        self.keys = "" if k.element_type(self.key) == "f32" else k.alloca([tile, p.dk])
        self.wide = "" if k.element_type(self.value) == "f32" else k.alloca([KEYS, 2 * p.lanes])

    def read_queries(self, batch: Index, rows: Sequence[Row]) -> None:
        """Queries, times the scale, an element of all rows side by side."""
        k, p = self.k, self.p
        scale = k.constant(p.scale, vector_type(p.lanes))

        def some(d: Index) -> None:
            for first in range(0, p.rows, p.lanes):
                read = [
                    k.mulf(k.load(self.q, [batch, row.token, k.add(k.mul(row.head, p.dk), d)], p.lanes), scale)
                    for row in rows[first : first + p.lanes]
                ]
                for e, column in enumerate(transpose(k, read)):
                    k.store(column, self.queries, [k.add(d, e), first])

        self._each(p.dk, p.lanes, some)

    def products(self, place: Place, at: Sequence[int]) -> list[str]:
        """A tile's keys from ``place`` on times some vectors of rows: vectors of a key, key after key."""
        k, p = self.k, self.p
        *head, first = place
        if self.keys:

            def widen(d: Index) -> None:
                for u in range(self.tile):
                    k.store(k.load(self.key, [*head, k.add(first, u), d], p.lanes), self.keys, [u, d])

            self._each(p.dk, p.lanes, widen)

        def element(u: int, d: Index) -> str:
            value = k.load(self.keys, [u, d]) if self.keys else k.load(self.key, [*head, k.add(first, u), d])
            return k.splat(value, p.lanes)

        asked = [*head, k.add(first, KEYS)]

        def step(d: str, sums: list[str]) -> list[str]:
            if not self.keys and at[0] == 0:
                self._ask_keys(asked, d)
            for e in range(2):
                spot = k.add(d, e)
                queries = [k.load(self.queries, [spot, row], p.lanes) for row in at]
                for u in range(self.tile):
                    factor = element(u, spot)
                    for v, query in enumerate(queries):
                        number = u * len(at) + v
                        sums[number] = k.fma(factor, query, sums[number])
            return sums

        zero = k.constant(0.0, vector_type(p.lanes))
        return k.loop(p.dk, [zero] * (self.tile * len(at)), lambda d, sums: step(d, list(sums)), step=2)

    def _ask_keys(self, place: Place, d: Index) -> None:
        """Asks for a tile's keys, its share of them where the loop over a head is at ``d``, two elements a step."""
        k, p = self.k, self.p
        count, steps = self.tile * -(-p.dk // _LINE), p.dk // 2
        each = -(-count // steps)
        for e in range(each):
            line = k.div(k.mul(k.add(k.mul(k.div(d, 2), each), e), count), each * steps)
            k.prefetch(self.key, [*place, k.mul(line, _LINE)], level=2)  # a key lies behind the other

    def store_weights(self, weights: Sequence[str], j: Index, row: int) -> None:
        """Nothing: they are read as they lie."""

    def values(self, place: Place, columns: Sequence[Index], span: tuple[Index, Index]) -> Multiply:
        """Makes some columns of values ready; a function that adds them, weighed, to the sums of some rows."""
        k, p = self.k, self.p
        *head, first = place
        if self.wide:

            def widen(j: Index) -> None:
                for v, column in enumerate(columns):
                    k.store(k.load(self.value, [*head, k.add(first, j), column], p.lanes), self.wide, [j, v * p.lanes])

            self._each(span[1], 1, widen, start=span[0])

        def value(j: Index, v: int) -> str:
            if self.wide:
                return k.load(self.wide, [j, v * p.lanes], p.lanes)
            return k.load(self.value, [*head, k.add(first, j), columns[v]], p.lanes)

        asked = [column for v, column in enumerate(columns) if v * p.lanes % _LINE == 0]

        def multiply(scores: str, rows: Sequence[int], sums: list[str]) -> list[str]:
            def step(j: str, found: list[str]) -> list[str]:
                for e in range(2):
                    spot = k.add(j, e)
                    for column in asked if not self.wide and rows[0] == 0 else ():
                        k.prefetch(self.value, [*head, k.add(k.add(first, spot), KEYS), column], level=2)
                    read = [value(spot, v) for v in range(len(columns))]
                    for n, i in enumerate(rows):
                        weight = k.splat(k.load(scores, [spot, i]), p.lanes)
                        for v, vector in enumerate(read):
                            number = n * len(columns) + v
                            found[number] = k.fma(weight, vector, found[number])
                return found

            return k.loop(span[1], sums, lambda j, found: step(j, list(found)), start=span[0], step=2)

        return multiply


class Pairs(_Operands):
    """Operands in bf16, two in a word."""

    is_scaled, has_words = False, True

    def __init__(self, k: KernelText, p: Plan, tile: int, memrefs: tuple[str, str, str]) -> None:
        super().__init__(k, p, tile, memrefs)
        self.queries = k.alloca([p.dk // 2, p.rows], "i32")
        self.weights = k.alloca([KEYS // 2, p.rows], "i32")
        self.words = k.alloca([KEYS // 2, 2 * p.lanes], "i32")

    def _words(self, memref: str, place: Place, count: int) -> str:
        k = self.k
        return k.as_type(k.load(memref, place, 2 * count, raw=True), vector_type(count, "i32"), "vector.bitcast")

    def read_queries(self, batch: Index, rows: Sequence[Row]) -> None:
        """Queries, a word of all rows side by side."""
        k, p = self.k, self.p

        def some(word: Index) -> None:
            for first in range(0, p.rows, p.lanes):
                read = [
                    self._words(self.q, [batch, row.token, k.add(k.mul(row.head, p.dk), k.mul(word, 2))], p.lanes)
                    for row in rows[first : first + p.lanes]
                ]
                for e, column in enumerate(transpose(k, read)):
                    k.store(column, self.queries, [k.add(word, e), first])

        self._each(p.dk // 2, p.lanes, some)

    def products(self, place: Place, at: Sequence[int]) -> list[str]:
        """A tile's keys from ``place`` on times some vectors of rows: vectors of a key, key after key."""
        k, p = self.k, self.p
        *head, first = place

        def step(word: str, sums: list[str]) -> list[str]:
            queries = [k.load(self.queries, [word, row], p.lanes, raw=True) for row in at]
            for u in range(self.tile):
                pair = self._words(self.key, [*head, k.add(first, u), k.mul(word, 2)], 1)
                factor = k.splat(k.extract(pair, 0), p.lanes)
                for v, query in enumerate(queries):
                    number = u * len(at) + v
                    sums[number] = simd_pairs.dot(k, factor, query, sums[number])
            return sums

        zero = k.constant(0.0, vector_type(p.lanes))
        return k.loop(p.dk // 2, [zero] * (self.tile * len(at)), lambda word, sums: step(word, list(sums)))

    def store_weights(self, weights: Sequence[str], j: Index, row: int) -> None:
        """The weights of two keys in words."""
        k, lanes = self.k, self.p.lanes
        both = k.narrow(k.shuffle(weights[0], weights[1], range(2 * lanes)), "bf16")
        halves = k.as_type(both, vector_type(2 * lanes, "i16"), "vector.bitcast")
        order = [lane + lanes * key for lane in range(lanes) for key in range(2)]
        words = k.as_type(k.shuffle(halves, halves, order), vector_type(lanes, "i32"), "vector.bitcast")
        k.store(words, self.weights, [k.div(j, 2), row])

    def values(self, place: Place, columns: Sequence[Index], span: tuple[Index, Index]) -> Multiply:
        """Makes some columns of values ready; a function that adds them, weighed, to the sums of some rows."""
        k, p = self.k, self.p
        *head, first = place
        halves, words = vector_type(2 * p.lanes, "i16"), vector_type(p.lanes, "i32")
        begin, end = (k.div(j, 2) for j in span)

        def interleave(word: Index) -> None:
            keys = [k.add(first, k.add(k.mul(word, 2), e)) for e in range(2)]
            read = [k.load(self.value, [*head, key, columns[0]], 2 * p.lanes, raw=True) for key in keys]
            upper, lower = (k.as_type(row, halves, "vector.bitcast") for row in read)
            for v in range(2):
                order = [lane + 2 * p.lanes * e for lane in range(v * p.lanes, (v + 1) * p.lanes) for e in range(2)]
                vector = k.as_type(k.shuffle(upper, lower, order), words, "vector.bitcast")
                k.store(vector, self.words, [word, v * p.lanes])

        self._each(end, 1, interleave, start=begin)

        def multiply(_: str, rows: Sequence[int], sums: list[str]) -> list[str]:
            def step(word: str, found: list[str]) -> list[str]:
                read = [k.load(self.words, [word, v * p.lanes], p.lanes, raw=True) for v in range(2)]
                for n, i in enumerate(rows):
                    weight = k.splat(k.load(self.weights, [word, i], raw=True), p.lanes)
                    for v, vector in enumerate(read):
                        found[2 * n + v] = simd_pairs.dot(k, weight, vector, found[2 * n + v])
                return found

            return k.loop(end, sums, lambda word, found: step(word, list(found)), start=begin)

        return multiply
