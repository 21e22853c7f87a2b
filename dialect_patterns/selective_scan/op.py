"""The operator entry of SelectiveScan: which strategy, and lowering with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from iree.compiler import ir

from ..op import INTERNAL, Choice, LoweringContext, LoweringOptions, Op
from ..select import Strategy, always, select, wherever_legal
from ..target import Target
from . import fused_simd, fused_simt
from .contract import SelectiveScan, output_types, parse
from .recurrent import emit_selective_scan_recurrent

SELECTIVE_SCAN = "SelectiveScan"

_PREFERRED = wherever_legal("one kernel for all tokens, the state in registers")
STRATEGIES = (
    Strategy("fused_simd", fused_simd.is_legal, _PREFERRED),
    Strategy("fused_simt", fused_simt.is_legal, _PREFERRED),
    Strategy("recurrent", always, wherever_legal("always possible")),
)


def choose(contract: SelectiveScan, target: Target, options: LoweringOptions) -> Choice:
    """The strategy for a node; a forced one that only LinearAttention has says nothing here.

    Raises:
        LoweringError: if a strategy is forced that is not legal.
    """
    if options.strategy not in {strategy.name for strategy in STRATEGIES}:
        options = replace(options, strategy=None)
    choice = select(STRATEGIES, contract, target, options, contract.where)
    return replace(choice, rule="gated", heads=f"{contract.channels} x {contract.states}")


def lower(
    context: LoweringContext, contract: SelectiveScan, operands: Sequence[ir.Value | None]
) -> list[ir.Value | None]:
    """Emit the node with the chosen strategy; one value an output of the node."""
    b, c = context.builder, contract
    given = [value for value in operands if value is not None]
    inputs = [b.refine(value, spec) for value, spec in zip(given, c.inputs, strict=True)]
    past = inputs.pop() if c.has_past else None
    strategy = choose(c, context.target, context.options).strategy
    emit = {
        "fused_simd": fused_simd.emit_selective_scan_fused_simd,
        "fused_simt": fused_simt.emit_selective_scan_fused_simt,
        "recurrent": emit_selective_scan_recurrent,
    }[strategy]
    results = emit(context, c, inputs, past)
    return [result if used else None for result, used in zip(results, c.used_outputs, strict=False)]


OPS = (Op(INTERNAL, SELECTIVE_SCAN, 1, parse, output_types, lower, choose),)
