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
from .mma_copies import CopiedProduct
from .mma_kernel import Extent, Product
from .mma_plan import CHUNK, SIDE, VECTOR, Plan, Size, fits, is_possible, plan_for


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


def can_join(products: Sequence[MatMul], gated: bool, target: Target) -> bool:
    """Whether products of one left operand, each of them legal, fit as one kernel."""
    size = Size(products[0].rows, products[0].depth, sum(product.columns for product in products))
    return fits(plan_for(size, target, transposed=False, gated=gated), target)


def emit_mat_mul_fused_mma(context: LoweringContext, contract: MatMul, a: ir.Value, b: ir.Value) -> ir.Value:
    """Emit the product."""
    return emit_products(context, [contract], a, [b], False)[0]


def emit_products(
    context: LoweringContext, products: Sequence[MatMul], a: ir.Value, weights: Sequence[ir.Value], gated: bool
) -> list[ir.Value]:
    """Emit products of one ``a`` as one kernel.

    Args:
        context: Where, and for what.
        products: What each computes; all legal.
        a: Their left operand.
        weights: The right operand of each.
        gated: Whether there are two, of equal columns, and the one result is silu(first) * second.
    """
    c, columns = products[0], [product.columns for product in products]
    assert c.rows is not None
    rows, results = c.rows, columns[:1] if gated else columns
    plan = plan_for(Size(rows, c.depth, sum(columns)), context.target, transposed=False, gated=gated)

    def body(k: Kernel) -> None:
        counts = tuple(k.number(2 + i) for i in range(len(results)))
        extent = Extent(k.number(0), k.number(1).divide_unsigned(CHUNK)[0], counts)
        kind = CopiedProduct if plan.copies else Product
        kind(k, extent, plan, _Matrices(k, extent, plan), 1 + len(weights)).emit()

    lead, index = [size or 0 for size in c.a.shape[:-1]], context.builder.index
    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [
        (tensor_type([*lead, count], c.a.dtype), []) for count in results
    ]
    joined = f"_{len(results)}of" if len(results) > 1 else ""
    name, group = f"mat_mul_fused_mma_f16_{plan}{joined}", Group(plan.threads, plan.subgroup)
    numbers = [index(number) for number in (rows, c.depth, *results)]
    return dispatch(name, group, 1, index(plan.workgroups(rows, results)), numbers, [a, *weights], outputs, body)


class _Matrices:
    """The right factors as matrices [K, N] of f16, buffers 1 and on; of a gated pair half a tile each.

    Args:
        k: Emits instructions.
        size: Of the products.
        plan: How they are cut.
    """

    def __init__(self, k: Kernel, size: Extent, plan: Plan) -> None:
        self.k, self.p = k, plan
        columns = size.columns * 2 if plan.gated else size.columns
        self.across = [count.divide_unsigned(CHUNK)[0] for count in columns]
        self.b = [k.chunks(1 + i, size.depth * count) for i, count in enumerate(columns)]

    def start(self, product: Product) -> None:
        """Emit what comes before the loop."""
        self.memory, self.product = product.memory, product
        self.places = product.places(self.p.depth, self.p.width // CHUNK)
        self.first = product.tile * (self.p.width // CHUNK)

    def _chunks(self, step: Scalar, which: int) -> list[tuple[Scalar, Scalar]]:
        """Where each of this thread's chunks lies in a buffer and in the tile."""
        found: list[tuple[Scalar, Scalar]] = []
        half = which * (self.p.width // CHUNK) if self.p.gated else 0
        for row, chunk in self.places:
            column = (self.first + chunk).minimum(self.across[which] - 1)
            at = (step * self.p.depth + row) * self.across[which] + column
            found.append((at, row * self.p.stride_b + (chunk + half)))
        return found

    def load(self, step: Scalar) -> list[ir.Value]:
        """Load this thread's part of a tile."""

        def of(which: int) -> list[ir.Value]:
            return [self.k.load(self.b[which], at) for at, _ in self._chunks(step, which)]

        if self.p.gated:
            return [*of(0), *of(1)]
        found = [self.k.constant(0.0, VECTOR)] * len(self.places)
        for which, part in enumerate(self.product.parts):
            if part.chosen is None:
                return of(which)
            kinds, before = [value.type for value in found], found
            found = self.k.choose(part.chosen, lambda which=which: of(which), lambda before=before: before, kinds)
        return found

    def put(self, loaded: Sequence[ir.Value], step: Scalar, tile: Scalar) -> None:
        """Write that part to the workgroup's memory."""
        spots = [place for which in range(2 if self.p.gated else 1) for _, place in self._chunks(step, which)]
        for place, value in zip(spots, loaded, strict=True):
            self.k.store_as_is(value, self.memory, tile + place)

    def copy(self, step: Scalar, tile: Scalar) -> None:
        """Begin to copy that part there."""

        def of(which: int) -> None:
            for at, place in self._chunks(step, which):
                self.k.copy_chunk(self.b[which], at, self.memory, tile + place)

        for which in range(len(self.b)):
            chosen = None if self.p.gated else self.product.parts[which].chosen
            if chosen is None:
                of(which)
            else:
                self.k.when(chosen, lambda which=which: of(which))

    def matrix(self, depth: Scalar, across: Scalar, term: int, tile: Scalar) -> ir.Value:
        """A matrix of the tile in memory."""
        del term
        start = across * (SIDE // CHUNK) + (tile + depth * SIDE * self.p.stride_b)
        return self.k.matrix_load("BOp", self.memory, start, self.p.stride_b * CHUNK // self.p.unit[0])

    def finish(self, sums: list[ir.Value], column: Scalar) -> ir.Value:
        """The sums are the result, or silu(gate) * up."""
        del column
        if not self.p.gated:
            return sums[0]
        k, (gate, up) = self.k, sums
        one = k.constant(1.0, VECTOR)
        return k.mul(k.div(gate, k.add(one, k.exp(k.neg(gate)))), up)
