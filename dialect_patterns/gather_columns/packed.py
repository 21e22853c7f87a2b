"""Strategy ``packed``: columns out of the panels in which the CPU's products read the weight.

    %packed = util.global.load @weight.panels16 : tensor<N/16 x K x 16>       the product's, stored once
    %y = linalg.generic ins(%indices) { tensor.extract %packed[index / 16, k, index % 16] }

Beside the product's copy the table as the model has it would be a second one, of a gigabyte in a model with a large
vocabulary. A column is one cache line for each of its elements; at decode that is little, in a prompt of 512 tokens and
1024 rows 32 MiB.

Legal: on CPUs with vectors, for weights whose products are packed (``mat_mul.fused_simd``).
"""

from __future__ import annotations

from iree.compiler import ir
from iree.compiler.dialects import arith

from ..emit.scalar import Scalar, element_type
from ..mat_mul.simd_layout import PairLayout
from ..mat_mul.simd_plan import weight_layout
from ..node import FLOATS
from ..op import LoweringContext, weight_symbol
from ..select import Legality, No, OtherMachine, Yes
from ..target import Target
from .columns import emit_columns
from .contract import GatherColumns


def is_legal(contract: GatherColumns, target: Target) -> Legality:
    """Where products with the weight are packed."""
    if target.is_gpu or not target.vector_bits:
        return (OtherMachine if target.is_gpu else No)("the target is not a CPU with vectors")
    if not contract.constant or contract.weight.dtype not in FLOATS:
        return No("the matrix is not a weight of the model in floating point")
    return Yes()


def emit_gather_columns_packed(
    context: LoweringContext, contract: GatherColumns, weight: ir.Value, indices: ir.Value
) -> ir.Value:
    """Emit the columns [indices..., K]."""
    b, symbol = context.builder, weight_symbol(weight)
    assert symbol is not None
    assert context.weights is not None
    layout = weight_layout(context.target.machines[0], contract.weight.dtype)
    pairs = isinstance(layout, PairLayout)
    panels = context.weights.repacked(symbol, layout.name, layout.pack, "i32" if pairs else None)

    def load(row: Scalar, column: Scalar) -> Scalar:
        panel, lane = column.divide_unsigned(layout.width)
        if not pairs:
            return b.load(panels, panel, row, lane)
        pair, odd = row.divide_unsigned(2)
        word = b.load(panels, panel, pair, lane)
        half = odd.equals(0).select(word, word.shift_right(16)).to("i16")
        return Scalar(arith.BitcastOp(element_type("bf16"), half.value).result)

    return emit_columns(b, contract, indices, load)
