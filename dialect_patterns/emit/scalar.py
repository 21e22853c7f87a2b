"""Scalar arithmetic with Python's operators, for the bodies of ``linalg.generic`` and for index computations.

A :class:`Scalar` wraps an SSA value of float, integer or index type and picks the ``arith``/``math`` op by type.
"""

from __future__ import annotations

from typing import Any, cast

from iree.compiler import ir
from iree.compiler.dialects import arith, math

FLOAT_BITS = {"bf16": 16, "f16": 16, "f32": 32, "f64": 64}
Number = int | float


def element_type(dtype: str) -> ir.Type:
    """The MLIR type of a dtype name such as ``f32``, ``bf16``, ``i64`` or ``index``."""
    return ir.Type.parse(dtype)


def _constant(value: Number, dtype: str) -> ir.Value:
    mlir_type = element_type(dtype)
    if dtype in FLOAT_BITS:
        return arith.ConstantOp(mlir_type, ir.FloatAttr.get(mlir_type, float(value))).result
    return arith.ConstantOp(mlir_type, ir.IntegerAttr.get(mlir_type, int(value))).result


class Scalar:
    """An SSA value of scalar type with arithmetic operators.

    Integers are signless and arithmetic on them is signed. Python numbers mix in as constants of the same type;
    two scalars must have the same type (use :meth:`to`).
    """

    def __init__(self, value: ir.Value | Any) -> None:
        self.value = cast(ir.Value, value)

    @staticmethod
    def constant(value: Number, dtype: str) -> Scalar:
        """A constant of type ``dtype``."""
        return Scalar(_constant(value, dtype))

    @property
    def dtype(self) -> str:
        """MLIR's name of the type."""
        return str(self.value.type)

    @property
    def is_float(self) -> bool:
        """Whether the type is a floating-point one."""
        return self.dtype in FLOAT_BITS

    def _other(self, other: Scalar | Number) -> ir.Value:
        return other.value if isinstance(other, Scalar) else _constant(other, self.dtype)

    def _binary(self, other: Scalar | Number, float_op: Any, int_op: Any) -> Scalar:
        op = float_op if self.is_float else int_op
        return Scalar(op(self.value, self._other(other)).result)

    def __add__(self, other: Scalar | Number) -> Scalar:
        return self._binary(other, arith.AddFOp, arith.AddIOp)

    def __sub__(self, other: Scalar | Number) -> Scalar:
        return self._binary(other, arith.SubFOp, arith.SubIOp)

    def __rsub__(self, other: Number) -> Scalar:
        return Scalar(_constant(other, self.dtype)) - self

    def __mul__(self, other: Scalar | Number) -> Scalar:
        return self._binary(other, arith.MulFOp, arith.MulIOp)

    __radd__ = __add__
    __rmul__ = __mul__

    def __truediv__(self, other: Scalar | Number) -> Scalar:
        return self._binary(other, arith.DivFOp, arith.DivSIOp)

    def __rtruediv__(self, other: Number) -> Scalar:
        return Scalar(_constant(other, self.dtype)) / self

    def __floordiv__(self, other: Scalar | Number) -> Scalar:
        """Integer division that truncates; for non-negative operands."""
        return Scalar(arith.DivSIOp(self.value, self._other(other)).result)

    def __mod__(self, other: Scalar | Number) -> Scalar:
        """Integer remainder; for non-negative operands."""
        return Scalar(arith.RemSIOp(self.value, self._other(other)).result)

    def divide_unsigned(self, other: Scalar | Number) -> tuple[Scalar, Scalar]:
        """Quotient and remainder as unsigned integers."""
        divisor = self._other(other)
        quotient = Scalar(arith.DivUIOp(self.value, divisor).result)
        return quotient, Scalar(arith.RemUIOp(self.value, divisor).result)

    def __and__(self, other: Scalar | Number) -> Scalar:
        return Scalar(arith.AndIOp(self.value, self._other(other)).result)

    def __or__(self, other: Scalar | Number) -> Scalar:
        return Scalar(arith.OrIOp(self.value, self._other(other)).result)

    def __xor__(self, other: Scalar | Number) -> Scalar:
        return Scalar(arith.XOrIOp(self.value, self._other(other)).result)

    def shift_right(self, other: Scalar | Number) -> Scalar:
        """Logical shift to the right."""
        return Scalar(arith.ShRUIOp(self.value, self._other(other)).result)

    def __neg__(self) -> Scalar:
        return Scalar(arith.NegFOp(self.value).result) if self.is_float else 0 - self

    def _compare(self, other: Scalar | Number, float_predicate: Any, int_predicate: Any) -> Scalar:
        if self.is_float:
            return Scalar(arith.CmpFOp(float_predicate, self.value, self._other(other)).result)
        return Scalar(arith.CmpIOp(int_predicate, self.value, self._other(other)).result)

    def __lt__(self, other: Scalar | Number) -> Scalar:
        return self._compare(other, arith.CmpFPredicate.OLT, arith.CmpIPredicate.slt)

    def __le__(self, other: Scalar | Number) -> Scalar:
        return self._compare(other, arith.CmpFPredicate.OLE, arith.CmpIPredicate.sle)

    def __gt__(self, other: Scalar | Number) -> Scalar:
        return self._compare(other, arith.CmpFPredicate.OGT, arith.CmpIPredicate.sgt)

    def __ge__(self, other: Scalar | Number) -> Scalar:
        return self._compare(other, arith.CmpFPredicate.OGE, arith.CmpIPredicate.sge)

    def equals(self, other: Scalar | Number) -> Scalar:
        """Equality as an i1 (``==`` is left to Python)."""
        return self._compare(other, arith.CmpFPredicate.OEQ, arith.CmpIPredicate.eq)

    def select(self, true: Scalar, false: Scalar) -> Scalar:
        """``true`` where this i1 is set, else ``false``."""
        return Scalar(arith.SelectOp(self.value, true.value, false.value).result)

    def maximum(self, other: Scalar | Number) -> Scalar:
        """The larger one; NaN wins."""
        return self._binary(other, arith.MaximumFOp, arith.MaxSIOp)

    def minimum(self, other: Scalar | Number) -> Scalar:
        """The smaller one; NaN wins."""
        return self._binary(other, arith.MinimumFOp, arith.MinSIOp)

    def exp(self) -> Scalar:
        """E to the power of this float."""
        return Scalar(math.ExpOp(self.value).result)

    def log1p(self) -> Scalar:
        """log(1 + x)."""
        return Scalar(math.Log1pOp(self.value).result)

    def tanh(self) -> Scalar:
        """Hyperbolic tangent."""
        return Scalar(math.TanhOp(self.value).result)

    def sqrt(self) -> Scalar:
        """Square root."""
        return Scalar(math.SqrtOp(self.value).result)

    def rsqrt(self) -> Scalar:
        """1 / sqrt(x)."""
        return Scalar(math.RsqrtOp(self.value).result)

    def abs(self) -> Scalar:
        """Absolute value of a float."""
        return Scalar(math.AbsFOp(self.value).result)

    def round_even(self) -> Scalar:
        """The nearest whole number, halves to the even one."""
        return Scalar(math.RoundEvenOp(self.value).result)

    def multiply_add(self, factor: Number, addend: Number) -> Scalar:
        """Self * factor + addend with one rounding."""
        return Scalar(math.FmaOp(self.value, self._other(factor), self._other(addend)).result)

    def sigmoid(self) -> Scalar:
        """1 / (1 + e^-x)."""
        return 1.0 / ((-self).exp() + 1.0)

    def silu(self) -> Scalar:
        """X * sigmoid(x)."""
        return self * self.sigmoid()

    def softplus(self) -> Scalar:
        """log(1 + e^x), written so that it does not overflow."""
        return (-self.abs()).exp().log1p() + self.maximum(0.0)

    def to(self, dtype: str, *, unsigned: bool = False) -> Scalar:
        """Convert to another type; floats to integers truncate, ``unsigned`` extends integers with zeros."""
        if dtype == self.dtype:
            return self
        target, source = element_type(dtype), self.dtype
        if self.is_float and dtype in FLOAT_BITS:
            if FLOAT_BITS[source] == FLOAT_BITS[dtype]:  # f16 <-> bf16
                return self.to("f32").to(dtype)
            op = arith.ExtFOp if FLOAT_BITS[dtype] > FLOAT_BITS[source] else arith.TruncFOp
        elif self.is_float:
            op = arith.FPToSIOp
        elif dtype in FLOAT_BITS:
            if source == "index":
                return self.to("i64").to(dtype)
            op = arith.UIToFPOp if unsigned or source == "i1" else arith.SIToFPOp
        elif "index" in (source, dtype):
            op = arith.IndexCastUIOp if unsigned else arith.IndexCastOp
        elif int(dtype[1:]) < int(source[1:]):
            op = arith.TruncIOp
        else:
            op = arith.ExtUIOp if unsigned or source == "i1" else arith.ExtSIOp
        return Scalar(op(target, self.value).result)
