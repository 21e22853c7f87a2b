"""The operator entry of MatMulNBits: which strategy, and lowering with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from iree.compiler import ir

from ..op import MICROSOFT, Choice, LoweringContext, LoweringOptions, Op
from ..select import Legality, Strategy, Yes, select, wherever_legal
from ..target import Target
from . import dequantised, fused_amx, fused_amx_bf16, fused_mma, fused_simd, fused_simt, fused_tiled
from .contract import MatMulNBits, output_types, parse
from .operands import prepare


def _described(
    strategy: Callable[[MatMulNBits, Target], str],
) -> Callable[[MatMulNBits, Target, LoweringOptions], Legality]:
    """The preference of a strategy that is taken wherever it is legal, in the words of its ``describe``."""

    def preference(contract: MatMulNBits, target: Target, options: LoweringOptions) -> Legality:
        del options
        return Yes(strategy(contract, target))

    return preference


STRATEGIES = (
    Strategy("fused_amx_bf16", fused_amx_bf16.is_legal, _described(fused_amx_bf16.describe)),
    Strategy("fused_amx", fused_amx.is_legal, _described(fused_amx.describe)),
    Strategy("fused_simd", fused_simd.is_legal, _described(fused_simd.describe)),
    Strategy("fused_mma", fused_mma.is_legal, _described(fused_mma.describe)),
    Strategy("fused_simt", fused_simt.is_legal, _described(fused_simt.describe)),
    Strategy("fused_tiled", fused_tiled.is_legal, _described(fused_tiled.describe)),
    Strategy(
        "dequantised",
        dequantised.is_legal,
        wherever_legal(lambda c: "one row from packed weights" if c.rows == 1 else "weights dequantised to scratch"),
    ),
)

_EMITTERS = {
    "fused_amx_bf16": fused_amx_bf16.emit_mat_mul_n_bits_fused_amx_bf16,
    "fused_amx": fused_amx.emit_mat_mul_n_bits_fused_amx,
    "fused_simd": fused_simd.emit_mat_mul_n_bits_fused_simd,
    "fused_mma": fused_mma.emit_mat_mul_n_bits_fused_mma,
    "fused_simt": fused_simt.emit_mat_mul_n_bits_fused_simt,
    "fused_tiled": fused_tiled.emit_mat_mul_n_bits_fused_tiled,
    "dequantised": dequantised.emit_mat_mul_n_bits_dequantised,
}


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
    y = _EMITTERS[choose(contract, context.target, context.options).strategy](context, contract, x)
    return [b.expand(y, 0, leading) if leading else b.collapse(y, 0, 1)]


OPS = (Op(MICROSOFT, "MatMulNBits", 1, parse, output_types, lower, choose),)
