"""Strategy ``direct``: columns out of the weight as products on GPUs read it, [K, N].

    %y = linalg.generic ins(%indices) { tensor.extract %weight[k, index] }

Legal: always. Cost: a sector of memory for each element.
"""

from __future__ import annotations

from iree.compiler import ir

from ..op import LoweringContext
from ..select import Legality, Yes
from ..target import Target
from .columns import emit_columns
from .contract import GatherColumns


def is_legal(contract: GatherColumns, target: Target) -> Legality:
    """Everywhere."""
    del contract, target
    return Yes()


def emit_gather_columns_direct(
    context: LoweringContext, contract: GatherColumns, weight: ir.Value, indices: ir.Value
) -> ir.Value:
    """Emit the columns [indices..., K]."""
    b = context.builder
    return emit_columns(b, contract, indices, lambda row, column: b.load(weight, row, column))
