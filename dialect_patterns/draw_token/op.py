"""DrawToken: how it is lowered."""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir

from ..op import INTERNAL, LoweringContext, Op
from .contract import DRAW_TOKEN, DrawToken, output_types, parse
from .kernel import emit_draw


def lower(context: LoweringContext, contract: DrawToken, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Emit the kernel; its pairs of i32 are read as i64."""
    b, (logits, settings) = context.builder, operands
    assert logits is not None
    assert settings is not None
    lead = b.shape(logits)[:-1]
    rows = b.collapse(logits, 0, len(lead) - 1) if len(lead) > 1 else logits
    pairs = emit_draw(b, context.target, contract, rows, settings)
    kind = ir.RankedTensorType.get([contract.rows], ir.IntegerType.get_signless(64))
    sizes = {"operandSegmentSizes": ir.DenseI32ArrayAttr.get([1, 0, 0])}
    token = ir.Operation.create("flow.tensor.bitcast", results=[kind], operands=[pairs], attributes=sizes).result
    return [b.expand(token, 0, lead) if len(lead) > 1 else token]


OPS = (Op(INTERNAL, DRAW_TOKEN, 1, parse, output_types, lower),)
