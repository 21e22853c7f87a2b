"""The operator entry of GatherBlockQuantized."""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir

from ..op import MICROSOFT, Choice, LoweringContext, LoweringOptions, Op
from ..select import Strategy, select, wherever_legal
from ..target import Target
from . import direct
from .contract import GatherBlockQuantized, output_types, parse
from .direct import emit_gather_block_quantized_direct

STRATEGIES = (Strategy("direct", direct.is_legal, wherever_legal("one loop that reads the rows asked for")),)


def choose(contract: GatherBlockQuantized, target: Target, options: LoweringOptions) -> Choice:
    """There is one way; what is forced on the state operators says nothing here."""
    return select(STRATEGIES, contract, target, LoweringOptions(chunk_size=options.chunk_size), contract.where)


def lower(
    context: LoweringContext, contract: GatherBlockQuantized, operands: Sequence[ir.Value | None]
) -> list[ir.Value]:
    """Emit the node."""
    return [emit_gather_block_quantized_direct(context, contract, operands)]


OPS = (Op(MICROSOFT, "GatherBlockQuantized", 1, parse, output_types, lower, choose),)
