"""GatedRMSNorm (com.microsoft): rms_norm(x) * scale * activation(gate), each head normalised by itself.

``x`` packs heads of C elements in its last dimension, C being the length of ``scale``. All arithmetic is in f32.
Source: ONNX Runtime 1.32, schema GatedRMSNorm-1.
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
from ..select import Yes
from . import rms_simd
from .rms_normalization import emit_inverse_rms

_ACTIVATIONS = ("silu", "swish", "sigmoid")


@dataclass(frozen=True)
class GatedRMSNorm:
    """Contract.

    Attributes:
        x: [..., H * C] of f32, f16 or bf16.
        group: C, the elements normalised together.
        epsilon: Added to the mean square.
        multiplies_gate: Whether the gate factor is z * sigmoid(z) (silu) rather than sigmoid(z).
    """

    x: TensorSpec
    group: int
    epsilon: float
    multiplies_gate: bool


def parse(node: Node) -> GatedRMSNorm:
    """Check the node; see the contract."""
    only_attributes(node, "activation", "epsilon")
    x = float_input(node, 0, "X")
    scale = float_input(node, 1, "scale")
    gate = float_input(node, 2, "gate")
    activation = node.attr("activation", "silu")
    if activation not in _ACTIVATIONS:
        raise node.error("attribute 'activation'", got=repr(activation), expected=" or ".join(_ACTIVATIONS))
    if x.rank == 0 or scale.rank != 1 or not scale.shape[0]:
        raise node.error("input 'scale'", got=scale, expected="one static dimension")
    group = scale.shape[0]
    if x.shape[-1] is not None and x.shape[-1] % group:
        raise node.error("the last dimension of input 'X'", got=x.shape[-1], expected=f"a multiple of {group}")
    require_shape(node, "gate", gate, x.shape)
    require_dtype(node, "scale", scale, x.dtype)
    require_dtype(node, "gate", gate, x.dtype)
    return GatedRMSNorm(x, group, node.attr("epsilon", 1e-5), activation != "sigmoid")


def output_types(contract: GatedRMSNorm) -> Sequence[TensorSpec]:
    """The outputs' types."""
    return [contract.x]


def lower(context: LoweringContext, contract: GatedRMSNorm, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """One kernel on CPUs that can; else one reduction and one elementwise loop over [..., H, C]."""
    b = context.builder
    x, scale, gate = operands
    assert x is not None
    assert scale is not None
    assert gate is not None
    axis = contract.x.rank - 1
    if axis and isinstance(rms_simd.is_legal(contract.group, context.target), Yes):
        dtype, kind = contract.x.dtype, "silu" if contract.multiplies_gate else "sigmoid"
        norm = rms_simd.Norm(contract.group, dtype, dtype, contract.epsilon, gate=kind)
        return rms_simd.emit_rms_fused_simd(context, norm, [x, gate, scale])
    split = [b.floordiv(b.dim(x, axis), contract.group), contract.group]
    x, gate = b.expand(x, axis, split), b.expand(gate, axis, split)
    inverse = emit_inverse_rms(b, x, axis + 1, contract.epsilon)

    def gated(value: Scalar, factor: Scalar, weight: Scalar, z: Scalar) -> Scalar:
        z = z.to("f32")
        return value.to("f32") * factor * weight.to("f32") * (z.silu() if contract.multiplies_gate else z.sigmoid())

    letters = LETTERS[: axis + 2]
    equation = f"{letters},{letters[:-1]},{letters[-1]},{letters}->{letters}"
    return [b.collapse(b.map(equation, gated, x, inverse, scale, gate), axis, axis + 1)]


OPS = (Op(MICROSOFT, "GatedRMSNorm", 1, parse, output_types, lower),)
