"""exp(NaN) and the like are NaN on Vulkan too, where the driver may make a number of it: NVIDIA's does.

    math.exp %x  ->  arith.select ((bits of %x without the sign) > bits of inf), %x, (math.exp %x)

A NaN in a score or a decay was lost there: what follows was finite, and wrong. The bits are asked, since a driver that
leaves out NaN may leave out `x != x`. Source: SPIR-V's GLSL.std.450, where the result for NaN is undefined.
"""

from __future__ import annotations

from typing import Any

from iree.compiler import ir
from iree.compiler.dialects import arith

_FUNCTIONS = frozenset(f"math.{name}" for name in ("erf", "exp", "exp2", "expm1", "log", "log1p", "log2", "tanh"))
_NARROW = frozenset({"f16", "bf16"})
_MAGNITUDE, _INFINITY = 0x7FFF_FFFF, 0x7F80_0000


def keep_nans(module: ir.Module) -> int:
    """Guard the functions of a module of linalg and kernels, changed in place; those of f64 are left.

    Returns:
        How many were guarded.
    """
    found: list[Any] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        if op.name in _FUNCTIONS and _element(op.results[0].type) in _NARROW | {"f32"}:
            found.append(op)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    for op in found:
        with ir.InsertionPoint(op), op.location:
            asked = op.operands[0]
            value = op.clone().result
            chosen = arith.SelectOp(_is_nan(asked), asked, value).result
            for use in list(op.results[0].uses):
                use.owner.operands[use.operand_number] = chosen
        op.erase()
    return len(found)


def _is_nan(value: Any) -> Any:
    """By its bits, as f32: not every device has integers of 16 bits."""
    type_ = str(value.type)
    if _element(type_) in _NARROW:
        value = arith.ExtFOp(ir.Type.parse(type_.replace(_element(type_), "f32")), value).result
    integers = str(value.type).replace("f32", "i32")
    bits = arith.BitcastOp(ir.Type.parse(integers), value).result
    magnitude = arith.AndIOp(bits, _constant(integers, _MAGNITUDE)).result
    return arith.CmpIOp(arith.CmpIPredicate.ugt, magnitude, _constant(integers, _INFINITY)).result


def _element(type_: Any) -> str:
    """Of a scalar's type or a vector's, `vector<4xf32>`."""
    return str(type_).removesuffix(">").rpartition("x")[2]


def _constant(type_: str, number: int) -> Any:
    text = f"{number} : {type_}" if type_ == "i32" else f"dense<{number}> : {type_}"
    return arith.ConstantOp(ir.Type.parse(type_), ir.Attribute.parse(text)).result
