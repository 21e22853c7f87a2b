"""Products of one left operand as one kernel: nodes that the frontend makes of a graph's MatMul nodes.

    linattn.JoinedMatMul(a, b_1, ..., b_n) -> (a b_1, ..., a b_n)
    linattn.GatedMatMul(a, b, c) -> silu(a b) * (a c)

A decode step is many small products, and each dispatch costs beside its work: microseconds on a GPU and of CPU workers,
half a one of a CPU thread by itself. Weights stay as they are, since other entry points read them one by one. Rounding:
sums in f32, rounded once, at the end.

Legal: where ``fused_simt`` is what every one of the products gets, or ``fused_mma``, or ``fused_simd`` with few rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..node import Node, TensorSpec
from ..op import INTERNAL, Choice, LoweringContext, LoweringOptions, Op
from ..select import rows_text
from ..target import Target
from . import fused_mma, fused_simt, op, simd_joined
from .contract import MatMul
from .contract import output_types as product_types

JOINED, GATED = "JoinedMatMul", "GatedMatMul"
_MOST = 8
_EMITTERS = {
    "fused_simt": fused_simt.emit_products,
    "fused_mma": fused_mma.emit_products,
    "fused_simd": simd_joined.emit_products,
}


@dataclass(frozen=True)
class Products:
    """Contract.

    Attributes:
        products: Each by itself; they share ``a``.
        gated: Whether the one output is silu(first) * second.
    """

    products: tuple[MatMul, ...]
    gated: bool


def most_products(target: Target) -> int:
    """Products of a kernel: beside ``a``, each reads a buffer and writes one, and drivers take only so many."""
    return min(_MOST, (target.limits.bindings - 1) // 2)


def joining(product: MatMul, target: Target, options: LoweringOptions) -> str:
    """The strategy of the kernels that a product may be part of, none if it may not."""
    strategy = op.choose(product, target, options).strategy
    direct = strategy == "fused_simd" and simd_joined.is_direct([product], target)
    return strategy if strategy in _EMITTERS and (direct or strategy != "fused_simd") else ""


def can_join(products: Sequence[MatMul], gated: bool, target: Target, options: LoweringOptions) -> bool:
    """Whether products that share their left operand may be one kernel."""
    equal = len({product.columns for product in products}) == 1
    kinds = {joining(product, target, options) for product in products}
    alike = len(kinds) == 1 and "" not in kinds
    if kinds == {"fused_mma"} and not fused_mma.can_join(products, gated, target):
        return False
    return alike and 2 <= len(products) <= most_products(target) and (equal or not gated)


def parse(node: Node) -> Products:
    """View the node."""
    a = node.required(0, "a")
    products = [MatMul(node.where, a, node.required(i, "b"), i in node.weights) for i in range(1, len(node.inputs))]
    return Products(tuple(products), node.op_type == GATED)


def output_types(contract: Products) -> Sequence[TensorSpec | None]:
    """The outputs' types."""
    types = [spec for product in contract.products for spec in product_types(product)]
    return types[:1] if contract.gated else types


def choose(contract: Products, target: Target, options: LoweringOptions) -> Choice:
    """There is one way."""
    what = "a gated pair" if contract.gated else f"{len(contract.products)} products"
    rows = rows_text(contract.products[0].rows)
    strategy = joining(contract.products[0], target, options)
    how = "on the matrix units" if strategy == "fused_mma" else "that reads each weight once"
    return Choice(strategy, f"{what} of {rows} in one kernel {how}")


def lower(context: LoweringContext, contract: Products, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Emit the node."""
    a, *weights = [value for value in operands if value is not None]
    emit = _EMITTERS[choose(contract, context.target, context.options).strategy]
    return emit(context, contract.products, a, weights, contract.gated)


OPS = tuple(Op(INTERNAL, name, 1, parse, output_types, lower, choose) for name in (JOINED, GATED))
