"""Products of one left operand by packed weights as one kernel: nodes that the frontend makes of MatMulNBits nodes.

    linattn.JoinedMatMulNBits(A, [gamma, [skip,]] [scale, gate,] B_1, scales_1, [zero_points_1,] [bias_1,] ...)
        -> (A B_1, ..., [sum]), or where gated silu(A B_1) * (A B_2)

With gamma it is the RMS norm of A (+ skip) that is multiplied, as in ``mat_mul.normed``: its division comes after the
products, and does not change which whole numbers the blocks of A are rounded to but for the last bit. With scale and
gate it is GatedRMSNorm's result.

Legal: where ``fused_simt`` is what each product gets, for one row, if they are alike but for their columns; a norm on
GPUs with subgroup operations, of whole blocks. Source: ONNX Runtime 1.32, schema MatMulNBits-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from iree.compiler import ir

from ..mat_mul.head_norm import HeadNorm
from ..mat_mul.normed import MOST_COLUMNS
from ..mat_mul.simt_products import Norm
from ..node import Node, TensorSpec
from ..op import INTERNAL, MICROSOFT, Choice, LoweringContext, LoweringOptions, Op
from ..select import rows_text
from ..target import Target
from . import op
from .contract import MatMulNBits
from .contract import output_types as product_types
from .contract import parse as parse_product
from .fused_simt import emit_products, plan_for
from .operands import prepare
from .simt_products import rounds_itself

JOINED_N_BITS = "JoinedMatMulNBits"
COLUMNS, WITH_ZEROS, WITH_BIAS = "columns", "with_zeros", "with_bias"
"""Attributes: N of each product; whether each has zero points, a bias. Further ones are those of MatMulNBits."""
GATED, EPSILON, WITH_NORM, WITH_SKIP, WITH_SUM = "gated", "epsilon", "with_norm", "with_skip", "with_sum"
HEAD, MULTIPLIES = "head", "multiplies_gate"
"""Attributes, as of ``mat_mul.normed``; a head's elements where it is a gated norm by heads."""
_NODE_INPUTS = 6
_ZEROS, _BIAS = 3, 5
_MOST = 8
_T = TypeVar("_T")


@dataclass(frozen=True)
class NBitsProducts:
    """Contract.

    Attributes:
        products: Each by itself.
        gated: Whether the one product is silu(first) * second.
        with_norm: Whether the norm of A is multiplied.
        with_skip: Whether something is added before it.
        with_sum: Whether that sum is wanted.
        epsilon: Of the norm.
        head: Elements of a head, where instead the gated norm of A by heads is multiplied; 0: it is not.
        multiplies_gate: As of GatedRMSNorm.
    """

    products: tuple[MatMulNBits, ...]
    gated: bool = False
    with_norm: bool = False
    with_skip: bool = False
    with_sum: bool = False
    epsilon: float = 0.0
    head: int = 0
    multiplies_gate: bool = False

    @property
    def before(self) -> int:
        """Inputs between A and the weights."""
        return 2 if self.head else self.with_norm + self.with_skip

    @property
    def per_product(self) -> int:
        """Inputs of each product beside A."""
        c = self.products[0]
        return 2 + (c.zero_points != "default") + c.with_bias


def can_join(contract: NBitsProducts, target: Target, options: LoweringOptions) -> bool:
    """Whether there is such a kernel."""
    c, products = contract.products[0], contract.products
    results = (1 if contract.gated else len(products)) + contract.with_sum
    buffers = 1 + contract.before + len(products) * contract.per_product + results
    if not target.is_gpu or c.rows != 1 or len(products) > _MOST or buffers > target.limits.bindings:
        return False
    if any(op.choose(product, target, options).strategy != "fused_simt" for product in products):
        return False
    if any(replace(product, where=c.where, columns=c.columns) != c for product in products):
        return False
    if contract.gated and [product.columns for product in products] != [c.columns] * 2:
        return False
    return not (contract.with_norm or contract.head) or _takes_norm(contract, target)


