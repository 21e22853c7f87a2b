"""SimplifiedLayerNormalization: ONNX Runtime's unofficial RMS norm, x / sqrt(mean(x^2) + epsilon) * scale.

It is RMSNormalization with a second, optional output: the f32 reciprocal root mean square, with the normalised
dimensions kept as ones. ONNX Runtime registers it in ai.onnx although the standard does not have it.
Source: ONNX Runtime 1.32, schema SimplifiedLayerNormalization-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..checks import is_wanted
from ..node import Node, TensorSpec
from ..op import MICROSOFT, LoweringContext, Op
from .rms_normalization import RMSNormalization, emit_inverse_rms, emit_scaled
from .rms_normalization import parse as parse_rms_normalization


@dataclass(frozen=True)
class SimplifiedLayerNormalization:
    """Contract.

    Attributes:
        norm: What is normalised.
        outputs: How many outputs the node lists, 1 or 2.
        with_inverse: Whether the second one is wanted.
    """

    norm: RMSNormalization
    outputs: int
    with_inverse: bool


def parse(node: Node) -> SimplifiedLayerNormalization:
    """Check the node; see the contract."""
    return SimplifiedLayerNormalization(parse_rms_normalization(node), node.num_outputs, is_wanted(node, 1))


def output_types(contract: SimplifiedLayerNormalization) -> Sequence[TensorSpec | None]:
    """The outputs' types."""
    return [contract.norm.y, contract.norm.inverse if contract.with_inverse else None][: contract.outputs]


def lower(
    context: LoweringContext, contract: SimplifiedLayerNormalization, operands: Sequence[ir.Value | None]
) -> list[ir.Value | None]:
    """One reduction and one elementwise loop."""
    b, norm = context.builder, contract.norm
    x, scale = operands
    assert x is not None
    assert scale is not None
    inverse = emit_inverse_rms(b, x, norm.axis, norm.epsilon)
    results: list[ir.Value | None] = [emit_scaled(b, x, inverse, scale, norm.y.dtype), None]
    if contract.with_inverse:
        for axis in range(norm.axis, norm.x.rank):
            inverse = b.unsqueeze(inverse, axis)
        results[1] = inverse
    return results[: contract.outputs]


OPS = tuple(Op(domain, "SimplifiedLayerNormalization", 1, parse, output_types, lower) for domain in ("", MICROSOFT))
