"""Many rows as the products of strategy ``fused_simd`` take them: f32, cut into tiles and blocks.

    [tiles, tile x K]: block after block of K, in each the rows of the tile one after the other; zeros beyond the last

A tile's part of a block is one piece of memory. Rows where they are lie a multiple of 4 KiB apart more often than not,
which makes them share a few lines of the first-level cache.
"""

from __future__ import annotations

import math

from ..kernel_text import Index, KernelText
from .simd_plan import Plan


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
    first = k.mul(tile, p.tile)
    for i in range(p.tile):
        row = k.add(first, i)
        if isinstance(rows, int) and (i < rows % p.tile or rows % p.tile == 0):
            _write_row(k, p, i, row, tile, source, target)
        else:
            k.when(
                k.less(row, rows),
                [],
                lambda i=i, row=row: _write_row(k, p, i, row, tile, source, target),
                lambda i=i: _write_row(k, p, i, None, tile, source, target),
            )


def _write_row(k: KernelText, p: Plan, i: int, row: Index | None, tile: Index, source: str, target: str) -> list[str]:
    """Row ``row``, or zeros, as row ``i`` of a tile."""
    whole = p.depth // p.block
    if whole:

        def block(start: Index, _: list[str]) -> list[str]:
            _write_block(k, p, i, row, tile, source, target, start, p.block)
            return []

        k.loop(whole * p.block, [], block, step=p.block)
    if p.depth % p.block:
        _write_block(k, p, i, row, tile, source, target, whole * p.block, p.depth % p.block)
    return []


def _write_block(
    k: KernelText, p: Plan, i: int, row: Index | None, tile: Index, source: str, target: str, start: Index, size: int
) -> None:
    lanes = math.gcd(size, p.lanes)
    base = k.add(k.mul(start, p.tile), i * size)
    zero = k.constant(0.0, f"vector<{lanes}xf32>" if lanes > 1 else "f32")

    def move(at: Index, _: list[str]) -> list[str]:
        value = zero if row is None else k.load(source, [row, k.add(start, at)], lanes if lanes > 1 else 0)
        k.store(value, target, [tile, k.add(base, at)])
        return []

    k.loop(size, [], move, step=lanes)
