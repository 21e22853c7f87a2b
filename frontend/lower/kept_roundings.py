"""What is rounded to whole numbers in SPIR-V is a number that was rounded before, as in CUDA's and CPUs' code.

    %1 = spirv.FMul %x, %inverse                       %1 = spirv.FMul %x, %inverse {no_contraction}
    %2 = spirv.FAdd %1, 1.5 * 2^23                 ->  %2 = spirv.FAdd %1, 1.5 * 2^23 {no_contraction}

A driver may make one multiply-add of the two, with one rounding; NVIDIA's does. Products a hair beside a half then went
to the other whole number. Other sums are left: that they are joined makes them no less exact, and costs nothing.

Source: SPIR-V 1.6, decoration NoContraction; IREE 3.13 writes none.
"""

from __future__ import annotations

from typing import Any

from iree.compiler import ir

from .executables import spirv_modules

_NO_HALVES = 2.0**23
"""From here on f32 have no fraction: a sum with such a constant is rounded to a whole number."""


def keep_roundings(module: ir.Operation) -> int:
    """Decorate such sums, and the products in them, of all kernels in SPIR-V, in place.

    Args:
        module: After the phase ``executable-targets``.

    Returns:
        How many sums.
    """
    sums: list[Any] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        if op.name == "spirv.FAdd" and any(_has_no_halves(value) for value in op.operands):
            sums.append(op)
        return ir.WalkResult.ADVANCE

    for code in spirv_modules(module):
        code.walk(visit)
    for op in sums:
        for one in (op, *(value.owner for value in op.operands)):
            if getattr(one, "name", "") in ("spirv.FAdd", "spirv.FMul"):
                one.attributes["no_contraction"] = ir.UnitAttr.get(module.context)
    return len(sums)


def _has_no_halves(value: ir.Value) -> bool:
    owner: Any = value.owner
    if getattr(owner, "name", "") != "spirv.Constant" or str(value.type) != "f32":
        return False
    return abs(ir.FloatAttr(owner.attributes["value"]).value) >= _NO_HALVES
