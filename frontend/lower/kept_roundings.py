"""Sums in SPIR-V whose roundings are what they are for keep them, as in CUDA's and CPUs' code.

    %1 = spirv.FMul %x, %inverse                       %1 = spirv.FMul %x, %inverse {no_contraction}
    %2 = spirv.FAdd %1, 1.5 * 2^23                 ->  %2 = spirv.FAdd %1, 1.5 * 2^23 {no_contraction}

    %1 = spirv.FAdd %x, 1.0                            %1 = spirv.FAdd %x, 1.0 {no_contraction}
    %2 = spirv.FSub %1, 1.0                        ->  %2 = spirv.FSub %1, 1.0 {no_contraction}

    %1 = spirv.FDiv %a, %b                             %1 = spirv.FDiv %a, %b {no_contraction}
    %2 = spirv.FAdd %1, %rest                      ->  %2 = spirv.FAdd %1, %rest {no_contraction}

A driver may make one multiply-add of the first two, with one rounding, and ``%x`` of the others: NVIDIA's does both,
lavapipe the latter. Numbers a hair beside a half went to the other whole number (an int8 step of an element of A), and
log(1 + x) lost all of a small x, which asks what the sum has rounded off. A quotient, which is a product there, was
joined with what corrects its rounding. Other sums are left: that they are joined makes them no less exact, and costs
nothing.

Source: SPIR-V 1.6, decoration NoContraction; IREE 3.13 writes none.
"""

from __future__ import annotations

import re
import struct
from typing import Any

from iree.compiler import ir

from .executables import spirv_modules

_NO_HALVES = 2.0**23
"""From here on f32 have no fraction: a sum with such a constant is rounded to a whole number."""

_NUMBER = re.compile(r"(?:dense<)?([-+.\w]+)>? : (?:vector<\d+x)?f32")
_SUMS = frozenset({"spirv.FAdd", "spirv.FSub"})
_QUOTIENT = "spirv.FDiv"
_ROUNDED = _SUMS | {"spirv.FMul", _QUOTIENT}


def keep_roundings(module: ir.Operation) -> int:
    """Decorate such sums, and what they are the sums of, in all kernels in SPIR-V, in place.

    Args:
        module: After the phase ``executable-targets``.

    Returns:
        How many sums.
    """
    sums: list[Any] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        if op.name in _SUMS and _is_for_its_rounding(op):
            sums.append(op)
        return ir.WalkResult.ADVANCE

    for code in spirv_modules(module):
        code.walk(visit)
    for op in sums:
        for one in (op, *(value.owner for value in op.operands)):
            if getattr(one, "name", "") in _ROUNDED:
                one.attributes["no_contraction"] = ir.Attribute.parse("unit", module.context)
    return len(sums)


def _is_for_its_rounding(op: Any) -> bool:
    """Of a constant without a fraction; of a constant and a sum with another one; of a quotient."""
    owners, number = [value.owner for value in op.operands], _constant(op)
    if any(getattr(one, "name", "") == _QUOTIENT for one in owners):
        return True
    if number is None:
        return False
    return abs(number) >= _NO_HALVES or any(
        getattr(one, "name", "") in _SUMS and _constant(one) is not None for one in owners
    )


def _constant(op: Any) -> float | None:
    """The number that is one of a sum's two, or all elements of it."""
    for value in op.operands:
        owner: Any = value.owner
        if getattr(owner, "name", "") == "spirv.Constant":
            found = _NUMBER.match(str(owner.attributes["value"]))
            if found:
                bits = found[1].startswith("0x")
                return struct.unpack("!f", bytes.fromhex(found[1][2:]))[0] if bits else float(found[1])
    return None
