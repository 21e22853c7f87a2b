"""The body of strategy ``fused_simd`` of MatMul: all rows by some panels of the weights.

A panel is W columns of the weights, K rows of them one after the other in memory, so that a call of few rows streams
through memory and a tile of a call of many finds its operands side by side.

    for each block of K:                            its part of a panel stays in the second-level cache
      for each tile of rows:                        copied to the stack, as f32
        for each panel:  acc[r, :] += a[r, k] * b[k, :]        R x 2 vectors in registers

Few rows are one tile, read where they are, with K in one block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..kernel_text import Index, KernelText, vector_type

VECTORS = 2
"""Vectors side by side in a panel."""
_BLOCK = 256  # rows of the weights in a block: 16 KiB of a panel of f32 on AVX2, half of a first-level cache
_STACK_FLOATS = 4096  # of a copied tile
_GROUP_BYTES = 1 << 17  # of weights a workgroup reads where the rows are few
_GROUP_PANELS = 4  # that share the copy of a tile where they are many


@dataclass(frozen=True)
class Plan:
    """Sizes of one kernel.

    Attributes:
        rows: M, None where open.
        depth: K.
        columns: N.
        lanes: Lanes of a vector.
        tile: Rows of a tile.
        block: Rows of the weights in a block.
        group: Panels of a workgroup.
        unroll: Rows of the weights in one iteration.
    """

    rows: int | None
    depth: int
    columns: int
    lanes: int
    tile: int
    block: int
    group: int
    unroll: int

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return panel_width(self.lanes)

    @property
    def panels(self) -> int:
        """Panels of the weights, the last one filled up with zeros."""
        return -(-self.columns // self.width)

    @property
    def is_small(self) -> bool:
        """Whether all rows are one tile."""
        return self.rows is not None and self.rows <= self.tile

    @property
    def copies(self) -> bool:
        """Whether a tile of rows is copied to the stack."""
        return not self.is_small and self.tile * self.block <= _STACK_FLOATS


def panel_width(lanes: int) -> int:
    """Columns of a panel."""
    return lanes * VECTORS


def plan(rows: int | None, depth: int, columns: int, vector_bits: int, weight_bytes: int) -> Plan:
    """The sizes for a product.

    Args:
        rows: M, None where open.
        depth: K.
        columns: N.
        vector_bits: Width of a SIMD register.
        weight_bytes: Of one weight.
    """
    lanes = max(vector_bits // 32, 4)
    width = panel_width(lanes)
    tile = 12 if vector_bits >= 512 else 6  # with two vectors each, most of 32 or 16 registers
    small = rows is not None and rows <= tile
    blocks = -(-depth // _BLOCK) if columns % width == 0 and not small else 1
    block = -(-depth // blocks)
    block += -block % lanes if blocks > 1 else 0
    panels = -(-columns // width)
    group = max(1, _GROUP_BYTES // (depth * width * weight_bytes)) if small else _GROUP_PANELS
    unroll = next(u for u in (4, 2, 1) if depth % u == 0 and block % u == 0)
    return Plan(rows, depth, columns, lanes, tile, block, min(group, panels), unroll)


class Body:
    """Writes the body; ``a`` [M, K], ``b`` [panels, K, W], ``y`` [M, N], of f32 unless the rows are few."""

    def __init__(self, k: KernelText, p: Plan, rows: Index, memrefs: Sequence[str]) -> None:
        self.k, self.p, self.rows = k, p, rows
        self.a, self.b, self.y = memrefs
        self.copy = k.alloca([p.tile, p.block]) if p.copies else None
        first = k.mul(k.op("hal.interface.workgroup.id[0] : index", "index"), p.group)
        end = k.add(first, p.group)
        self.first, self.end = first, end if p.panels % p.group == 0 else k.minimum(end, p.panels)

    def write(self) -> None:
        """The whole body."""
        k, p = self.k, self.p
        if p.is_small:
            assert p.rows is not None
            self._panels(0, p.rows, 0, p.depth)
            return

        def block(start: Index) -> None:
            stop = k.add(start, p.block)
            self._tiles(start, stop if p.depth % p.block == 0 else k.minimum(stop, p.depth))

        if p.block == p.depth:
            block(0)
        else:
            self._loop(0, p.depth, p.block, block)

    def _loop(self, start: Index, stop: Index, step: int, body: Callable[[Index], None]) -> None:
        def once(index: str, _: list[str]) -> list[str]:
            body(index)
            return []

        self.k.loop(stop, [], once, start=start, step=step)

    def _tiles(self, start: Index, stop: Index) -> None:
        """All rows by one block."""
        k, tile = self.k, self.p.tile

        def whole(row: Index) -> None:
            self._tile(row, tile, start, stop)

        full = k.mul(k.div(self.rows, tile), tile)
        self._loop(0, full, tile, whole)
        if not isinstance(self.rows, int):
            self._loop(full, self.rows, 1, lambda row: self._tile(row, 1, start, stop))
        elif self.rows % tile:
            self._tile(full, self.rows % tile, start, stop)

    def _tile(self, row: Index, count: int, start: Index, stop: Index) -> None:
        """Some rows by one block."""
        k, p = self.k, self.p
        if self.copy is not None:
            lanes = math.gcd(math.gcd(p.depth, p.block), p.lanes)
            for i in range(count):

                def move(at: Index, i: int = i) -> None:
                    value = k.load(self.a, [k.add(row, i), at], lanes if lanes > 1 else 0)
                    k.store(value, str(self.copy), [i, k.sub(at, start)])

                self._loop(start, stop, lanes, move)
        self._panels(row, count, start, stop)

    def _panels(self, row: Index, count: int, start: Index, stop: Index) -> None:
        """Some rows by one block of each panel."""
        self._loop(self.first, self.end, 1, lambda panel: self._product(panel, row, count, start, stop))

    def _product(self, panel: Index, row: Index, count: int, start: Index, stop: Index) -> None:
        k, p = self.k, self.p
        sets = max(1, min(p.unroll, 4 // count))  # sums side by side: one multiply-add takes as long as several

        def step(at: Index, sums: list[str]) -> list[str]:
            for u in range(p.unroll):
                depth = k.add(at, u)
                weights = [k.load(self.b, [panel, depth, v * p.lanes], p.lanes) for v in range(VECTORS)]
                base = (u % sets) * count * VECTORS
                for i in range(count):
                    value = k.splat(self._activation(row, i, depth, start), p.lanes)
                    for v, weight in enumerate(weights):
                        place = base + i * VECTORS + v
                        sums[place] = k.fma(value, weight, sums[place])
            return sums

        half = count * VECTORS
        zero = k.constant(0.0, vector_type(p.lanes))
        initial = [zero] * half
        if p.block != p.depth and not p.is_small:
            initial = k.when(
                k.less(0, start),
                [vector_type(p.lanes)] * half,
                lambda: [k.load(self.y, place, p.lanes) for place in self._places(panel, row, count)],
                lambda: [zero] * half,
            )
        initial = [*initial, *[zero] * ((sets - 1) * half)]
        sums = k.loop(stop, initial, step, start=start, step=p.unroll)
        totals = sums[:half]
        for first in range(half, len(sums), half):
            totals = [k.addf(a, b) for a, b in zip(totals, sums[first : first + half], strict=True)]
        self._store(panel, row, count, totals)

    def _activation(self, row: Index, i: int, depth: Index, start: Index) -> str:
        if self.copy is not None:
            return self.k.load(self.copy, [i, self.k.sub(depth, start)])
        return self.k.load(self.a, [self.k.add(row, i), depth])

    def _places(self, panel: Index, row: Index, count: int) -> list[list[Index]]:
        k, p = self.k, self.p
        column = k.mul(panel, p.width)
        return [[k.add(row, i), k.add(column, v * p.lanes)] for i in range(count) for v in range(VECTORS)]

    def _store(self, panel: Index, row: Index, count: int, totals: Sequence[str]) -> None:
        k, p = self.k, self.p
        left = p.columns % p.width

        def all_lanes() -> list[str]:
            for place, total in zip(self._places(panel, row, count), totals, strict=True):
                k.store(total, self.y, place)
            return []

        def some_lanes() -> list[str]:
            for index, (place, total) in enumerate(zip(self._places(panel, row, count), totals, strict=True)):
                inside = left - index % VECTORS * p.lanes
                if inside >= p.lanes:
                    k.store(total, self.y, place)
                    continue
                for lane in range(max(inside, 0)):
                    k.store(k.extract(total, lane), self.y, [place[0], k.add(place[1], lane)])
            return []

        if left:
            k.when(k.less(panel, p.panels - 1), [], all_lanes, some_lanes)
        else:
            all_lanes()
