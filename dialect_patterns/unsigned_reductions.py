"""Largest and smallest signed integers as unsigned ones, for CUDA.

IREE 3.13 begins the reduction of a warp with the neutral number of the unsigned operation: 0 for the largest, -1 (all
bits) for the smallest. So a largest one below zero became 0, and a smallest one above zero -1.

    arith.maxsi %x, %acc  ->  (maxui (%x ^ sign), (%acc ^ sign)) ^ sign

which IREE does not take for a reduction that a warp can share: slower, and right. Source: the PTX of both.
"""

from __future__ import annotations

from typing import Any

from iree.compiler import ir
from iree.compiler.dialects import arith

_UNSIGNED = {"arith.maxsi": arith.MaxUIOp, "arith.minsi": arith.MinUIOp}


def make_reductions_unsigned(module: ir.Module) -> int:
    """Rewrite the reductions of a module of linalg, changed in place.

    Returns:
        How many were.
    """
    found: list[Any] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        if op.name in _UNSIGNED and _is_reduction(op):
            found.append(op)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    for op in found:
        with ir.InsertionPoint(op), op.location:
            dtype = op.results[0].type
            width = int(str(dtype)[1:])  # i32
            sign = arith.ConstantOp(dtype, ir.IntegerAttr.get(dtype, -(1 << (width - 1)))).result
            left, right = (arith.XOrIOp(value, sign).result for value in op.operands)
            result = arith.XOrIOp(_UNSIGNED[op.name](left, right).result, sign).result
            for use in list(op.results[0].uses):
                use.owner.operands[use.operand_number] = result
        op.erase()
    return len(found)


def _is_reduction(op: Any) -> bool:
    """Whether a body combines with what it has so far."""
    parent = op.parent
    if parent is None or parent.name != "linalg.generic" or "reduction" not in str(parent.attributes["iterator_types"]):
        return False
    arguments: list[Any] = list(op.block.arguments)
    held = [arguments[i] for i in range(len(arguments) - len(parent.results), len(arguments))]
    return any(value == argument for value in op.operands for argument in held)
