"""The body of strategy ``fused_simd`` for many rows: a chunk of tiles of rows by a group of panels.

    for each panel:  for each block of K:           weights: f32 and pairs, where they are; else widened to the stack
      for each tile of rows:  acc[r, :] += a[r, k] * b[k, :]        R x 2 vectors in registers

A block of a panel stays in the first-level cache while the tiles stream past it; sums wait on the stack for the next
block. The weights of the next block are asked for meanwhile: read from memory in the first tile only, they would stop
the products for longer than the other tiles of 64 rows take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..emit.kernel_text import Index, KernelText, vector_type
from .simd_edges import each, store_rows, workgroup_range
from .simd_pairs import multiply_add, widened
from .simd_plan import LINE, Plan


class TiledBody:
    """Writes the body.

    Args:
        k: Where to.
        p: Its sizes.
        rows: M.
        memrefs: The rows as ``simd_rows`` arranges them, the weights [panels, K, W], and y [M, N].
        before: Panels of other matrices in front of this one's.
    """

    def __init__(self, k: KernelText, p: Plan, rows: Index, memrefs: Sequence[str], before: Index = 0) -> None:
        self.k, self.p, self.rows, self.before = k, p, rows, before
        self.a, self.b, self.y = memrefs
        self.sums = k.alloca([p.chunk * p.tile, p.width]) if p.block < p.depth else ""
        self.stack = self._stack()
        self.vector = vector_type(p.lanes)
        self.first, self.count = self._tiles()
        self.panel, self.panels = workgroup_range(self.k, "0", p.group, p.panels)

    def _tiles(self) -> tuple[Index, Index]:
        """First and number of this workgroup's tiles."""
        k, p = self.k, self.p
        tiles = p.tiles if p.tiles is not None else k.div(k.add(self.rows, p.tile - 1), p.tile)
        return workgroup_range(self.k, "1", p.chunk, tiles)

    def _stack(self) -> str:
        """Memref for a block of weights as they are multiplied, none where that is as they lie."""
        k, p = self.k, self.p
        narrow = p.widened or k.element_bytes(self.b) < 4
        return k.alloca([p.block * p.parts, p.width]) if narrow else ""

    def write(self) -> None:
        """The whole body."""
        k, p = self.k, self.p
        whole = p.depth // p.block * p.block

        def panel(index: Index) -> None:
            at = k.add(self.panel, index)
            each(self.k, whole, p.block, lambda start: self._block(at, start, p.block))
            if p.depth > whole:
                self._block(at, whole, p.depth - whole)

        each(self.k, self.panels, 1, panel)

    def _block(self, panel: Index, start: Index, size: int) -> None:
        """All tiles by one block of one panel."""
        if self.stack:
            self._put_on_stack(panel, start, size)
        each(self.k, self.count, 1, lambda tile: self._tile(panel, start, size, tile))

    def _put_on_stack(self, panel: Index, start: Index, size: int) -> None:
        """The weights of a block, widened."""
        k, p, places = self.k, self.p, self._places(panel)

        def widen(row: Index) -> None:
            for v, (stored, column) in enumerate(places):
                vector = k.load(self.b, [stored, k.add(start, row), column], p.lanes)
                for part, value in enumerate(widened(k, vector) if p.widened else [vector]):
                    k.store(value, self.stack, [k.add(k.mul(row, p.parts), part), v * p.lanes])

        each(k, size, 1, widen)

    def _tile(self, panel: Index, start: Index, size: int, tile: Index) -> None:
        k, p = self.k, self.p
        waiting = [[k.add(k.mul(tile, p.tile), i), v * p.lanes] for i in range(p.tile) for v in range(p.vectors)]
        zero = k.constant(0.0, self.vector)
        initial = [zero] * len(waiting)
        if self.sums and start != 0:
            initial = k.when(
                k.less(0, start),
                [self.vector] * len(waiting),
                lambda: [k.load(self.sums, place, p.lanes) for place in waiting],
                lambda: initial,
            )
        place = k.add(self.first, tile)
        sums = self._products(panel, start, size, tile, place, initial)

        def keep() -> list[str]:
            for value, at in zip(sums, waiting, strict=True):
                k.store(value, self.sums, at)
            return []

        def finish() -> list[str]:
            self._store(place, panel, sums)
            return []

        stop = k.add(start, size)
        if isinstance(stop, int):
            (finish if stop == p.depth else keep)()
        elif p.depth % p.block:
            keep()
        else:
            k.when(k.less(stop, p.depth), [], keep, finish)

    def _store(self, tile: Index, panel: Index, sums: Sequence[str]) -> None:
        """The vectors of a finished tile by a panel."""
        store_rows(self.k, self.p, self.y, self.rows, self.k.mul(tile, self.p.tile), panel, sums)

    def _products(
        self, panel: Index, start: Index, size: int, tile: Index, place: Index, initial: Sequence[str]
    ) -> list[str]:
        """``initial`` and the products of one tile by one block."""
        k, p = self.k, self.p
        line = self._next_lines(size, tile)
        places, stored = self._places(panel), k.add(self.before, panel)
        streams = [p.layout.place(k, p.width, stored, column)[0] for column in p.layout.starts(p.width)]
        lines = range(0, p.layout.width, LINE // k.element_bytes(self.b))

        def step(at: Index, sums: list[str]) -> list[str]:
            for offset in line(at):
                for stream, column in ((stream, column) for stream in streams for column in lines):
                    k.prefetch(self.b, [stream, k.add(start, k.add(size, offset)), column])
            self._multiply(places, start, at, place, sums)
            return sums

        return k.loop(size + -size % p.unroll, initial, step, step=p.unroll)

    def _multiply(
        self, places: Sequence[tuple[Index, Index]], start: Index, at: Index, place: Index, sums: list[str]
    ) -> None:
        """Add the products of an iteration.

        Args:
            places: Where the panel's vectors lie in the weights.
            start: First row of the weights in the block.
            at: First row of the iteration, counted from there.
            place: The tile.
            sums: Replaced by what they become.
        """
        k, p = self.k, self.p
        for u in range(p.unroll * p.parts):
            depth = k.add(k.mul(at, p.parts), u)
            weights = [self._weight(places[v], start, depth, v) for v in range(p.vectors)]
            elements = k.mul(k.add(k.mul(start, p.parts), depth), p.tile)
            for i in range(p.tile):
                value = k.splat(k.load(self.a, [place, k.add(elements, i)]), p.lanes)
                for v, weight in enumerate(weights):
                    sums[i * p.vectors + v] = multiply_add(k, value, weight, sums[i * p.vectors + v])

    def _places(self, panel: Index) -> list[tuple[Index, Index]]:
        """Where the vectors of a panel lie in the weights."""
        p, stored = self.p, self.k.add(self.before, panel)
        return [p.layout.place(self.k, p.width, stored, v * p.lanes) for v in range(p.vectors)]

    def _weight(self, place: tuple[Index, Index], start: Index, depth: Index, v: int) -> str:
        if self.stack:
            return self.k.load(self.stack, [depth, v * self.p.lanes], self.p.lanes)
        return self.k.load(self.b, [place[0], self.k.add(start, depth), place[1]], self.p.lanes)

    def _next_lines(self, size: int, tile: Index) -> Callable[[Index], list[Index]]:
        """Which rows of the next block an iteration asks for, so that all tiles together ask for all, once a line."""
        k, p = self.k, self.p
        rows = max(1, LINE // (p.layout.width * k.element_bytes(self.b)))  # of the weights in a line
        steps = -(-size // p.unroll)
        each = -(-size // (rows * p.chunk))  # of a tile
        if each <= steps:
            every = steps // each  # iterations for a line

            def one(at: Index) -> list[Index]:
                line = k.add(k.mul(tile, each), k.div(at, every * p.unroll))
                return [k.mul(line, rows)]

            return one
        many = -(-each // steps)

        def several(at: Index) -> list[Index]:
            line = k.add(k.mul(tile, each), k.mul(k.div(at, p.unroll), many))
            return [k.mul(k.add(line, i), rows) for i in range(many)]

        return several
