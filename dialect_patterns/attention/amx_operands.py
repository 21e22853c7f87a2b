"""Queries, keys, values and weights as ``amx_kernel``'s products take them: words of two bf16, in one term or two.

bf16 is one term, and a cache's rows of it are registers as they lie. Of f16 and f32 two make a number, see
``mat_mul.bf16_terms``. Keys are taken apart 32 at a time on the stack, values 32 columns at a time in pairs of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..emit.amx_tiles import ROWS, AmxTiles
from ..emit.kernel_text import Index, KernelText, vector_type
from ..linear_attention.simd_products import transpose
from ..mat_mul.bf16_terms import pair, rounded, split, split_words
from .simd_plan import Plan
from .simd_seen import Row

KEYS = 32
COLUMNS = 32
GROUPS = 2
"""Of 16 rows, and of 16 keys."""
WORDS = 16
"""Of two bf16."""
_INFINITE = {"bf16": 0x7F80, "f16": 0x7F800000, "f32": 0x7F800000}
_INTS = vector_type(ROWS, "i32")
_HALVES = vector_type(2 * ROWS, "i16")

Place = list[Index]


class UnitOperands:
    """Writes how operands reach the unit; q [B, T, Hq * dk], k [B, Hkv, S, dk], v [B, Hkv, S, dv].

    Args:
        k: Where to.
        p: Sizes of the kernel.
        terms: bf16 of each number.
        memrefs: q, k, v.
    """

    def __init__(self, k: KernelText, p: Plan, terms: int, memrefs: Sequence[str]) -> None:
        self.k, self.p, self.terms = k, p, terms
        self.q, self.key, self.value = memrefs
        self.dtype = k.element_type(self.key)

        def parts(*shape: int) -> list[str]:
            return [k.alloca(shape, "i32") for _ in range(terms)]

        self.queries = parts(p.dk // 2, p.rows)
        self.keys = [] if self.dtype == "bf16" else parts(KEYS, p.dk // 2)
        self.weights = parts(GROUPS, ROWS, WORDS)
        self.values = parts(WORDS, COLUMNS)

    def _each(self, stop: Index, step: int, body: Callable[[Index], None]) -> None:
        def once(index: str, _: list[str]) -> list[str]:
            body(index)
            return []

        self.k.loop(stop, [], once, step=step)

    # ---- scores ----------------------------------------------------------------------------------------------------
    def read_queries(self, batch: Index, number: int, group: Sequence[Row]) -> None:
        """Pairs of elements of a row below each other, as the unit wants its right side."""
        k, p = self.k, self.p

        def words(at: Index) -> None:
            rows = [
                split_words(
                    k, self.q, [batch, row.token, k.add(k.mul(row.head, p.dk), k.mul(at, 2))], WORDS, self.terms
                )
                for row in group
            ]
            for term, part in enumerate(self.queries):
                for word, column in enumerate(transpose(k, [row[term] for row in rows])):
                    k.store(column, part, [k.add(at, word), number * ROWS])

        self._each(p.dk // 2, WORDS, words)

    def read_keys(self, head: Place, places: Sequence[Index]) -> None:
        """The keys of a pass, 16 from each place on, where they are no registers as they lie."""
        k = self.k
        for group, start in enumerate(places if self.keys else ()):

            def one(j: Index, group: int = group, start: Index = start) -> None:
                def words(at: Index) -> None:
                    place = [*head, k.add(start, j), k.mul(at, 2)]
                    for part, value in zip(self.keys, split_words(k, self.key, place, WORDS, self.terms), strict=True):
                        k.store(value, part, [k.add(j, group * ROWS), at])

                self._each(self.p.dk // 2, WORDS, words)

            self._each(ROWS, 1, one)

    def load_keys(self, unit: AmxTiles, register: int, term: int, group: int, place: Place, word: Index) -> None:
        """Words of 16 keys; ``place`` is where the cache has the first one."""
        if self.keys:
            unit.load(register, self.keys[term], [group * ROWS, word])
        else:
            unit.load(register, self.key, [*place, self.k.mul(word, 2)])

    # ---- sums ------------------------------------------------------------------------------------------------------
    def store_weights(self, group: int, weights: Sequence[str]) -> None:
        """The weights of 32 keys, a vector of 16 rows each, row by row."""
        k = self.k
        terms = [split(k, x, "f32") if self.terms == 2 else (rounded(k, x),) for x in weights]
        for term, part in enumerate(self.weights):
            words = [pair(k, first[term], second[term]) for first, second in zip(terms[::2], terms[1::2], strict=True)]
            for i, row in enumerate(transpose(k, words)):
                k.store(row, part, [group, i, 0])

    def read_values(self, head: Place, key: Callable[[int, Index], Index], column: Index) -> str:
        """Values of a pass in pairs of keys; whether one of them is NaN or inf.

        Args:
            head: Batch row and head.
            key: Group and number in it -> key.
            column: The first of 32.
        """
        k, halves = self.k, self.dtype == "bf16"
        bits = _HALVES if halves else _INTS
        largest = k.constant(0, bits)
        read = self._half_words if halves else self._terms

        for group in range(GROUPS):

            def one(word: str, found: list[str], group: int = group) -> list[str]:
                rows = [[*head, key(group, k.add(k.mul(word, 2), i)), column] for i in range(2)]
                return [read(rows, k.add(word, group * ROWS // 2), found[0])]

            (largest,) = k.loop(ROWS // 2, [largest], one)
        infinite = k.constant(_INFINITE[self.dtype], bits)
        mask = vector_type(k.lanes(largest), "i1")
        bad = k.op(f"arith.cmpi uge, {largest}, {infinite} : {bits}", mask)
        return k.op(f"vector.reduction <or>, {bad} : {mask} into i1", "i1")

    def _half_words(self, places: Sequence[Place], word: Index, largest: str) -> str:
        """A word of two keys' bf16; the largest magnitude so far."""
        k = self.k
        rows: list[str] = []
        for place in places:
            rows.append(k.as_type(k.load(self.value, place, COLUMNS, raw=True), _HALVES, "vector.bitcast"))
            magnitude = k.andi(rows[-1], k.constant(0x7FFF, _HALVES))
            largest = k.op(f"arith.maxui {largest}, {magnitude} : {_HALVES}", _HALVES)
        for half in range(2):
            order = [lane + 2 * ROWS * row for lane in range(half * ROWS, (half + 1) * ROWS) for row in range(2)]
            words = k.as_type(k.shuffle(rows[0], rows[1], order), _INTS, "vector.bitcast")
            k.store(words, self.values[0], [word, half * ROWS])
        return largest

    def _terms(self, places: Sequence[Place], word: Index, largest: str) -> str:
        """The same of f16 and f32."""
        k = self.k
        for half in range(0, COLUMNS, ROWS):
            values = [k.load(self.value, [*place[:-1], k.add(place[-1], half)], ROWS) for place in places]
            for value in values:
                magnitude = k.andi(k.as_type(value, _INTS, "arith.bitcast"), k.constant(0x7FFFFFFF, _INTS))
                largest = k.op(f"arith.maxui {largest}, {magnitude} : {_INTS}", _INTS)
            terms = [split(k, x, self.dtype) for x in values]
            for part, both in zip(self.values, zip(*terms, strict=True), strict=True):
                k.store(pair(k, *both), part, [word, half])
        return largest
