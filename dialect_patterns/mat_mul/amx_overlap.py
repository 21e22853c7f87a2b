"""Products of 32 rows on the matrix unit (AMX), whose results are written while the next ones are under way.

The unit works beside the vectors: of 32 rows' results a few are written after each step of the next 32 rows' products.
One after the other, a product's start, its results and the memory that these wait for took half of its time (K = 1024).
"""

from __future__ import annotations

from collections.abc import Callable

from ..emit.amx_tiles import ROWS
from ..emit.kernel_text import Index, KernelText
from .simd_edges import each

_ALL = 2 * ROWS


def overlapped(
    k: KernelText,
    blocks: Index,
    steps: int,
    begin: Callable[[Index], None],
    step: Callable[[Index, Index], None],
    end: Callable[[Index], None],
    finish: Callable[[Index, Index], None],
) -> None:
    """Writes the loop over blocks of 32 rows.

    Args:
        k: Where to.
        blocks: How many, at least one.
        steps: Of a block's products.
        begin: ``begin(block)``: before them.
        step: ``step(block, number)``: one of them.
        end: ``end(block)``: the sums leave the unit's registers, to where ``finish`` reads them.
        finish: ``finish(block, row)``: writes a row's results; called for all rows before the next ``end``.
    """
    share = next(size for size in (1, 2, 4, 8, 16, 32) if size * steps >= _ALL)
    sharing = _ALL // share

    def one(block: Index) -> None:
        begin(block)

        def first(number: Index) -> None:
            step(block, number)

            def results() -> list[str]:
                for row in range(share):
                    finish(k.sub(block, 1), k.add(k.mul(number, share), row))
                return []

            if not isinstance(block, int):
                k.when(k.less(0, block), [], results, lambda: [])

        each(k, sharing, 1, first)
        if steps > sharing:
            each(k, steps - sharing, 1, lambda number: step(block, k.add(number, sharing)))
        end(block)

    each(k, blocks, 1, one)
    each(k, _ALL, 1, lambda row: finish(k.sub(blocks, 1), row))
