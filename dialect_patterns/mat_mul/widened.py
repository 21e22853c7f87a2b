"""Strategy ``widened``: products of bf16 in f32, on GPUs without matrix units of IREE's own.

    %y = narrowed(linalg.batch_matmul(widened %a, widened %b))          see ``emit/wide_bf16.py``

Legal: where IREE's own do not compile and ``fused_tiled`` is not legal: activations by activations, such as attention
that is spelled out. Leading dimensions are the same, or ``b`` has none. Cost: both operands once more, in f32.
"""

from __future__ import annotations

from iree.compiler import ir

from ..emit.wide_bf16 import narrowed, widened
from ..op import LoweringContext
from ..select import Legality, No, OtherMachine, Yes
from ..target import Target
from .contract import MatMul


def is_legal(contract: MatMul, target: Target) -> Legality:
    """Where IREE's own products of bf16 do not compile."""
    a, b = contract.a, contract.b
    if not target.is_gpu:
        return OtherMachine(f"{target.name} is not a GPU")
    if target.matrix_units or a.dtype != "bf16":
        return No(f"IREE's own take {a.dtype} on {target.name}")
    if a.rank < 2 or b.rank < 2:
        return No(f"{a} by {b} is not matrices")
    if b.rank > 2 and (a.shape[:-2] != b.shape[:-2] or None in b.shape[:-2]):
        return No(f"{a} by {b} broadcasts")
    return Yes()


def emit_mat_mul_widened(context: LoweringContext, contract: MatMul, left: ir.Value, right: ir.Value) -> ir.Value:
    """Emit the product."""
    b = context.builder
    lead = [b.dim(left, axis) for axis in range(contract.a.rank - 1)]
    left, right = widened(b, left), widened(b, right)
    if contract.b.rank == 2:
        for _ in lead[1:]:
            left = b.collapse(left, 0, 1)
        y = b.contract("mk,kn->mn", left, right)
        sizes = lead
    else:
        for _ in lead[2:]:
            left, right = b.collapse(left, 0, 1), b.collapse(right, 0, 1)
        y = b.contract("bmk,bkn->bmn", left, right)
        sizes = lead[:-1]
    y = narrowed(b, y)
    return b.expand(y, 0, sizes) if len(sizes) > 1 else y
