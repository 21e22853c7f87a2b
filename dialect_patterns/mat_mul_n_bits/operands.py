"""The operands of MatMulNBits in the shapes that all strategies take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..emit.builder import Builder, spec_of, tensor_type
from ..node import TensorSpec
from .contract import MatMulNBits


@dataclass(frozen=True)
class Operands:
    """Tensors.

    Attributes:
        a: [M, K].
        words: The packed weights as words, i32 [N, words of K].
        scales: [N, blocks].
        zeros: Zero points, packed i8 [N, bytes] or float [N, blocks]; None for the default one.
        bias: [N], or None.
    """

    a: ir.Value
    words: ir.Value
    scales: ir.Value
    zeros: ir.Value | None
    bias: ir.Value | None


def prepare(b: Builder, contract: MatMulNBits, operands: Sequence[ir.Value | None]) -> Operands:
    """The node's inputs; weights are only looked at in another way, not computed with."""
    c = contract
    a, packed, scales = operands[:3]
    assert a is not None
    assert packed is not None
    assert scales is not None
    a = b.refine(a, TensorSpec((*spec_of(a).shape[:-1], c.depth), c.a.dtype))
    rank = spec_of(a).rank
    a = b.collapse(a, 0, rank - 2) if rank > 1 else b.expand(a, 0, [1, c.depth])
    view = tensor_type((c.columns, c.row_words), "i32")
    no_dims = {"operandSegmentSizes": ir.DenseI32ArrayAttr.get([1, 0, 0])}
    words = ir.Operation.create("flow.tensor.bitcast", results=[view], operands=[packed], attributes=no_dims).result
    zeros = operands[3] if c.zero_points != "default" else None
    bias = operands[5] if c.with_bias else None
    return Operands(
        a=a,
        words=words,
        scales=_as_rows(b, scales, c.columns),
        zeros=None if zeros is None else _as_rows(b, zeros, c.columns),
        bias=bias,
    )


def _as_rows(b: Builder, value: ir.Value, rows: int) -> ir.Value:
    """[rows * n] or [rows, n] as [rows, n]."""
    return value if spec_of(value).rank == 2 else b.expand(value, 0, [rows, b.floordiv(b.dim(value, 0), rows)])
