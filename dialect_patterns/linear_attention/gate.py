"""LinearAttentionGate (com.microsoft): decay = decay_scale * softplus(a + dt_bias), beta = sigmoid(b), in f32.

Source: ONNX Runtime 1.32, schema LinearAttentionGate-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..checks import float_input, is_wanted, only_attributes, require_dtype, require_shape
from ..emit.builder import spec_of
from ..emit.scalar import Scalar
from ..node import Node, TensorSpec
from ..op import MICROSOFT, LoweringContext, Op


@dataclass(frozen=True)
class LinearAttentionGate:
    """Contract.

    Attributes:
        a: [B, T, H] of f32, f16 or bf16; decay and beta have its type.
        outputs: How many outputs the node lists, 1 or 2.
        with_beta: Whether the second one is wanted.
    """

    a: TensorSpec
    outputs: int
    with_beta: bool


def parse(node: Node) -> LinearAttentionGate:
    """Check the node; see the contract."""
    only_attributes(node)
    a = float_input(node, 0, "a")
    if a.rank != 3:
        raise node.error("input 'a'", got=a, expected="[B, T, H]")
    for index, name in ((1, "dt_bias"), (2, "decay_scale")):
        spec = node.required(index, name)
        require_dtype(node, name, spec, "f32")
        require_shape(node, name, spec, (a.shape[2],))
    b = node.input(3)
    if b is not None:
        require_dtype(node, "b", b, a.dtype)
        require_shape(node, "b", b, a.shape)
    elif is_wanted(node, 1):
        raise node.error("input 'b' is missing", hint="output 'beta' needs it")
    return LinearAttentionGate(a, node.num_outputs, is_wanted(node, 1))


def output_types(contract: LinearAttentionGate) -> Sequence[TensorSpec | None]:
    """The outputs' types."""
    return [contract.a, contract.a if contract.with_beta else None][: contract.outputs]


def lower(
    context: LoweringContext, contract: LinearAttentionGate, operands: Sequence[ir.Value | None]
) -> list[ir.Value | None]:
    """One elementwise loop, for both outputs."""
    builder = context.builder
    a, dt_bias, decay_scale = operands[:3]
    assert a is not None
    assert dt_bias is not None
    assert decay_scale is not None

    def decay(value: Scalar, bias: Scalar, scale: Scalar) -> Scalar:
        return scale * (value.to("f32") + bias).softplus()

    def sigmoid(value: Scalar) -> Scalar:
        return value.to("f32").sigmoid()

    if not contract.with_beta:
        return [builder.map("bth,h,h->bth", decay, a, dt_bias, decay_scale), None][: contract.outputs]
    b = operands[3]
    assert b is not None

    def both(value: Scalar, bias: Scalar, scale: Scalar, beta: Scalar) -> Sequence[Scalar]:
        return decay(value, bias, scale), sigmoid(beta)

    dtypes = [spec_of(one).dtype for one in (a, b)]
    return [*builder.map_several("bth,h,h,bth->bth", both, a, dt_bias, decay_scale, b, dtypes=dtypes)]


OPS = (Op(MICROSOFT, "LinearAttentionGate", 1, parse, output_types, lower),)
