"""Sines of large angles are as exact as those of small ones: positions of 4,000 tokens are angles, in models that turn.

    math.sin %x  ->  math.sin (((%x - n c1) - n c2) - n c3) - n c4      n = round(x / 2 pi), c1 + ... + c4 = 2 pi

IREE 3.13 takes off multiples of one number: sines of angles up to 5,000 were 1.4e-4 off on CPUs and NVIDIA's Vulkan,
3.8e-4 on CUDA and lavapipe. The first three parts have 8 bits, so that their multiples are exact up to angles of
400,000, joined with the difference or not. Source: Cody and Waite, 1980, chapter 8.
"""

from __future__ import annotations

import math

from iree.compiler import ir

from .emit.scalar import FLOAT_BITS, Scalar

_FUNCTIONS = frozenset({"math.cos", "math.sin", "math.tan"})
_PARTS = (201 / 2**5, 254 / 2**17, -172 / 2**26)
_REST = 2 * math.pi - sum(_PARTS)


def reduce_angles(module: ir.Module) -> int:
    """Rewrite the functions of angles of a module of linalg, changed in place; those of f64 are left.

    Returns:
        How many were.
    """
    found: list[ir.Operation] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        if op.name in _FUNCTIONS and FLOAT_BITS.get(str(op.results[0].type), 64) < FLOAT_BITS["f64"]:
            found.append(op)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    for op in found:
        with ir.InsertionPoint(op), op.location:
            angle = _reduced(Scalar(op.operands[0]).to("f32"))
            value = ir.Operation.create(op.name, results=[angle.value.type], operands=[angle.value]).result
            narrow = Scalar(value).to(str(op.results[0].type)).value
            for use in list(op.results[0].uses):
                use.owner.operands[use.operand_number] = narrow
        op.erase()
    return len(found)


def _reduced(angle: Scalar) -> Scalar:
    """The angle less whole turns."""
    turns = (angle * (1 / (2 * math.pi))).round_even()
    for part in (*_PARTS, _REST):
        angle = angle - turns * part
    return angle
