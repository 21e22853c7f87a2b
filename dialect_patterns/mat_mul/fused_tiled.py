"""Strategy ``fused_tiled``: many rows times a matrix of bf16 as one GPU kernel, without matrix units.

    hal.executable.source @mat_mul_fused_tiled_... {
      the tiles of ``tiled_product.py``; a thread brings 4 x 4 weights of neighbouring columns, turned in registers
    }

IREE 3.13 makes no legal SPIR-V of products in bf16 that it reads or writes in vectors, which is all whose sizes are
round ("failed to legalize operation 'vector.bitcast'"); it has no such trouble where the GPU has units for them (CUDA).

Legal: on GPUs without matrix units of IREE's own, for bf16, if 4 divides N and 16 divides K; any number of rows, open
ones too. Cost: all multiply-adds in f32.
"""

from __future__ import annotations

from iree.compiler import ir

from ..emit.builder import Size, tensor_type
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer, Group, Kernel, dispatch
from ..emit.tiled_product import CHUNKS, DEPTH, STRIDE, VECTOR, TiledProduct, places, plan_for
from ..op import LoweringContext
from ..select import Legality, No, OtherMachine, Yes
from ..target import Target
from .contract import MatMul


def is_legal(contract: MatMul, target: Target) -> Legality:
    """Where IREE's own products do not compile."""
    if not target.is_gpu:
        return OtherMachine(f"{target.name} is not a GPU")
    if not contract.is_plain:
        return No(f"{contract.a} by {contract.b} is not rows times one matrix")
    if contract.a.dtype != "bf16" or target.matrix_units:
        return No(f"IREE's own are faster for {contract.a.dtype} on {target.name}")
    if contract.columns % VECTOR or contract.depth % DEPTH or not contract.depth or not contract.columns:
        return No(f"K={contract.depth} or N={contract.columns} is not a multiple of {DEPTH} or {VECTOR}")
    return Yes()


def emit_mat_mul_fused_tiled(context: LoweringContext, contract: MatMul, a: ir.Value, b: ir.Value) -> ir.Value:
    """Emit the product."""
    c, builder, plan = contract, context.builder, plan_for(contract.rows, contract.columns)
    lead = [builder.dim(a, axis) for axis in range(c.a.rank - 1)]
    rows: Size = 1
    for size in lead:
        rows = builder.mul(rows, size)

    def body(k: Kernel) -> None:
        count = k.number(0)
        rows_of_a = k.buffer(0, c.a.dtype, count * (c.depth // VECTOR), VECTOR)
        weights = k.buffer(1, c.b.dtype, Scalar.constant(c.depth * c.columns // VECTOR, "index"), VECTOR)
        y = k.buffer(2, c.a.dtype, count * (c.columns // VECTOR), VECTOR)
        product = TiledProduct(k, plan, rows_of_a, y, count, c.depth, c.columns)
        product.emit(_PlainTile(product, weights, c.columns))

    open_sizes = [size for size in lead if not isinstance(size, int)]
    result = tensor_type([size if isinstance(size, int) else None for size in (*lead, c.columns)], c.a.dtype)
    name = f"mat_mul_fused_tiled_{c.a.dtype}_nx{c.depth}x{c.columns}_{plan}"
    items = builder.index(builder.floordiv(builder.add(rows, plan.rows - 1), plan.rows))
    group, tiles = Group(plan.threads, context.target.subgroup_size), -(-c.columns // plan.columns)
    return dispatch(name, group, tiles, items, [builder.index(rows)], [a, b], [(result, open_sizes)], body)[0]


class _PlainTile:
    """See :class:`WeightsTile`.

    Args:
        product: Whose tile.
        weights: [K, N] in vectors along N.
        columns: N.
    """

    def __init__(self, product: TiledProduct, weights: Buffer, columns: int) -> None:
        self.k, self.p, self._product, self._weights = product.k, product.p, product, weights
        self._vectors, self._across = columns // VECTOR, self.p.columns // VECTOR
        self._places = places(product.thread, self._across * CHUNKS, self._across, self.p.threads)
        first = self.k.tile() * self._across
        self._columns = [(first + place).minimum(self._vectors - 1) for _, place in self._places]

    def load(self, step: Scalar) -> list[ir.Value]:
        """Four weights of each of four rows, for each place."""
        return [
            self.k.load(self._weights, ((step * CHUNKS + chunk) * VECTOR + row) * self._vectors + column)
            for column, (chunk, _) in zip(self._columns, self._places, strict=True)
            for row in range(VECTOR)
        ]

    def put(self, loads: list[ir.Value], step: Scalar) -> None:
        """Write them, column by column."""
        del step
        k, p = self.k, self.p

        def write() -> None:
            for i, (chunk, place) in enumerate(self._places):
                rows = [k.elements(k.widen(self._weights, load)) for load in loads[i * VECTOR : (i + 1) * VECTOR]]
                for j, column in enumerate(zip(*rows, strict=True)):
                    across, part = (place * VECTOR + j).divide_unsigned(p.wide)
                    slot = part * (p.columns // p.wide) + across
                    k.store(k.join(list(column)), self._product.tile_b, slot * STRIDE + chunk)

        if self._across * CHUNKS < p.threads:
            k.when(self._product.thread < self._across * CHUNKS, write)
        else:
            write()

    def bias(self, column: Scalar) -> ir.Value | None:
        """There is none."""
        del column
        return None
