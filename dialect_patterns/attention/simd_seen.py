"""Which rows a workgroup of softmax attention on CPUs has, and which keys they see by position."""

from __future__ import annotations

from dataclasses import dataclass

from ..emit.kernel_text import Index, KernelText
from .simd_plan import Plan


@dataclass(frozen=True)
class Row:
    """One query row: its token and query head, and the keys it sees, all indices."""

    token: Index
    head: Index
    low: str
    high: str


class Seen:
    """Writes what a kernel needs to know of its rows.

    Args:
        k: Where to.
        p: The kernel's sizes.
        keys: S.
        place: Batch row, key head and the number of the workgroup among those of the head.
        first: Memref of the position of the first query of each batch row, None where it is known or not asked for.
        limit: Memref of how many keys there are, None where all are.
    """

    def __init__(
        self,
        k: KernelText,
        p: Plan,
        keys: Index,
        place: tuple[Index, Index, Index],
        first: str | None,
        limit: str | None,
    ) -> None:
        self.k, self.p = k, p
        self._batch, self._head, self._tile = place
        self._end: Index = keys
        if limit is not None:
            self._end = self._signed("maxsi", self._signed("minsi", keys, self._bound(limit)), 0)
        self._first: Index | None = self._bound(first) if first is not None else p.first

    def row(self, i: Index) -> tuple[Index, Index]:
        """Token and query head of a row; those behind the last one are the last one."""
        k, p = self.k, self.p
        m = k.minimum(k.add(k.mul(self._tile, p.rows), i), p.tokens * p.group - 1)
        return k.div(m, p.group), k.add(k.mul(self._head, p.group), k.rem(m, p.group))

    def rows(self) -> list[Row]:
        """All rows of the workgroup, in an order in which neither end of what they see goes back."""
        return [self._row(i) for i in range(self.p.rows)]

    def _row(self, i: int) -> Row:
        k, p = self.k, self.p
        token, head = self.row(i)
        low, high = k.index(0), k.index(self._end)
        if p.left is not None or p.right is not None:
            assert self._first is not None
            own = k.add(self._first, token)
            if p.left is not None:
                low = self._signed("maxsi", k.sub(own, p.left), 0)
            if p.right is not None:
                high = self._signed("maxsi", self._signed("minsi", self._end, k.add(own, p.right + 1)), 0)
        return Row(token, head, low, high)

    def _signed(self, name: str, a: Index, b: Index) -> str:
        k = self.k
        return k.op(f"arith.{name} {k.index(a)}, {k.index(b)} : index", "index")

    def _bound(self, memref: str) -> str:
        """A bound of this batch row, an index."""
        k = self.k
        value = k.op(f"memref.load {memref}[{k.index(self._batch)}] : {k.types[memref]}", "i32")
        return k.op(f"arith.index_cast {value} : i32 to index", "index")


def capped(k: KernelText, p: Plan, value: str) -> str:
    """Scores with the cap: c * tanh(s / c) = c - 2 c / (1 + exp(2 s / c))."""
    vector = k.types[value]
    cap, twice = k.constant(p.softcap, vector), k.constant(2.0 * p.softcap, vector)
    power = k.exp(k.mulf(value, k.constant(2.0 / p.softcap, vector)))
    return k.subf(cap, k.divf(twice, k.addf(k.constant(1.0, vector), power)))
