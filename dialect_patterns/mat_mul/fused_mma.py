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
from ..select import Legality, No, OtherMachine
from ..target import Target
from .contract import MatMul
from .fused_simt import is_narrow
from .mma_kernel import CHUNK, SIDE, Extent, Plan, Product, Size, is_possible, plan_for, workgroups


def _size(contract: MatMul) -> Size:
    return Size(contract.rows, contract.depth, contract.columns)


def is_legal(contract: MatMul, target: Target) -> Legality:
    """Where subgroups multiply matrices, for f16."""
    if not contract.is_plain:
        return No(f"{contract.a} by {contract.b} is not rows times one matrix")
    if contract.a.dtype != "f16":
        return OtherMachine(f"{target.name} is not a GPU") if not target.is_gpu else No(f"{contract.a.dtype}, not f16")
    if is_narrow(contract):
        return No(f"{contract.columns} columns, which are faster one by one")
    return is_possible(_size(contract), target, transposed=False, step=CHUNK)


def emit_mat_mul_fused_mma(context: LoweringContext, contract: MatMul, a: ir.Value, b: ir.Value) -> ir.Value:
    """Emit the product."""
    c, size = contract, _size(contract)
    plan = plan_for(size, context.target, transposed=False)
    assert c.rows is not None
    sizes = [size or 0 for size in c.a.shape[:-1]] + [c.columns]
    index = context.builder.index

    def body(k: Kernel) -> None:
        extent = Extent(k.number(0), k.number(1).divide_unsigned(CHUNK)[0], k.number(2))
        Product(k, extent, plan, _Matrix(k, extent, plan), 2).emit()

    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [(tensor_type(sizes, c.a.dtype), [])]
    name, group = f"mat_mul_fused_mma_f16_{plan}", Group(plan.threads, plan.subgroup)
    numbers = [index(number) for number in (c.rows, c.depth, c.columns)]
    return dispatch(name, group, 1, index(workgroups(size, plan)), numbers, [a, b], outputs, body)[0]


class _Matrix:
    """The right factor as a matrix [K, N] of f16, buffer 1.

    Args:
        k: Emits instructions.
        size: Of the product.
        plan: How it is cut.
    """

    def __init__(self, k: Kernel, size: Extent, plan: Plan) -> None:
        self.k, self.p = k, plan
        self.across = size.columns.divide_unsigned(CHUNK)[0]
        self.b = k.chunks(1, size.depth * size.columns)

    def start(self, product: Product) -> None:
        """Emit what comes before the loop."""
        self.memory = product.memory
        self.places = product.places(self.p.depth, self.p.columns // CHUNK)
        self.first = product.tile * (self.p.columns // CHUNK)

    def _chunks(self, step: Scalar) -> list[tuple[Scalar, Scalar]]:
        """Where each of this thread's chunks lies in the buffer and in the tile."""
        found: list[tuple[Scalar, Scalar]] = []
        for row, chunk in self.places:
            column = (self.first + chunk).minimum(self.across - 1)
            at = (step * self.p.depth + row) * self.across + column
            found.append((at, row * self.p.stride_b + chunk))
        return found

    def load(self, step: Scalar) -> list[ir.Value]:
        """Load this thread's part of a tile."""
        return [self.k.load(self.b, at) for at, _ in self._chunks(step)]

    def put(self, loaded: Sequence[ir.Value], step: Scalar, tile: Scalar) -> None:
        """Write that part to the workgroup's memory."""
        for (_, place), value in zip(self._chunks(step), loaded, strict=True):
            self.k.store_as_is(value, self.memory, tile + place)

    def copy(self, step: Scalar, tile: Scalar) -> None:
        """Begin to copy that part there."""
        for at, place in self._chunks(step):
            self.k.copy_chunk(self.b, at, self.memory, tile + place)

    def matrix(self, depth: Scalar, across: Scalar, term: int, tile: Scalar) -> ir.Value:
        """A matrix of the tile in memory."""
        del term
        start = across * (SIDE // CHUNK) + (tile + depth * SIDE * self.p.stride_b)
        return self.k.matrix_load("BOp", self.memory, start, self.p.stride_b * CHUNK // self.p.unit[0])

    def finish(self, sums: ir.Value, column: Scalar) -> ir.Value:
        """The sums are the result."""
        del column
        return sums
