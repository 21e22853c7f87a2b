"""RMSNormalization (ai.onnx 23): x / sqrt(mean(x^2) + epsilon) * scale, computed in f32 and rounded once.

The mean is over the dimensions from ``axis`` on. The other RMS norms of this folder share the two ``emit`` functions.
Source: ONNX operator schema RMSNormalization-23.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..checks import float_input, only_attributes
from ..emit.builder import LETTERS, Builder, Size, spec_of
from ..emit.scalar import Scalar
from ..node import Node, TensorSpec
from ..op import LoweringContext, Op

_STASH_F32 = 1


@dataclass(frozen=True)
class RMSNormalization:
    """Contract.

    Attributes:
        x: [..., N] of f32, f16 or bf16; the dimensions from ``axis`` on are normalised.
        scale: Broadcasts to the shape of ``x``; the result has its element type.
        axis: First normalised dimension, not negative.
        epsilon: Added to the mean square.
    """

    x: TensorSpec
    scale: TensorSpec
    axis: int
    epsilon: float

    @property
    def y(self) -> TensorSpec:
        """The result's type."""
        return TensorSpec(self.x.shape, self.scale.dtype)

    @property
    def inverse(self) -> TensorSpec:
        """The type of 1 / sqrt(mean(x^2) + epsilon), for operators that return it."""
        return TensorSpec(self.x.shape[: self.axis] + (1,) * (self.x.rank - self.axis), "f32")


def parse(node: Node) -> RMSNormalization:
    """Check the node; see the contract."""
    only_attributes(node, "axis", "epsilon", "stash_type")
    x = float_input(node, 0, "X")
    scale = float_input(node, 1, "scale")
    axis = node.attr("axis", -1)
    if not -x.rank <= axis < x.rank:
        raise node.error("attribute 'axis'", got=axis, expected=f"{-x.rank} to {x.rank - 1}")
    if node.attr("stash_type", _STASH_F32) != _STASH_F32:
        raise node.error("attribute 'stash_type'", got=node.attributes["stash_type"], expected="1 (sums in f32)")
    axis %= x.rank
    if None in scale.shape or scale.rank > x.rank:
        raise node.error("input 'scale'", got=scale, expected=f"static dimensions, at most {x.rank}")
    for size, want in zip(reversed(scale.shape), reversed(x.shape), strict=False):
        if size != 1 and want is not None and size != want:
            raise node.error("input 'scale' does not broadcast to 'X'", got=scale, expected=f"the shape of {x}")
    return RMSNormalization(x, scale, axis, node.attr("epsilon", 1e-5))


def output_types(contract: RMSNormalization) -> Sequence[TensorSpec]:
    """The outputs' types."""
    return [contract.y]


def emit_inverse_rms(b: Builder, x: ir.Value, axis: int, epsilon: float) -> ir.Value:
    """1 / sqrt(mean(x^2) + epsilon) over the dimensions from ``axis`` on, f32 [the dimensions before ``axis``]."""
    rank = spec_of(x).rank
    letters, rows = LETTERS[:rank], LETTERS[:axis]
    count: Size = 1
    for dim in range(axis, rank):
        count = b.mul(count, b.dim(x, dim))

    def add_square(total: Scalar, value: Scalar) -> Scalar:
        return total + value.to("f32") * value.to("f32")

    def invert(total: Scalar) -> Scalar:
        size = float(count) if isinstance(count, int) else Scalar(count).to("f32")
        return (total / size + epsilon).rsqrt()

    return b.map(f"{rows}->{rows}", invert, b.reduce(f"{letters}->{rows}", add_square, x, initial=0.0))


def emit_scaled(b: Builder, x: ir.Value, inverse: ir.Value, scale: ir.Value, dtype: str) -> ir.Value:
    """``x`` [..., N] times ``inverse`` [leading dimensions] times ``scale`` [trailing dimensions], in ``dtype``."""
    rank = spec_of(x).rank
    letters, rows = LETTERS[:rank], LETTERS[: spec_of(inverse).rank]
    sizes = spec_of(scale).shape
    trailing = "".join(
        "1" if size == 1 else letter for size, letter in zip(sizes, letters[rank - len(sizes) :], strict=True)
    )

    def scaled(value: Scalar, factor: Scalar, weight: Scalar) -> Scalar:
        return value.to("f32") * factor * weight.to("f32")

    return b.map(f"{letters},{rows},{trailing}->{letters}", scaled, x, inverse, scale, dtype=dtype)


def lower(context: LoweringContext, contract: RMSNormalization, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """One reduction and one elementwise loop."""
    b = context.builder
    x, scale = operands
    assert x is not None
    assert scale is not None
    inverse = emit_inverse_rms(b, x, contract.axis, contract.epsilon)
    return [emit_scaled(b, x, inverse, scale, contract.y.dtype)]


OPS = (Op("", "RMSNormalization", 23, parse, output_types, lower),)
