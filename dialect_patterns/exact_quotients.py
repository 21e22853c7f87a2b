"""Quotients of f32 are rounded correctly on Vulkan too, which lets a division be off by 2.5 units in the last place.

    arith.divf %a, %b  ->  q + (%a - q %b) / %b     q = %a / %b; products of halves of q and %b are exact

On an H100 one of seven quotients of whole numbers was off, and one of 25 went to the next number by ``Floor``, which
``Mod`` is made of. Of f16 and bf16 the quotient is one of f32, rounded. Kernels of ours take care of themselves, and
what divides a constant is no whole number but of powers of two, which are exact.
"""

from __future__ import annotations

import math
from typing import Any

from iree.compiler import ir

from .emit.quotient import rest
from .emit.scalar import FLOAT_BITS, Scalar

_LEAST, _MOST = 1e-30, 1e38  # between them no half and no product of halves is too small or too large


def correct_quotients(module: ir.Module) -> int:
    """Correct the quotients of a module of linalg, changed in place; those of f64 are left.

    Returns:
        How many were.
    """
    found: list[ir.Operation] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        if op.name == "arith.divf" and _may_be_off(op) and not _is_of_a_kernel(op):
            found.append(op)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    for op in found:
        with ir.InsertionPoint(op), op.location:
            a, b = (Scalar(value) for value in op.operands)
            value = _corrected(a, b) if a.dtype == "f32" else (a.to("f32") / b.to("f32")).to(a.dtype)
            for use in list(op.results[0].uses):
                use.owner.operands[use.operand_number] = value.value
        op.erase()
    return len(found)


def _is_of_a_kernel(op: ir.Operation) -> bool:
    around = op.parent
    while around is not None and around.operation.name != "hal.executable.source":
        around = around.operation.parent
    return around is not None


def _may_be_off(op: ir.Operation) -> bool:
    if FLOAT_BITS.get(str(op.results[0].type), 64) == FLOAT_BITS["f64"]:
        return False
    number, divisor = (_constant(value) for value in op.operands)
    return number is None and (divisor is None or abs(math.frexp(divisor)[0]) != math.frexp(1.0)[0])


def _constant(value: ir.Value) -> float | None:
    owner: Any = value.owner
    is_one = getattr(owner, "name", "") == "arith.constant"
    return ir.FloatAttr(owner.attributes["value"]).value if is_one else None


def _corrected(a: Scalar, b: Scalar) -> Scalar:
    quotient = a / b
    usable = [(size > _LEAST) & (size < _MOST) for size in (a.abs(), b.abs(), quotient.abs())]
    return (usable[0] & usable[1] & usable[2]).select(quotient + rest(a, quotient, b) / b, quotient)
