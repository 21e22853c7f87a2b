"""The operator entry of GatherColumns: which strategy, and lowering with it."""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir

from ..op import INTERNAL, Choice, LoweringContext, LoweringOptions, Op
from ..select import Strategy, select, wherever_legal
from ..target import Target
from . import direct, packed
from .contract import GatherColumns, output_types, parse

GATHER_COLUMNS = "GatherColumns"

STRATEGIES = (
    Strategy("packed", packed.is_legal, wherever_legal("a table in the order in which products read it, stored once")),
    Strategy("direct", direct.is_legal, wherever_legal("a table that products read as columns, stored once")),
)

_EMITTERS = {"packed": packed.emit_gather_columns_packed, "direct": direct.emit_gather_columns_direct}


def choose(contract: GatherColumns, target: Target, options: LoweringOptions) -> Choice:
    """The strategy for a node; what is forced on the state operators says nothing here."""
    return select(STRATEGIES, contract, target, LoweringOptions(chunk_size=options.chunk_size), contract.where)


def lower(context: LoweringContext, contract: GatherColumns, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Emit the node with the chosen strategy."""
    weight, indices = operands
    assert weight is not None
    assert indices is not None
    emit = _EMITTERS[choose(contract, context.target, context.options).strategy]
    return [emit(context, contract, weight, indices)]


OPS = (Op(INTERNAL, GATHER_COLUMNS, 1, parse, output_types, lower, choose),)
