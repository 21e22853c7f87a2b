"""What the kernels of products on CPUs share: their part of the grid, and writing sums where rows or columns end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..emit.kernel_text import Index, KernelText
from .simd_plan import Plan


def workgroup_range(k: KernelText, axis: str, size: int, total: Index) -> tuple[Index, Index]:
    """First and number of what a workgroup does of ``total`` things, ``size`` each, along one axis of the grid."""
    if size == total:
        return 0, size
    first = k.mul(k.op(f"hal.interface.workgroup.id[{axis}] : index", "index"), size)
    whole = isinstance(total, int) and total % size == 0
    return first, size if whole else k.minimum(k.sub(total, first), size)


def each(k: KernelText, stop: Index, step: int, body: Callable[[Index], None]) -> None:
    """``body(index)`` from 0 up to ``stop``; no loop where that is one step."""

    def once(index: Index, _: list[str]) -> list[str]:
        body(index)
        return []

    if stop == step:
        body(0)
    else:
        k.loop(stop, [], once, step=step)


def store_rows(k: KernelText, p: Plan, y: str, rows: Index, row: Index, panel: Index, sums: Sequence[str]) -> None:
    """Write a tile by a panel.

    Args:
        k: Where to.
        p: Sizes of the product.
        y: Memref of the result [M, N].
        rows: M.
        row: First row of the tile; those beyond M are not written.
        panel: The panel; columns beyond N are not written.
        sums: The vectors of each row, row after row.
    """

    def store(columns: int) -> list[str]:
        for i in range(p.tile):

            def one(i: int = i) -> list[str]:
                _store(k, p, y, k.add(row, i), panel, sums[i * p.vectors : (i + 1) * p.vectors], columns)
                return []

            if isinstance(rows, int) and (rows % p.tile == 0 or i < rows % p.tile):
                one()
            else:
                k.when(k.less(k.add(row, i), rows), [], one, lambda: [])
        return []

    left = p.columns % p.width
    if left:
        k.when(k.less(panel, p.panels - 1), [], lambda: store(p.width), lambda: store(left))
    else:
        store(p.width)


def _store(k: KernelText, p: Plan, y: str, row: Index, panel: Index, sums: Sequence[str], columns: int) -> None:
    """The first ``columns`` of a row of a panel."""
    first = k.mul(panel, p.width)
    for v, total in enumerate(sums):
        column, inside = k.add(first, v * p.lanes), columns - v * p.lanes
        if inside >= p.lanes:
            k.store(total, y, [row, column])
            continue
        for lane in range(max(inside, 0)):
            k.store(k.extract(total, lane), y, [row, k.add(column, lane)])
