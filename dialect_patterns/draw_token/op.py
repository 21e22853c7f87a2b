"""DrawToken: how it is lowered."""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir

from ..logits import token_types
from ..op import INTERNAL, LoweringContext, Op
from .contract import DRAW_TOKEN, DrawToken, parse
from .kernel import emit_draw


def lower(context: LoweringContext, contract: DrawToken, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Emit the kernel."""
    b, (logits, settings) = context.builder, operands
    assert logits is not None
    assert settings is not None
    lead = b.shape(logits)[:-1]
    rows = b.collapse(logits, 0, len(lead) - 1) if len(lead) > 1 else logits
    token = emit_draw(b, context.target, contract, rows, settings)
    return [b.expand(token, 0, lead) if len(lead) > 1 else token]


OPS = (Op(INTERNAL, DRAW_TOKEN, 1, parse, token_types, lower),)
