"""The operator entries of CausalConvWithState."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from iree.compiler import ir

from ..emit.torch_values import before_transpose
from ..node import TensorSpec
from ..op import MICROSOFT, Choice, LoweringContext, LoweringOptions, Op
from ..select import Strategy, not_emitted, select, wherever_legal
from ..target import Target
from . import direct, fused_simd, fused_simt
from .contract import CausalConv, output_types, parse
from .direct import Operands, emit_causal_conv_direct, prepare

_SWAPPED = (0, 2, 1)
_FUSED = ("fused_simd", "fused_simt")

_PREFERRED = wherever_legal("one kernel, state update included")
STRATEGIES = (
    Strategy("fused_simd", fused_simd.is_legal, _PREFERRED),
    Strategy("fused_simt", fused_simt.is_legal, _PREFERRED),
    Strategy("direct", direct.is_legal, wherever_legal("always possible")),
)


def choose(contract: CausalConv, target: Target, options: LoweringOptions) -> Choice:
    """The strategy for a node; a forced one that only LinearAttention has says nothing here.

    Raises:
        LoweringError: if a strategy is forced that is not legal.
    """
    if options.strategy not in {strategy.name for strategy in STRATEGIES}:
        options = replace(options, strategy=None)
    choice = select(STRATEGIES, contract, target, options, contract.where)
    return replace(choice, rule=contract.activation, heads=f"{contract.channels} x {contract.kernel}")


def lower(context: LoweringContext, contract: CausalConv, operands: Sequence[ir.Value | None]) -> list[ir.Value | None]:
    """Emit the node with the chosen strategy; one value an output of the node."""
    b, c = context.builder, contract
    x = prepare(b, c, operands)

    if isinstance(x.tokens, int) and x.tokens == 0:
        results = [x.input, x.past]
    elif (strategy := choose(c, context.target, context.options).strategy) == "direct":
        results = emit_causal_conv_direct(context, c, x)
    elif strategy in _FUSED:
        results = _lower_fused(context, c, x, operands[0], strategy)
    else:
        raise not_emitted(strategy)
    return [results[i] if i < 2 and used else None for i, used in enumerate(c.used_outputs)]


def _lower_fused(
    context: LoweringContext, c: CausalConv, x: Operands, given: ir.Value | None, strategy: str
) -> list[ir.Value]:
    """With or without the transposes that models put around the node, whose input as it was is ``given``."""
    b, simd = context.builder, strategy == "fused_simd"
    past = x.past if c.has_past else None
    takes_rows = fused_simd.takes_rows(c, context.target) if simd else fused_simt.takes_rows(c)
    rows = before_transpose(given, _SWAPPED) if given is not None and takes_rows else None
    if rows is None and simd:
        return fused_simd.emit_causal_conv_fused_simd(context, c, x)
    if rows is None:
        return fused_simt.emit_causal_conv_fused_simt(context, c, x, past)
    batch, channels, tokens = c.input.shape
    x = replace(x, input=b.refine(rows, TensorSpec((batch, tokens, channels), c.input.dtype)))
    if simd:
        output, state = fused_simd.emit_causal_conv_rows(context, c, x)
    else:
        output, state = fused_simt.emit_causal_conv_fused_simt(context, c, x, past, rows=True)
    return [b.transpose(output, _SWAPPED), state]


OPS = tuple(
    Op(domain, "CausalConvWithState", since, parse, output_types, lower, choose)
    for domain, since in (("", 27), (MICROSOFT, 1))
)
