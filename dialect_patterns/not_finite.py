"""NotFinite (of our own): how many elements of parts of a tensor are NaN or infinite, by their bits.

    linattn.NotFinite(x [a, ..., z] of floats; kept = k) -> [first k axes] i32

``x - x`` and ``x != x`` would say it too, but drivers take it that there are no such numbers: Mesa makes zeros of the
first. The frontend asks states with it (``frontend.graph.finite_check``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir
from iree.compiler.dialects import arith

from .checks import float_input, only_attributes
from .emit.builder import LETTERS
from .emit.scalar import Scalar
from .node import Node, TensorSpec
from .op import INTERNAL, LoweringContext, Op

NOT_FINITE = "NotFinite"
_EXPONENT = 0x7F80_0000
"""The bits of f32 that are all ones where a number is not finite."""


@dataclass(frozen=True)
class NotFinite:
    """Contract.

    Attributes:
        x: Of f32, f16 or bf16.
        kept: Leading axes that the result has.
    """

    x: TensorSpec
    kept: int


def parse(node: Node) -> NotFinite:
    """Check the node; see the contract."""
    only_attributes(node, "kept")
    x, kept = float_input(node, 0, "input"), node.attr("kept", 1)
    if not 0 < kept < x.rank:
        raise node.error("attribute 'kept'", got=kept, expected=f"1 to {x.rank - 1}")
    return NotFinite(x, kept)


def output_types(contract: NotFinite) -> Sequence[TensorSpec]:
    """The counts."""
    return [TensorSpec(contract.x.shape[: contract.kept], "i32")]


def lower(context: LoweringContext, contract: NotFinite, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """One reduction."""
    (x,) = operands
    assert x is not None
    letters = LETTERS[: contract.x.rank]

    def count(found: Scalar, value: Scalar) -> Scalar:
        bits = Scalar(arith.BitcastOp(ir.IntegerType.get_signless(32), value.to("f32").value).result)
        is_wrong = (bits & _EXPONENT).equals(_EXPONENT)
        return found + is_wrong.select(Scalar.constant(1, "i32"), Scalar.constant(0, "i32"))

    counts = context.builder.reduce(f"{letters}->{letters[: contract.kept]}", count, x, initial=0, dtype="i32")
    return [counts]


OPS = (Op(INTERNAL, NOT_FINITE, 1, parse, output_types, lower),)
