"""The products of ``simd_tiled`` for quantised weights: unpacked tile by tile, met by the rows of their expert."""

from __future__ import annotations

from collections.abc import Sequence

from ..emit.dispatch import Kernel
from ..emit.kernel_text import Index, KernelText
from ..mat_mul_n_bits.contract import MatMulNBits
from ..mat_mul_n_bits.simd_plan import Plan
from ..mat_mul_n_bits.simd_tiled import TiledBody
from ..node import TensorSpec
from ..target import Target
from .contract import Experts
from .simd_bits import plan_of, product, weight_specs
from .simd_layers import Layer
from .simd_routing import dimension, load_number, most_tiles


def product_kernel(c: Experts, layer: Layer, target: Target, scales: str) -> Kernel:
    """[tiles, tile, columns] of one layer; columns are those of all its parts."""
    n, p, weights = product(layer, None), plan_of(layer, target, None), weight_specs(layer, scales)
    tiles = most_tiles(c, p.rows)

    def write(k: KernelText, batch: Index, tokens: Index, memrefs: Sequence[str]) -> None:
        del batch, tokens
        a, *stored, spans, y = memrefs
        expert = k.op("hal.interface.workgroup.id[1] : index", "index")
        all_tiles = dimension(k, y)
        first = load_number(k, spans, [expert, 0], all_tiles)
        count = load_number(k, spans, [expert, 1], k.add(k.sub(all_tiles, first), 1))
        rows, out = (_as_rows(k, memref, p.rows, size) for memref, size in ((a, n.depth), (y, n.columns)))
        span = (k.mul(first, p.rows), k.mul(count, p.rows))
        _ExpertRows(k, n, p, [rows, *stored, out], k.mul(expert, n.columns), span).write()

    shape = f"{'x' if c.rows is None else c.rows}_{c.chosen}of{c.count}"
    return Kernel(
        name=f"experts_product_{layer.matrix.key}{scales}_{shape}_{n.columns}x{n.depth}_t{p.rows}_v{32 * p.lanes}",
        inputs=(TensorSpec((tiles, p.rows, n.depth), "f32"), *weights, TensorSpec((c.count, 2), "i32")),
        outputs=(TensorSpec((tiles, p.rows, n.columns), "f32"),),
        axes=("R__", *("__" for _ in weights), "__", "R__"),
        workgroups=(-(-n.columns // p.workgroup_columns), 1),
        write=write,
    )


def _as_rows(k: KernelText, memref: str, tile: int, size: int) -> str:
    """[tiles, tile, n] as [rows, n]."""
    tiles = k.types[memref].removeprefix("memref<").split("x", 1)[0]
    rows = "?" if tiles == "?" else str(int(tiles) * tile)
    dtype = f"memref<{rows}x{size}x{k.element_type(memref)}>"
    return k.op(f"memref.collapse_shape {memref} [[0, 1], [2]] : {k.types[memref]} into {dtype}", dtype)


class _ExpertRows(TiledBody):
    """The body for one expert."""

    def __init__(
        self, k: KernelText, c: MatMulNBits, p: Plan, memrefs: Sequence[str], before: Index, span: tuple[Index, Index]
    ) -> None:
        self.span = span
        super().__init__(k, c, p, span[1], memrefs, before)

    def _rows_of_workgroup(self) -> tuple[Index, Index]:
        return self.span

    def write(self) -> None:
        """The whole body, for as many rows at a time as have their sums on the stack."""
        k, p = self.k, self.p
        first, count = self.span
        self.total = k.add(first, count)

        def block(start: str, _: list[str]) -> list[str]:
            self.first = k.add(first, start)
            self.count = k.minimum(k.sub(count, start), p.row_block)
            super(_ExpertRows, self).write()
            return []

        k.loop(count, [], block, step=p.row_block)
