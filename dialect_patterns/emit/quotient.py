"""What a quotient leaves, exactly, without a multiply-add of one rounding, which not every device has."""

from __future__ import annotations

from iree.compiler.dialects import arith

from .scalar import Number, Scalar, element_type

_HIGH = -(1 << 12)  # bits of the upper half of a mantissa, and what is above it


def rest(number: Scalar | Number, quotient: Scalar, divisor: Scalar) -> Scalar:
    """``number - quotient * divisor`` of f32, the quotient right but for some units in the last place.

    Args:
        number: Neither so small nor so large that products of halves are not exact.
        quotient: Likewise.
        divisor: Likewise.
    """
    (high, low), (top, bottom) = _halves(divisor), _halves(quotient)
    return number - top * high - top * low - bottom * high - bottom * low


def _halves(value: Scalar) -> tuple[Scalar, Scalar]:
    """Two numbers of 12 bits each whose sum is ``value``: products of such are exact."""
    bits = Scalar(arith.BitcastOp(element_type("i32"), value.value).result)
    high = Scalar(arith.BitcastOp(element_type("f32"), (bits & _HIGH).value).result)
    return high, value - high
