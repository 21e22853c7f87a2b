"""The products of strategy ``fused_simd`` for many tokens: all tiles of an expert by a group of its panels.

An expert that no token has chosen costs the start of its workgroups, and none of its weights are read.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..emit.dispatch import Kernel
from ..emit.kernel_text import Index, KernelText
from ..mat_mul.simd_plan import Plan
from ..mat_mul.simd_tiled import TiledBody
from ..node import TensorSpec
from .contract import Experts
from .simd_layers import Layer
from .simd_routing import dimension, load_number, most_tiles


def product_kernel(c: Experts, layer: Layer, p: Plan) -> Kernel:
    """[tiles, tile, columns] of one layer; columns are the panels of all its parts."""
    tiles = most_tiles(c, p.tile)

    def write(k: KernelText, batch: Index, tokens: Index, memrefs: Sequence[str]) -> None:
        del batch, tokens
        a, b, spans, y = memrefs
        expert = k.op("hal.interface.workgroup.id[1] : index", "index")
        before = k.mul(expert, layer.parts * layer.panels(p))
        all_tiles = dimension(k, y)
        first = load_number(k, spans, [expert, 0], all_tiles)
        count = load_number(k, spans, [expert, 1], k.add(k.sub(all_tiles, first), 1))
        _ExpertTiles(k, p, [a, b, y], before, (first, count)).write()

    kind = f"{layer.matrix.name}_{c.x.dtype}_{'x' if c.rows is None else c.rows}_{c.chosen}of{c.count}"
    return Kernel(
        name=f"experts_product_{kind}_{p.columns}x{p.depth}_t{p.tile}_v{32 * p.lanes}",
        inputs=(
            TensorSpec((tiles, p.tile * p.depth), "f32"),
            layer.packed(p.layout),
            TensorSpec((c.count, 2), "i32"),
        ),
        outputs=(TensorSpec((tiles, p.tile, p.columns), "f32"),),
        axes=("R_", "___", "__", "R__"),
        workgroups=(-(-p.panels // p.group), 1),
        write=write,
    )


class _ExpertTiles(TiledBody):
    """The body for one expert."""

    def __init__(
        self, k: KernelText, p: Plan, memrefs: Sequence[str], before: Index, span: tuple[Index, Index]
    ) -> None:
        self.span = span
        super().__init__(k, p, 0, memrefs, before)

    def _tiles(self) -> tuple[Index, Index]:
        return self.span

    def write(self) -> None:
        """The whole body, for as many tiles at a time as have their sums on the stack."""
        k, p = self.k, self.p
        first, count = self.span

        def chunk(start: str, _: list[str]) -> list[str]:
            self.first = k.add(first, start)
            self.count = k.minimum(k.sub(count, start), p.chunk)
            super(_ExpertTiles, self).write()
            return []

        k.loop(count, [], chunk, step=p.chunk)

    def _store(self, tile: Index, panel: Index, sums: Sequence[str]) -> None:
        k, p = self.k, self.p
        for i in range(p.tile):
            for v in range(p.vectors):
                column = k.add(k.mul(panel, p.width), v * p.lanes)
                k.store(sums[i * p.vectors + v], self.y, [tile, i, column])
