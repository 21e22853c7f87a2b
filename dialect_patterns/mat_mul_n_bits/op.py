"""The operator entry of MatMulNBits: which strategy, and lowering with it."""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir

from ..op import MICROSOFT, Choice, LoweringContext, LoweringOptions, Op
from ..select import Legality, Strategy, Yes, select
from ..target import Target
from . import dequantised, fused_simd
from .contract import MatMulNBits, output_types, parse
from .operands import prepare


def _fused_simd_is_preferred(contract: MatMulNBits, target: Target, options: LoweringOptions) -> Legality:
    """Wherever it is legal."""
    del options
    return Yes(fused_simd.describe(contract, target))


def _dequantised_is_preferred(contract: MatMulNBits, target: Target, options: LoweringOptions) -> Legality:
    """What is left."""
    del target, options
    return Yes("one row from packed weights" if contract.rows == 1 else "weights dequantised to scratch")


STRATEGIES = (
    Strategy("fused_simd", fused_simd.is_legal, _fused_simd_is_preferred),
    Strategy("dequantised", dequantised.is_legal, _dequantised_is_preferred),
)


def choose(contract: MatMulNBits, target: Target, options: LoweringOptions) -> Choice:
    """The strategy for a node. What is forced on the state operators leaves this one alone, unless it is portable."""
    forced = options.strategy if options.strategy == "dequantised" else None
    return select(STRATEGIES, contract, target, LoweringOptions(forced), contract.where)


def lower(context: LoweringContext, contract: MatMulNBits, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Emit the node with the chosen strategy."""
    b = context.builder
    a = operands[0]
    assert a is not None
    leading = b.shape(a)[:-1]
    x = prepare(b, contract, operands)
    if choose(contract, context.target, context.options).strategy == "fused_simd":
        y = fused_simd.emit_mat_mul_n_bits_fused_simd(context, contract, x)
    else:
        y = dequantised.emit_mat_mul_n_bits_dequantised(context, contract, x)
    return [b.expand(y, 0, leading) if leading else b.collapse(y, 0, 1)]


OPS = (Op(MICROSOFT, "MatMulNBits", 1, parse, output_types, lower, choose),)
