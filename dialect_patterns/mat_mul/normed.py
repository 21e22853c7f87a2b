"""Products of one row with the RMS norm before them as one kernel: nodes that the frontend makes of a graph's.

    linattn.NormedMatMul(x, gamma, [skip,] b_1, ..., b_n) -> (n b_1, ..., n b_n[, sum])        n = rms_norm(sum) * gamma
                                                             (silu(n b_1) * (n b_2)[, sum])    sum = x + skip

A decode step's norms are kernels that do next to nothing. Every workgroup of the product reads the whole row anyway:
it adds up its squares beside, and divides the sums of the products. Rounding: everything in f32, the norm is not
rounded; results once, at the end.

Legal: where ``fused_simt`` is what each product gets, for one row, on GPUs with subgroup operations.
Source: ONNX schema RMSNormalization-23; ONNX Runtime 1.32, schema SkipSimplifiedLayerNormalization-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..node import Node, TensorSpec
from ..op import INTERNAL, Choice, LoweringContext, LoweringOptions, Op
from ..select import rows_text
from ..target import Target
from . import op
from .contract import MatMul
from .contract import output_types as product_types
from .fused_simt import emit_products
from .simt_products import Norm

NORMED = "NormedMatMul"
GATED, EPSILON = "gated", "epsilon"
"""Attributes: whether the products are a gated pair; of the norm."""
MOST_COLUMNS = 16_384
"""Beyond it every workgroup's own look at the row costs more than a dispatch: on an H100 f16 logits of 32,000 take 22.9
us by CUDA, and 23.7 with the norm, by Vulkan nearly half as long again."""
WITH_SKIP, WITH_SUM = "with_skip", "with_sum"
"""Attributes: whether there is a skip, whether the sum is one more output."""


@dataclass(frozen=True)
class NormedProducts:
    """Contract.

    Attributes:
        products: Each by itself, of the norm.
        gated: Whether the one product is silu(first) * second.
        epsilon: Of the norm.
        with_skip: Whether something is added before it.
        with_sum: Whether that sum is wanted.
    """

    products: tuple[MatMul, ...]
    gated: bool
    epsilon: float
    with_skip: bool
    with_sum: bool


def can_join(products: Sequence[MatMul], results: int, target: Target, options: LoweringOptions) -> bool:
    """Whether a norm may be part of the kernel of products.

    Args:
        products: The products of the norm's result.
        results: What they give, and the sum if it is wanted.
        target: The machine.
        options: What the user asked of the lowering.
    """
    if sum(product.columns for product in products) > MOST_COLUMNS:
        return False
    if not target.is_gpu or not target.subgroup_size or 3 + len(products) + results > target.limits.bindings:
        return False
    return all(
        product.rows == 1 and op.choose(product, target, options).strategy == "fused_simt" for product in products
    )


def parse(node: Node) -> NormedProducts:
    """View the node; what it was made of has been checked."""
    with_skip = bool(node.attr(WITH_SKIP, 0))
    x, first = node.required(0, "x"), 3 if with_skip else 2
    given = [node.required(index, "operand") for index in range(len(node.inputs))]
    products = [MatMul(node.where, x, b, index + first in node.weights) for index, b in enumerate(given[first:])]
    epsilon, with_sum = node.attr(EPSILON, 0.0), bool(node.attr(WITH_SUM, 0))
    return NormedProducts(tuple(products), bool(node.attr(GATED, 0)), epsilon, with_skip, with_sum)


def output_types(contract: NormedProducts) -> Sequence[TensorSpec | None]:
    """The outputs' types."""
    types = [spec for product in contract.products for spec in product_types(product)]
    return [*(types[:1] if contract.gated else types), *([contract.products[0].a] if contract.with_sum else [])]


def choose(contract: NormedProducts, target: Target, options: LoweringOptions) -> Choice:
    """There is one way."""
    del target, options
    count = len(contract.products)
    what = "a gated pair" if contract.gated else "a product" if count == 1 else f"{count} products"
    return Choice(
        "fused_simt", f"the norm of {rows_text(1)} and {what} of it in one kernel that reads each weight once"
    )


def lower(context: LoweringContext, contract: NormedProducts, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Emit the node."""
    x, gamma, *rest = [value for value in operands if value is not None]
    skip = rest.pop(0) if contract.with_skip else None
    norm = Norm(gamma, skip, contract.epsilon, contract.with_sum)
    return emit_products(context, contract.products, x, rest, contract.gated, norm)


OPS = (Op(INTERNAL, NORMED, 1, parse, output_types, lower, choose),)
