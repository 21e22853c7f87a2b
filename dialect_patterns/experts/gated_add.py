"""GatedAdd (com.microsoft): X + Y * gate, one gate a row; the product is rounded to the tensors' type first.

With ``gate_weight`` (which only CUDA kernels of ONNX Runtime have, in bf16) the gate is sigmoid(gate . gate_weight).
Source: ONNX Runtime 1.32, schema GatedAdd-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..checks import float_input, only_attributes, require_dtype, require_shape
from ..emit.builder import LETTERS
from ..emit.scalar import Scalar
from ..node import Node, TensorSpec
from ..op import MICROSOFT, LoweringContext, Op


@dataclass(frozen=True)
class GatedAdd:
    """Contract.

    Attributes:
        x: [..., C] of f32, f16 or bf16, the type of Y and of the output too.
    """

    x: TensorSpec


def parse(node: Node) -> GatedAdd:
    """Check the node; see the contract."""
    only_attributes(node)
    x, y, gate = float_input(node, 0, "X"), float_input(node, 1, "Y"), float_input(node, 2, "gate")
    if node.input(3) is not None:
        raise node.error("input 'gate_weight' is not supported", hint="export with the gate as MatMul and Sigmoid")
    if x.rank == 0:
        raise node.error("input 'X'", got=x, expected="at least one dimension")
    require_dtype(node, "Y", y, x.dtype)
    require_dtype(node, "gate", gate, x.dtype)
    require_shape(node, "Y", y, x.shape)
    require_shape(node, "gate", gate, (*x.shape[:-1], 1))
    return GatedAdd(x)


def output_types(contract: GatedAdd) -> Sequence[TensorSpec]:
    """The outputs' types."""
    return [contract.x]


def lower(context: LoweringContext, contract: GatedAdd, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """One elementwise loop."""
    x, y, gate = (value for value in operands[:3] if value is not None)
    dtype = contract.x.dtype

    def add(a: Scalar, b: Scalar, g: Scalar) -> Scalar:
        product = (b.to("f32") * g.to("f32")).to(dtype)
        return (a.to("f32") + product.to("f32")).to(dtype)

    letters = LETTERS[: contract.x.rank]
    return [context.builder.map(f"{letters},{letters},{letters[:-1]}1->{letters}", add, x, y, gate)]


OPS = (Op(MICROSOFT, "GatedAdd", 1, parse, output_types, lower),)
