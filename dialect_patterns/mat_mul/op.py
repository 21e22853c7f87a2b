"""The operator entry of MatMul: which strategy, and lowering with it."""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir

from ..op import IMPORTED, Choice, LoweringContext, LoweringOptions, Op
from ..select import Legality, Strategy, Yes, select
from ..target import Target
from . import fused_mma, fused_simd, fused_simt
from .contract import MatMul, output_types, parse


def _fused_simd_is_preferred(contract: MatMul, target: Target, options: LoweringOptions) -> Legality:
    """Wherever it is legal."""
    del target, options
    return Yes(f"{contract.rows} rows by packed weights in one kernel")


def _fused_mma_is_preferred(contract: MatMul, target: Target, options: LoweringOptions) -> Legality:
    """Wherever it is legal: 1.2 to 2 times as fast as IREE's kernels on CUDA, whose own do not load on Vulkan."""
    del target, options
    return Yes(f"{contract.rows} rows on the matrix units")


def _fused_simt_is_preferred(contract: MatMul, target: Target, options: LoweringOptions) -> Legality:
    """Wherever it is legal."""
    del target, options
    return Yes(f"{contract.rows} rows in one kernel that reads each weight once")


def _always(contract: MatMul, target: Target) -> Legality:
    del contract, target
    return Yes()


def _imported_is_preferred(contract: MatMul, target: Target, options: LoweringOptions) -> Legality:
    """What is left."""
    del contract, target, options
    return Yes("IREE's own")


STRATEGIES = (
    Strategy("fused_simd", fused_simd.is_legal, _fused_simd_is_preferred),
    Strategy("fused_mma", fused_mma.is_legal, _fused_mma_is_preferred),
    Strategy("fused_simt", fused_simt.is_legal, _fused_simt_is_preferred),
    Strategy(IMPORTED, _always, _imported_is_preferred),
)


def choose(contract: MatMul, target: Target, options: LoweringOptions) -> Choice:
    """The strategy for a node; what is forced for the state operators says nothing here."""
    return select(STRATEGIES, contract, target, LoweringOptions(chunk_size=options.chunk_size), contract.where)


def lower(context: LoweringContext, contract: MatMul, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Emit the node with the chosen strategy."""
    a, b = operands
    assert a is not None
    assert b is not None
    strategy = choose(contract, context.target, context.options).strategy
    if strategy == "fused_simd":
        return [fused_simd.emit_mat_mul_fused_simd(context, contract, a, b)]
    if strategy == "fused_mma":
        return [fused_mma.emit_mat_mul_fused_mma(context, contract, a, b)]
    return [fused_simt.emit_mat_mul_fused_simt(context, contract, a, b)]


OPS = (Op("", "MatMul", 1, parse, output_types, lower, choose),)
