"""Conversions that Vulkan needs by way of a wider type.

    arith.sitofp %i : i64 to bf16  ->  arith.bitcast (rounded bits of (arith.sitofp %i : i64 to f32)) : i16 to bf16
    arith.fptosi %x : f32 to i8    ->  arith.trunci (arith.fptosi %x : f32 to i32) : i32 to i8

IREE 3.13 makes no legal SPIR-V of the first one; MLIR folds a rounding of f32 (`arith.truncf`) back into it. The other
one is its conversion to unsigned bytes too, of which NVIDIA's driver makes numbers up to 127: DynamicQuantizeLinear's
zero point 136 was 127.
"""

from __future__ import annotations

from iree.compiler import ir
from iree.compiler.dialects import arith

from .emit.scalar import Scalar, element_type
from .emit.wide_bf16 import rounded_bits

_CONVERSIONS = frozenset({"arith.sitofp", "arith.uitofp"})
_NARROW = frozenset({"i8", "i16"})


def widen_conversions(module: ir.Module) -> int:
    """Replace the conversions of a module of linalg, changed in place.

    Returns:
        How many were replaced.
    """
    found: list[ir.Operation] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        is_bf16 = op.name in _CONVERSIONS and str(op.results[0].type) == "bf16"
        if is_bf16 or (op.name == "arith.fptosi" and str(op.results[0].type) in _NARROW):
            found.append(op)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    for op in found:
        with ir.InsertionPoint(op), op.location:
            narrow = _bf16(op) if op.name in _CONVERSIONS else _integer(op)
            for use in list(op.results[0].uses):
                use.owner.operands[use.operand_number] = narrow
        op.erase()
    return len(found)


def _bf16(op: ir.Operation) -> ir.Value:
    wide = ir.Operation.create(op.name, results=[element_type("f32")], operands=list(op.operands)).result
    return arith.BitcastOp(element_type("bf16"), rounded_bits(Scalar(wide)).value).result


def _integer(op: ir.Operation) -> ir.Value:
    return Scalar(op.operands[0]).to("i32").to(str(op.results[0].type)).value
