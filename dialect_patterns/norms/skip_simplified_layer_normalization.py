"""SkipSimplifiedLayerNormalization (com.microsoft): the RMS norm of input + skip (+ bias), and that sum.

The sum is normalised before it is rounded to the tensors' type, as ONNX Runtime does. Outputs 1 and 2 (mean and
inverse deviation) are for training; ONNX Runtime does not fill them either, so they may be listed but not used.
Source: ONNX Runtime 1.32, schema SkipSimplifiedLayerNormalization-1 and contrib_ops/cpu/skip_layer_norm.cc.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..checks import float_input, is_wanted, only_attributes, refuse_outputs, require_dtype, require_shape
from ..emit.builder import Builder, spec_of
from ..emit.scalar import Scalar
from ..node import Node, TensorSpec
from ..op import MICROSOFT, LoweringContext, Op
from ..select import Yes
from . import rms_simd, rms_simt
from .rms_normalization import emit_inverse_rms, emit_scaled

_MEAN, _INVERSE, _SUM = 1, 2, 3


@dataclass(frozen=True)
class SkipSimplifiedLayerNormalization:
    """Contract.

    Attributes:
        x: [B, T, N] or [tokens, N]; the last dimension is normalised.
        epsilon: Added to the mean square.
        outputs: How many outputs the node lists, 1 to 4.
        with_sum: Whether output 3 (input + skip + bias) is wanted.
    """

    x: TensorSpec
    epsilon: float
    outputs: int
    with_sum: bool


def parse(node: Node) -> SkipSimplifiedLayerNormalization:
    """Check the node; see the contract."""
    only_attributes(node, "epsilon")
    x = float_input(node, 0, "input")
    skip = float_input(node, 1, "skip")
    gamma = float_input(node, 2, "gamma")
    bias = node.input(3)
    if x.rank not in (2, 3):
        raise node.error("input 'input'", got=x, expected="2 or 3 dimensions")
    size = x.shape[-1] if x.shape[-1] is not None else gamma.shape[-1]
    shapes = [x.shape] if x.rank == 2 else [x.shape, (1, *x.shape[1:]), x.shape[1:]]
    require_shape(node, "skip", skip, *shapes)
    require_shape(node, "gamma", gamma, (size,))
    for name, spec in (("skip", skip), ("gamma", gamma), ("bias", bias)):
        if spec is not None:
            require_dtype(node, name, spec, x.dtype)
    if bias is not None:
        require_shape(node, "bias", bias, (size,))
    refuse_outputs(node, (_MEAN, "mean"), (_INVERSE, "inv_std_var"))
    return SkipSimplifiedLayerNormalization(x, node.attr("epsilon", 1e-12), node.num_outputs, is_wanted(node, _SUM))


def output_types(contract: SkipSimplifiedLayerNormalization) -> Sequence[TensorSpec | None]:
    """The outputs' types."""
    total = contract.x if contract.with_sum else None
    return [contract.x, None, None, total][: contract.outputs]


def emit_skip_sum(b: Builder, x: ir.Value, skip: ir.Value, bias: ir.Value | None) -> ir.Value:
    """``x`` [..., N] + ``skip`` (leading dimensions missing or one) + ``bias`` [N], f32."""
    letters = "abc"[: spec_of(x).rank]
    shape = spec_of(skip).shape
    sizes = zip(letters[len(letters) - len(shape) :], shape, strict=True)
    # Only the batch broadcasts; a size of one elsewhere is the input's own.
    term = "".join("1" if size == 1 and letter == "a" and len(letters) == 3 else letter for letter, size in sizes)

    def add(*values: Scalar) -> Scalar:
        total = values[0].to("f32")
        for value in values[1:]:
            total = total + value.to("f32")
        return total

    if bias is None:
        return b.map(f"{letters},{term}->{letters}", add, x, skip, dtype="f32")
    return b.map(f"{letters},{term},{letters[-1]}->{letters}", add, x, skip, bias, dtype="f32")


def lower(
    context: LoweringContext, contract: SkipSimplifiedLayerNormalization, operands: Sequence[ir.Value | None]
) -> list[ir.Value | None]:
    """One kernel where there is one; else the sum, one reduction and one elementwise loop."""
    b = context.builder
    x, skip, gamma = operands[:3]
    assert x is not None
    assert skip is not None
    assert gamma is not None
    bias = operands[3] if len(operands) > 3 else None
    if isinstance(rms_simt.is_legal(x, skip, context.target), Yes):
        found = rms_simt.emit_rms_fused_simt(
            b, context.target, x, skip, gamma, bias, contract.epsilon, with_sum=contract.with_sum
        )
        return [found[0], None, None, found[1] if contract.with_sum else None][: contract.outputs]
    same = None not in contract.x.shape and spec_of(skip) == spec_of(x) == contract.x
    if same and isinstance(rms_simd.is_legal(contract.x.shape[-1], context.target), Yes):
        dtype, wanted = contract.x.dtype, contract.with_sum
        norm = rms_simd.Norm(
            contract.x.shape[-1] or 0, dtype, dtype, contract.epsilon, with_skip=True, with_bias=bias is not None,
            with_sum=wanted,
        )  # fmt: skip
        found = rms_simd.emit_rms_fused_simd(context, norm, [x, skip, *([bias] if bias is not None else []), gamma])
        return [found[0], None, None, found[1] if wanted else None][: contract.outputs]
    total = emit_skip_sum(b, x, skip, bias)
    inverse = emit_inverse_rms(b, total, contract.x.rank - 1, contract.epsilon)
    y = emit_scaled(b, total, inverse, gamma, contract.x.dtype)
    results = [y, None, None, b.cast(total, contract.x.dtype) if contract.with_sum else None]
    return results[: contract.outputs]


OPS = (Op(MICROSOFT, "SkipSimplifiedLayerNormalization", 1, parse, output_types, lower),)
