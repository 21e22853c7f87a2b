"""The operator entries of MoE, QMoE and ChosenExperts: which strategy, and lowering with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from iree.compiler import ir

from ..emit.builder import spec_of
from ..node import TensorSpec
from ..op import INTERNAL, MICROSOFT, Choice, LoweringContext, LoweringOptions, Op
from ..select import Strategy, Yes, always, select, wherever_legal
from ..target import Target
from . import dense, fused_simd, fused_simt, given
from .contract import Experts, output_types, parse

STRATEGIES = (
    Strategy("fused_simd", fused_simd.is_legal, lambda c, target, _: Yes(fused_simd.describe(c, target))),
    Strategy("fused_simt", fused_simt.is_legal, lambda c, target, _: Yes(fused_simt.describe(c, target))),
    Strategy("dense", always, wherever_legal("every expert for every token; portable")),
)

_EMITTERS = {
    "fused_simd": fused_simd.emit_experts_fused_simd,
    "fused_simt": fused_simt.emit_experts_fused_simt,
    "dense": dense.emit_experts_dense,
}


def choose(contract: Experts, target: Target, options: LoweringOptions) -> Choice:
    """The strategy for a node; of what is forced for the state operators, only a word of this one counts."""
    forced = options.strategy if options.strategy in [strategy.name for strategy in STRATEGIES] else None
    c = contract
    choice = select(STRATEGIES, c, target, LoweringOptions(forced, options.chunk_size), c.where)
    weights = f"{c.fc1.bits} bits" if c.fc1.bits else c.fc1.dtype
    return replace(choice, rule=c.activation.kind, heads=f"{c.chosen} of {c.count} x {c.hidden}x{c.inner}, {weights}")


def lower(context: LoweringContext, contract: Experts, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Emit the node with the chosen strategy."""
    b, c, x = context.builder, contract, operands[0]
    assert x is not None
    lead = b.shape(x)[:-1]
    x = b.refine(x, TensorSpec((*spec_of(x).shape[:-1], c.hidden), c.x.dtype))
    rows = b.collapse(x, 0, 1) if len(lead) > 1 else x
    emit = _EMITTERS[choose(c, context.target, context.options).strategy]
    y = emit(context, c, rows, operands)
    return [b.expand(y, 0, lead) if len(lead) > 1 else y]


OPS = (
    *(Op(MICROSOFT, name, 1, parse, output_types, lower, choose) for name in ("MoE", "QMoE")),
    Op(INTERNAL, given.CHOSEN_EXPERTS, 1, given.parse, output_types, lower, choose),
)
