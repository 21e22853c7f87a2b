"""The operator entry of MatMul: which strategy, and lowering with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from iree.compiler import ir

from ..op import IMPORTED, Choice, LoweringContext, LoweringOptions, Op
from ..select import Legality, Strategy, Yes, always, rows_text, select, wherever_legal
from ..target import Target
from . import fused_amx, fused_mma, fused_simd, fused_simt, fused_tiled, widened
from .contract import MatMul, output_types, parse


def _taken(how: str) -> Callable[[MatMul, Target, LoweringOptions], Legality]:
    """The preference of a strategy that is taken wherever it is legal; its reason begins with the number of rows."""
    return wherever_legal(lambda contract: f"{rows_text(contract.rows)} {how}")


def _simd(contract: MatMul, target: Target, options: LoweringOptions) -> Legality:
    del options
    return Yes(fused_simd.describe(contract, target))


STRATEGIES = (
    Strategy("fused_amx", fused_amx.is_legal, _taken("on the CPU's matrix unit")),
    Strategy("fused_simd", fused_simd.is_legal, _simd),
    # 1.2 to 2 times as fast as IREE's kernels on CUDA, whose own do not load on Vulkan.
    Strategy("fused_mma", fused_mma.is_legal, _taken("on the matrix units")),
    Strategy(
        "fused_simt",
        fused_simt.is_legal,
        _taken("in one kernel that reads each weight once"),
    ),
    Strategy("fused_tiled", fused_tiled.is_legal, wherever_legal("f32 products of tiles; IREE's own do not compile")),
    Strategy("widened", widened.is_legal, wherever_legal("in f32; IREE's own do not compile")),
    Strategy(IMPORTED, always, wherever_legal("IREE's own")),
)

_EMITTERS = {
    "fused_amx": fused_amx.emit_mat_mul_fused_amx,
    "fused_simd": fused_simd.emit_mat_mul_fused_simd,
    "fused_mma": fused_mma.emit_mat_mul_fused_mma,
    "fused_simt": fused_simt.emit_mat_mul_fused_simt,
    "fused_tiled": fused_tiled.emit_mat_mul_fused_tiled,
    "widened": widened.emit_mat_mul_widened,
}


def choose(contract: MatMul, target: Target, options: LoweringOptions) -> Choice:
    """The strategy for a node; what is forced for the state operators says nothing here."""
    return select(STRATEGIES, contract, target, LoweringOptions(chunk_size=options.chunk_size), contract.where)


def lower(context: LoweringContext, contract: MatMul, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Emit the node with the chosen strategy."""
    a, b = operands
    assert a is not None
    assert b is not None
    emit = _EMITTERS[choose(contract, context.target, context.options).strategy]
    return [emit(context, contract, a, b)]


OPS = (Op("", "MatMul", 1, parse, output_types, lower, choose),)