def _takes_norm(contract: NBitsProducts, target: Target) -> bool:
    """Whether the kernel of the products adds up squares too."""
    plan = plan_for(max(contract.products, key=lambda product: product.columns), target)
    c = contract.products[0]
    if sum(product.columns for product in contract.products) > MOST_COLUMNS:
        return False
    whole = c.depth % c.block_size == 0 and c.row_words % plan.across == 0
    words = contract.head // c.per_word
    inside = words & (words - 1) == 0 and words <= plan.shuffled and contract.head % c.per_word == 0
    return plan.subgroup > 0 and whole and inside and (rounds_itself(c, plan) or not c.rounds_a)


def parse(node: Node) -> NBitsProducts:
    """View the node; what it was made of has been checked."""
    given = [node.input(index) for index in range(len(node.inputs))]
    zeros, bias, columns = node.attr(WITH_ZEROS, 0), node.attr(WITH_BIAS, 0), node.attr(COLUMNS, list[int]())
    with_norm, with_skip, with_sum = (bool(node.attr(name, 0)) for name in (WITH_NORM, WITH_SKIP, WITH_SUM))
    common = {name: node.attributes[name] for name in ("K", "bits", "block_size", "accuracy_level")}
    head = node.attr(HEAD, 0)
    start, products = 1 + (2 if head else with_norm + with_skip), list[MatMulNBits]()
    for count in columns:
        specs = _apart(given[start:], bool(zeros), bool(bias))
        start += 2 + zeros + bias
        own = {**common, "N": count}
        products.append(parse_product(replace(node, domain=MICROSOFT, inputs=(given[0], *specs), attributes=own)))
    gated, epsilon = bool(node.attr(GATED, 0)), node.attr(EPSILON, 0.0)
    multiplies = bool(node.attr(MULTIPLIES, 0))
    return NBitsProducts(tuple(products), gated, with_norm, with_skip, with_sum, epsilon, head, multiplies)


def _apart(given: Sequence[_T | None], zeros: bool, bias: bool) -> list[_T | None]:
    """The inputs behind A of a MatMulNBits node, of those that follow."""
    found: list[_T | None] = [None] * (_NODE_INPUTS - 1)
    found[:2] = given[:2]
    if zeros:
        found[_ZEROS - 1] = given[2]
    if bias:
        found[_BIAS - 1] = given[2 + zeros]
    return found


def output_types(contract: NBitsProducts) -> Sequence[TensorSpec | None]:
    """The outputs' types."""
    types = [spec for product in contract.products for spec in product_types(product)]
    return [*(types[:1] if contract.gated else types), *([contract.products[0].a] if contract.with_sum else [])]


def choose(contract: NBitsProducts, target: Target, options: LoweringOptions) -> Choice:
    """There is one way."""
    del target, options
    count = len(contract.products)
    what = "a gated pair" if contract.gated else "a product" if count == 1 else f"{count} products"
    rounded = ", A rounded on the way" if contract.products[0].rounds_a else ""
    norm = "the gated norm" if contract.head else "the norm" if contract.with_norm else ""
    what = f"{norm} of {rows_text(1)} and {what} of it" if norm else f"{what} of {rows_text(1)}"
    return Choice("fused_simt", f"{what} in one kernel that reads each weight once{rounded}")


def lower(context: LoweringContext, contract: NBitsProducts, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Emit the node."""
    b, c = context.builder, contract
    a, *rest = [value for value in operands if value is not None]
    leading = b.shape(a)[:-1]
    norm = None
    if c.with_norm:
        gamma, skip = rest.pop(0), rest.pop(0) if c.with_skip else None
        norm = Norm(gamma, skip, c.epsilon, c.with_sum)
    elif c.head:
        norm = HeadNorm(rest.pop(0), rest.pop(0), c.head, c.epsilon, c.multiplies_gate)
    size, first = c.per_product, c.products[0]
    apart = [
        prepare(b, product, [a, *_apart(rest[i * size :], first.zero_points != "default", first.with_bias)])
        for i, product in enumerate(c.products)
    ]
    results = emit_products(context, c.products, apart, gated=c.gated, norm=norm)
    return [b.expand(y, 0, leading) for y in results]


OPS = (Op(INTERNAL, JOINED_N_BITS, 1, parse, output_types, lower, choose),)
