"""Many rows as the products of strategy ``fused_simd`` take them: f32 or pairs of bf16, cut into tiles.

    [tiles, K x tile]: the elements of all rows of a tile side by side (in ``simd_squares`` two pairs of each); the last
    row stands for those beyond it

So a tile streams through the caches as one piece of memory. Where they are, rows lie a multiple of 4 KiB apart more
often than not, and would share a few lines of the first-level cache.
"""

from __future__ import annotations

from ..emit.kernel_text import Index, KernelText
from .simd_pairs import load_half, load_pairs
from .simd_plan import Plan
from .simd_squares import write_square_rows


def write_rows(k: KernelText, p: Plan, rows: Index, source: str, target: str) -> None:
    """The body of the kernel: the tile that is this workgroup's.

    Args:
        k: Where to.
        p: Sizes of the product.
        rows: M.
        source: Memref of the rows [M, K].
        target: Memref of the tiles.
    """
    tile = k.op("hal.interface.workgroup.id[1] : index", "index")
    places = [k.add(k.mul(tile, p.tile), i) for i in range(p.tile)]
    if p.rows is None or p.rows % p.tile:
        places = [k.minimum(row, k.sub(rows, 1)) for row in places]

    if p.squares:
        write_square_rows(k, p, places, source, target, tile)
        return

    def move(at: Index, lanes: int) -> list[str]:
        """Elements of K, or pairs of them, from ``at`` on."""
        if p.pairs and not p.widened:
            half = p.half and at == p.depth - 1
            loaded = [
                load_half(k, source, row, at) if half else load_pairs(k, source, row, at, lanes or 1) for row in places
            ]
            lanes = 0 if half else lanes or 1
        else:
            loaded = [k.load(source, [row, at], lanes) for row in places]
        for lane in range(max(lanes, 1)):
            start = k.mul(k.add(at, lane), p.tile)
            for i, values in enumerate(loaded):
                k.store(k.extract(values, lane) if lanes else values, target, [tile, k.add(start, i)])
        return []

    depth = p.depth * p.parts
    whole = (depth - p.half) // p.lanes * p.lanes
    if whole:
        k.loop(whole, [], lambda at, _: move(at, p.lanes), step=p.lanes)
    for at in range(whole, depth):
        move(at, 0)
