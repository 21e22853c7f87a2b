"""Integers become bf16 by way of f32 and its bits: IREE 3.13 makes no legal SPIR-V of the direct conversion.

    arith.sitofp %i : i64 to bf16  ->  arith.bitcast (rounded bits of (arith.sitofp %i : i64 to f32)) : i16 to bf16

MLIR folds a rounding of f32 (`arith.truncf`) back into the direct conversion. For GPUs that have no bf16 themselves.
"""

from __future__ import annotations

from iree.compiler import ir
from iree.compiler.dialects import arith

from .emit.scalar import Scalar, element_type
from .emit.wide_bf16 import rounded_bits

_CONVERSIONS = frozenset({"arith.sitofp", "arith.uitofp"})


def widen_conversions(module: ir.Module) -> int:
    """Replace the conversions of a module of linalg, changed in place.

    Returns:
        How many were replaced.
    """
    found: list[ir.Operation] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        if op.name in _CONVERSIONS and str(op.results[0].type) == "bf16":
            found.append(op)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    for op in found:
        with ir.InsertionPoint(op), op.location:
            wide = ir.Operation.create(op.name, results=[element_type("f32")], operands=list(op.operands)).result
            narrow = arith.BitcastOp(element_type("bf16"), rounded_bits(Scalar(wide)).value).result
            for use in list(op.results[0].uses):
                use.owner.operands[use.operand_number] = narrow
        op.erase()
    return len(found)
