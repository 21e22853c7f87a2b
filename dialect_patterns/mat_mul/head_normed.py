"""A product of one row with the gated norm by heads before it as one kernel: a node that the frontend makes.

    linattn.HeadNormedMatMul(x, scale, gate, b) -> y = (rms_norm(x, by heads) * scale * activation(gate)) b

What comes after LinearAttention in a step, see ``head_norm``. Rounding: everything in f32, the norm is not rounded.

Legal: where ``fused_simt`` is what the product gets, for one row, on GPUs whose subgroups are inside of a head.
Source: ONNX Runtime 1.32, schema GatedRMSNorm-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..node import Node, TensorSpec
from ..op import INTERNAL, Choice, LoweringContext, LoweringOptions, Op
from ..target import Target
from . import op
from .contract import MatMul
from .contract import output_types as product_types
from .fused_simt import emit_products, plan_for
from .head_norm import HeadNorm, fits_subgroups

HEAD_NORMED = "HeadNormedMatMul"
EPSILON, MULTIPLIES = "epsilon", "multiplies_gate"
"""Attributes, as of GatedRMSNorm."""
_MATRIX = 3


@dataclass(frozen=True)
class HeadNormedProduct:
    """Contract.

    Attributes:
        product: Of the norm.
        size: Elements of a head.
        epsilon: Added to the mean square.
        multiplies_gate: Whether the activation is silu rather than sigmoid.
    """

    product: MatMul
    size: int
    epsilon: float
    multiplies_gate: bool


def can_join(product: MatMul, size: int, target: Target, options: LoweringOptions) -> bool:
    """Whether a gated norm by heads may be part of the kernel of a product."""
    if not target.is_gpu or product.rows != 1 or op.choose(product, target, options).strategy != "fused_simt":
        return False
    plan = plan_for(product, target)
    return target.limits.bindings > _MATRIX + 1 and fits_subgroups(size, plan.lanes, plan.subgroup)


def parse(node: Node) -> HeadNormedProduct:
    """View the node; what it was made of has been checked."""
    x, scale, _, b = (node.required(index, "operand") for index in range(_MATRIX + 1))
    product = MatMul(node.where, x, b, _MATRIX in node.weights)
    return HeadNormedProduct(product, scale.shape[0] or 0, node.attr(EPSILON, 0.0), bool(node.attr(MULTIPLIES, 0)))


def output_types(contract: HeadNormedProduct) -> Sequence[TensorSpec | None]:
    """The output's type."""
    return product_types(contract.product)


def choose(contract: HeadNormedProduct, target: Target, options: LoweringOptions) -> Choice:
    """There is one way."""
    del contract, target, options
    return Choice("fused_simt", "the gated norm of 1 row and a product of it in one kernel that reads each weight once")


def lower(context: LoweringContext, contract: HeadNormedProduct, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Emit the node."""
    x, scale, gate, b = (value for value in operands if value is not None)
    norm = HeadNorm(scale, gate, contract.size, contract.epsilon, contract.multiplies_gate)
    return emit_products(context, [contract.product], x, [b], False, norm)


OPS = (Op(INTERNAL, HEAD_NORMED, 1, parse, output_types, lower, choose),)
