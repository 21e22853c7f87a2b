"""LpNormalization (ai.onnx 1, 22): x / norm(x) along one axis, with p = 1 or 2; rows of zeros stay zeros.

IREE's importer has it too, but sums in the tensor's type and divides zero by zero.
Source: ONNX operator schema LpNormalization-22.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..checks import float_input, only_attributes
from ..emit.builder import LETTERS
from ..emit.scalar import Scalar
from ..node import Node, TensorSpec
from ..op import LoweringContext, Op


@dataclass(frozen=True)
class LpNormalization:
    """Contract.

    Attributes:
        x: Of f32, f16 or bf16.
        axis: The dimension normalised, not negative.
        p: 1 for the sum of absolute values, 2 for the Euclidean norm.
    """

    x: TensorSpec
    axis: int
    p: int


def parse(node: Node) -> LpNormalization:
    """Check the node; see the contract."""
    only_attributes(node, "axis", "p")
    x = float_input(node, 0, "input")
    axis, p = node.attr("axis", -1), node.attr("p", 2)
    if not -x.rank <= axis < x.rank:
        raise node.error("attribute 'axis'", got=axis, expected=f"{-x.rank} to {x.rank - 1}")
    if p not in (1, 2):
        raise node.error("attribute 'p'", got=p, expected="1 or 2")
    return LpNormalization(x, axis % x.rank, p)


def output_types(contract: LpNormalization) -> Sequence[TensorSpec]:
    """The outputs' types."""
    return [contract.x]


def lower(context: LoweringContext, contract: LpNormalization, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """One reduction and one elementwise loop."""
    b = context.builder
    (x,) = operands
    assert x is not None
    letters = LETTERS[: contract.x.rank]
    rows = letters[: contract.axis] + letters[contract.axis + 1 :]

    def add(total: Scalar, value: Scalar) -> Scalar:
        value = value.to("f32")
        return total + (value.abs() if contract.p == 1 else value * value)

    def invert(total: Scalar) -> Scalar:
        inverse = 1.0 / total if contract.p == 1 else total.rsqrt()
        return total.equals(0.0).select(b.constant(0.0, "f32"), inverse)

    def scale(value: Scalar, inverse: Scalar) -> Scalar:
        return value.to("f32") * inverse

    inverse = b.map(f"{rows}->{rows}", invert, b.reduce(f"{letters}->{rows}", add, x, initial=0.0))
    return [b.map(f"{letters},{rows}->{letters}", scale, x, inverse)]


OPS = (Op("", "LpNormalization", 1, parse, output_types, lower),)
