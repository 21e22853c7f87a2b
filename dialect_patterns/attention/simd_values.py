"""The last step of a pass of strategy ``fused_simd`` of softmax attention: y[r, :] += p[r, j] v[j, :].

A key that a row does not see weighs nothing, but 0 times NaN or inf is NaN. So where some row of the workgroup does not
see some of 8 keys, the values are taken as zeros for the rows that they weigh nothing for: some keys at either end of
what the rows see, and what a bias hides.
"""

from __future__ import annotations

from ..emit.kernel_text import Index, KernelText, vector_type
from .simd_plan import Plan

_KEYS = 8


class Mix:
    """Adds weighed values to the sums of some rows.

    Args:
        k: Where to write.
        p: The kernel's sizes.
        memrefs: Of the values [B, Hkv, S, dv], the weights [rows, keys of a pass] and the sums [rows, dv].
        place: Batch row and key head.
        seen: From which key on and up to which one all rows see all keys, unless a bias hides some.
    """

    def __init__(
        self, k: KernelText, p: Plan, memrefs: tuple[str, str, str], place: tuple[Index, Index], seen: tuple[str, str]
    ) -> None:
        self.k, self.p, self.place, self.seen = k, p, place, seen
        self.values, self.weights, self.sums = memrefs

    def add(self, start: str, count: Index, last: Index) -> None:
        """Write the step for ``count`` keys from ``start`` on; keys after ``last`` are read as that one."""
        k = self.k

        def some(j: str, _: list[str]) -> list[str]:
            first = k.add(start, j)
            at = [k.minimum(k.add(first, u), last) for u in range(_KEYS)]
            if self.p.sees_alike:
                self._keys(j, at, guarded=False)
            else:
                end = k.minimum(k.add(j, _KEYS), count)
                k.when(
                    self._all_seen(first, j), [],
                    lambda: self._keys(j, at, guarded=False), lambda: self._rest(start, j, end),
                )  # fmt: skip
            return []

        k.loop(count, [], some, step=_KEYS)

    def _all_seen(self, first: Index, j: Index) -> str:
        """Whether all rows see all of 8 keys."""
        k, (low, high) = self.k, self.seen
        if self.p.bias_dims is not None:
            return self._any_or_all(j, "ogt", "and")  # NaN is looked at
        condition = k.less(k.add(first, _KEYS), high, or_equal=True)
        if self.p.left is not None:
            condition = k.op(f"arith.andi {condition}, {k.less(low, first, or_equal=True)} : i1", "i1")
        return condition

    def _rest(self, start: str, j: str, end: Index) -> list[str]:
        """Up to 8 keys that not all rows see, one by one; what a bias hides from all of them costs nothing."""
        k = self.k

        def one(key: str, _: list[str]) -> list[str]:
            return self._keys(key, [k.add(start, key)], guarded=True)

        def each() -> list[str]:
            return k.loop(end, [], one, start=j)

        if self.p.bias_dims is None:
            return each()
        return k.when(self._any_or_all(j, "une", "or"), [], each, lambda: [])

    def _any_or_all(self, j: Index, comparison: str, joined: str) -> str:
        """Whether some weight of 8 keys, or each, compares so with 0."""
        k = self.k
        vector, mask = vector_type(_KEYS), vector_type(_KEYS, "i1")
        zero, found = k.constant(0.0, vector), ""
        for i in range(self.p.rows):
            weights = k.load(self.weights, [i, j], _KEYS)
            own = k.op(f"arith.cmpf {comparison}, {weights}, {zero} : {vector}", mask)
            found = k.op(f"arith.{joined}i {found}, {own} : {mask}", mask) if found else own
        return k.op(f"vector.reduction <{joined}>, {found} : {mask} into i1", "i1")

    def _keys(self, j: Index, at: list[Index], guarded: bool) -> list[str]:
        """Add the values of the keys ``at``, the pass's ``j`` and so on: two vectors of four rows at a time."""
        k, p = self.k, self.p
        vectors = 2 if p.dv // p.lanes % 2 == 0 else 1
        zero, mask = k.constant(0.0, vector_type(p.lanes)), vector_type(p.lanes, "i1")
        for tile in p.row_tiles:
            weights = {(i, u): k.load(self.weights, [i, k.add(j, u)]) for i in tile for u in range(len(at))}

            def columns(
                c: str, _: list[str], tile: range = tile, weights: dict[tuple[int, int], str] = weights
            ) -> list[str]:
                places = [k.add(c, v * p.lanes) for v in range(vectors)]
                sums = {(i, column): k.load(self.sums, [i, column], p.lanes) for i in tile for column in places}
                for u, s in enumerate(at):
                    stored = {column: k.load(self.values, [*self.place, s, column], p.lanes) for column in places}
                    for i, column in sums:
                        value, weight = stored[column], k.splat(weights[i, u], p.lanes)
                        if guarded:
                            counts = k.op(f"arith.cmpf une, {weight}, {zero} : {k.types[weight]}", mask)
                            value = k.select(counts, value, zero)
                        sums[i, column] = k.fma(weight, value, sums[i, column])
                for place, value in sums.items():
                    k.store(value, self.sums, list(place))
                return []

            k.loop(p.dv, [], columns, step=vectors * p.lanes)
        return []
