"""Strategy ``fused_mma``: a product of f16 matrices on the matrix units, as one GPU kernel; see ``mma_kernel``.

Legal: f16 on GPUs with such products, for static sizes, if 32 divides K and 8 divides N. Cost: a once a column of tiles
and b once a row of tiles, from the second-level cache mostly. Source: ONNX schema MatMul-13.
"""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir

from ..emit.builder import tensor_type
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Group, Kernel, dispatch
from ..op import LoweringContext
from ..select import Legality, No
from ..target import Target
from .contract import MatMul
from .mma_kernel import CHUNK, SIDE, Plan, Product, Size, is_possible, plan_for


def _size(contract: MatMul) -> Size:
    return Size(contract.rows, contract.depth, contract.columns)


def is_legal(contract: MatMul, target: Target) -> Legality:
    """Where subgroups multiply matrices, for f16."""
    if not contract.is_plain:
        return No(f"{contract.a} by {contract.b} is not rows times one matrix")
    return is_possible(_size(contract), contract.a.dtype, target, transposed=False, step=CHUNK)


def emit_mat_mul_fused_mma(context: LoweringContext, contract: MatMul, a: ir.Value, b: ir.Value) -> ir.Value:
    """Emit the product."""
    c, size = contract, _size(contract)
    plan = plan_for(size, context.target, transposed=False)
    assert c.rows is not None
    sizes = [size or 0 for size in c.a.shape[:-1]] + [c.columns]
    tiles, items = -(-c.columns // plan.columns), -(-c.rows // plan.rows)

    def body(k: Kernel) -> None:
        Product(k, size, plan, _Matrix(k, size, plan), 2).emit()

    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [(tensor_type(sizes, c.a.dtype), [])]
    name = f"mat_mul_fused_mma_f16_{c.rows}x{c.depth}x{c.columns}_{plan}"
    group, count = Group(plan.threads, plan.subgroup), context.builder.index(items)
    return dispatch(name, group, tiles, count, [], [a, b], outputs, body)[0]


class _Matrix:
    """The right factor as a matrix [K, N] of f16, buffer 1.

    Args:
        k: Emits instructions.
        size: Of the product.
        plan: How it is cut.
    """

    def __init__(self, k: Kernel, size: Size, plan: Plan) -> None:
        self.k, self.size, self.p = k, size, plan
        self.b = k.chunks(1, Scalar.constant(size.depth * size.columns // CHUNK, "index"))

    def start(self, product: Product) -> None:
        """Emit what comes before the loop."""
        self.tile = self.k.shared_chunks(self.p.chunks_b)
        self.places = product.places(self.p.depth, self.p.columns // CHUNK)

    def load(self, step: Scalar) -> list[ir.Value]:
        """Load this thread's part of a tile."""
        k, p, across = self.k, self.p, self.size.columns // CHUNK
        loads: list[ir.Value] = []
        for row, chunk in self.places:
            column = (k.tile() * (p.columns // CHUNK) + chunk).minimum(across - 1)
            loads.append(k.load(self.b, (step * p.depth + row) * across + column))
        return loads

    def put(self, loaded: Sequence[ir.Value], step: Scalar) -> None:
        """Write that part to the workgroup's memory."""
        del step
        for (row, chunk), value in zip(self.places, loaded, strict=True):
            self.k.store_as_is(value, self.tile, row * self.p.stride_b + chunk)

    def matrix(self, depth: int, across: Scalar) -> ir.Value:
        """A matrix of the tile in memory."""
        start = across * (SIDE // CHUNK) + depth * SIDE * self.p.stride_b
        return self.k.matrix_load("BOp", self.tile, start, self.p.stride_b * CHUNK // self.p.unit[0])

    def finish(self, sums: ir.Value, column: Scalar) -> ir.Value:
        """The sums are the result."""
        del column
        return sums
