"""No number can stop the process: integers that data divides by are never zero where the division happens.

An x86 CPU answers n / 0, and the least integer / -1, with a signal that ends the process. ONNX leaves both open; here
the divisor becomes 1, so that a quotient is n and a remainder 0. Constants, sizes and loop indices stay as they are.
"""

from __future__ import annotations

from iree.compiler import ir

from .emit.scalar import Scalar
from .guarded_reads import range_of

_SIGNED = frozenset({"arith.divsi", "arith.remsi", "arith.floordivsi", "arith.ceildivsi"})
_UNSIGNED = frozenset({"arith.divui", "arith.remui", "arith.ceildivui"})


def guard_divisions(module: ir.Module) -> int:
    """Replace the divisors of a module of linalg that may not divide, changed in place.

    Returns:
        How many divisors were replaced.
    """
    found: list[ir.Operation] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        if op.name in _SIGNED | _UNSIGNED and _may_fail(op.operands[1]):
            found.append(op)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    for division in found:
        with ir.InsertionPoint(division), division.location:
            division.operands[1] = _divisor(division)
    return len(found)


def _may_fail(divisor: ir.Value) -> bool:
    known = range_of(divisor)
    return not known.trusted or known.low == known.high == 0


def _divisor(division: ir.Operation) -> ir.Value:
    number, divisor = Scalar(division.operands[0]), Scalar(division.operands[1])
    fails = divisor.equals(0)
    if division.name in _SIGNED:
        bits = 64 if divisor.dtype == "index" else int(divisor.dtype[1:])
        fails = fails | (divisor.equals(-1) & number.equals(-(1 << (bits - 1))))
    return fails.select(Scalar.constant(1, divisor.dtype), divisor).value
