"""Products of a few rows with a panel of a matrix, for the kernels of strategy ``fused_simd``.

The sums of R rows and a panel's vectors stay in registers (R x 2 vectors, with the two of the panel and a factor most
of 16 or 32), so that a load of the panel serves R multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..emit.kernel_text import Index, KernelText, vector_type

Row = list[str]
"""The vectors of a row of a panel."""

_CHAINS = 8  # sums that hide how long a multiply-add takes


def row_blocks(count: int, most: int) -> list[tuple[int, int]]:
    """``count`` rows as (first, number) in blocks of nearly equal size, up to ``most``."""
    blocks = -(-count // most)
    sizes = [count // blocks + (i < count % blocks) for i in range(blocks)]
    return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def product(
    k: KernelText,
    rows: Sequence[Callable[[Index], str]],
    panel: Callable[[Index], Row],
    depth: int,
    lanes: int,
    vectors: int,
    also: Callable[[Index, int], None] | None = None,
) -> list[Row]:
    """Each row times a panel.

    Args:
        k: Where to write.
        rows: Their elements, by index.
        panel: The vectors of a row of the panel.
        depth: Elements of a row, a multiple of 4.
        lanes: Of a vector.
        vectors: Of the panel.
        also: What else each step of the loop does, given its number and how many there are.
    """
    size = len(rows) * vectors
    unroll = 2
    sets = max(1, min(unroll, _CHAINS // size))

    def step(d: str, carried: list[str]) -> list[str]:
        sums = list(carried)
        if also is not None:
            also(k.div(d, unroll), depth // unroll)
        for u in range(unroll):
            at = k.add(d, u)
            held = panel(at)
            base = u % sets * size
            for i, row in enumerate(rows):
                factor = k.splat(row(at), lanes)
                for n, vector in enumerate(held):
                    place = base + i * vectors + n
                    sums[place] = k.fma(factor, vector, sums[place])
        return sums

    zero = k.constant(0.0, vector_type(lanes))
    sums = k.loop(depth, [zero] * (sets * size), step, step=unroll)
    totals = sums[:size]
    for first in range(size, len(sums), size):
        totals = [k.addf(a, b) for a, b in zip(totals, sums[first : first + size], strict=True)]
    return [totals[i * vectors : (i + 1) * vectors] for i in range(len(rows))]


def transpose(k: KernelText, rows: Sequence[str]) -> list[str]:
    """The columns of as many vectors as they have lanes, a power of two."""
    side = len(rows)
    half = side
    while half > 1:  # swap the off-diagonal quarters of every block of ``half`` rows and columns
        half //= 2
        rows = list(rows)
        for first in [i for i in range(side) if not i & half]:
            a, b = rows[first], rows[first + half]
            low = [lane if not lane & half else side + lane - half for lane in range(side)]
            high = [lane + half if not lane & half else side + lane for lane in range(side)]
            rows[first], rows[first + half] = k.shuffle(a, b, low), k.shuffle(a, b, high)
    return list(rows)
