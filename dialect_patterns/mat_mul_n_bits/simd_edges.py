"""What both bodies of strategy ``fused_simd`` do at the edges: which columns are theirs, and writing the product."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..emit.kernel_text import Index, KernelText
from .contract import MatMulNBits
from .simd_plan import Plan


class Edges:
    """The columns of a workgroup and the product.

    Args:
        k: Where to write.
        c: What is computed.
        p: Its sizes.
        bias: Memref [N], or None.
        product: Memref [M, N].
    """

    def __init__(self, k: KernelText, c: MatMulNBits, p: Plan, bias: str | None, product: str) -> None:
        self.k, self.c, self.p, self._bias, self._product = k, c, p, bias, product
        group = k.op("hal.interface.workgroup.id[0] : index", "index")
        self._first = k.mul(group, p.workgroup_columns)

    @property
    def first(self) -> Index:
        """The first column of this workgroup's first tile."""
        return self._inside(self._first)

    def _inside(self, column: Index) -> Index:
        """The same, or less where a tile from there on would end after the last column."""
        n, tile = self.c.columns, self.p.tile
        return self.k.minimum(column, n - tile) if n % tile else column

    def after(self, column: Index) -> Index:
        """The first column of the tile after that at ``column``, or of the last one of all."""
        return self.k.minimum(self.k.add(column, self.p.tile), self.c.columns - self.p.tile)

    def each_tile(self, body: Callable[[Index], None]) -> None:
        """``body(first column)`` for each tile of this workgroup; the last one of all ends with the last column."""
        k, p, n = self.k, self.p, self.c.columns
        stop = k.add(self._first, p.workgroup_columns)
        if n % p.workgroup_columns:
            stop = k.minimum(stop, n)

        def tile(column: str, _: list[str]) -> list[str]:
            body(self._inside(column))
            return []

        k.loop(stop, [], tile, start=self._first, step=p.tile)

    def write(self, row: Index, column: Index, sums: Sequence[str]) -> None:
        """Some vectors of the product, from their sums."""
        k = self.k
        for v, value in enumerate(sums):
            at = k.add(column, v * self.p.lanes)
            if self._bias is not None:
                value = k.addf(value, k.load(self._bias, [at], self.p.lanes))
            k.store(value, self._product, [row, at])

    def ask(self, row: Index, column: Index) -> None:
        """Ask for the product's memory from a row and column on, which is written soon."""
        self.k.prefetch(self._product, [row, column], write=True)
