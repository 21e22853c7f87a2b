"""What a GPU kernel does with values: arithmetic in f32 on scalars and vectors, bits, and control flow.

A value of ``width`` elements is a vector, or a scalar where the width is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from iree.compiler import ir
from iree.compiler.dialects import arith, math, scf, vector

from .scalar import Scalar


class Values:
    """Emits instructions that need to know nothing of the kernel that they are in."""

    def type(self, width: int, element: str = "f32") -> ir.Type:
        """The type of a value of ``width`` elements."""
        return ir.Type.parse(element if width == 1 else f"vector<{width}x{element}>")

    def integers(self, value: int, width: int) -> ir.Value:
        """``value`` in all elements, i32."""
        return self.splat(Scalar.constant(value, "i32").value, width)

    def constant(self, value: float, width: int = 1) -> ir.Value:
        """``value`` in all elements."""
        return self.splat(Scalar.constant(value, "f32").value, width)

    def splat(self, value: ir.Value, width: int) -> ir.Value:
        """A scalar in all elements."""
        return value if width == 1 else vector.BroadcastOp(self.type(width, str(value.type)), value).result

    def elements(self, value: ir.Value) -> list[ir.Value]:
        """The elements as scalars."""
        if not str(value.type).startswith("vector"):
            return [value]
        count = ir.ShapedType(value.type).get_dim_size(0)
        return [vector.ExtractOp(value, [], [i]).result for i in range(count)]

    def join(self, values: Sequence[ir.Value]) -> ir.Value:
        """Scalars as one value."""
        if len(values) == 1:
            return values[0]
        return vector.FromElementsOp(self.type(len(values)), list(values)).result

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The sum."""
        return arith.AddFOp(a, b).result

    def sub(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The difference."""
        return arith.SubFOp(a, b).result

    def mul(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The product."""
        return arith.MulFOp(a, b).result

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """The product of two plus a third with one rounding."""
        return math.FmaOp(a, b, c).result

    def div(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The quotient."""
        return arith.DivFOp(a, b).result

    def neg(self, a: ir.Value) -> ir.Value:
        """The negative."""
        return arith.NegFOp(a).result

    def exp(self, a: ir.Value) -> ir.Value:
        """Euler's number to the power of each element."""
        return math.ExpOp(a).result

    def rsqrt(self, a: ir.Value) -> ir.Value:
        """1 / sqrt of each element."""
        return math.RsqrtOp(a).result

    def tanh(self, a: ir.Value) -> ir.Value:
        """Hyperbolic tangent."""
        return math.TanhOp(a).result

    def maximum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The larger one; NaN wins."""
        return arith.MaximumFOp(a, b).result

    def magnitude(self, a: ir.Value) -> ir.Value:
        """The magnitude of a scalar."""
        return math.AbsFOp(a).result

    def bits(self, a: ir.Value) -> Scalar:
        """The bits of a scalar, as i32."""
        return Scalar(arith.BitcastOp(self.type(1, "i32"), a).result)

    def from_bits(self, bits: Scalar) -> ir.Value:
        """The f32 with these bits."""
        return arith.BitcastOp(self.type(1), bits.value).result

    def select(self, condition: Scalar, true: ir.Value, false: ir.Value) -> ir.Value:
        """``true`` where the i1 is set, else ``false``; SPIR-V before 1.4 has no select of vectors by one bit."""
        pairs = zip(self.elements(true), self.elements(false), strict=True)
        return self.join([arith.SelectOp(condition.value, a, b).result for a, b in pairs])

    def bf16_bits(self, value: ir.Value, width: int = 1) -> ir.Value:
        """The bits of f32 values rounded to bf16, as i32: to nearest even; NaN stays NaN."""
        bits = arith.BitcastOp(self.type(width, "i32"), value).result
        high = arith.ShRUIOp(bits, self.integers(16, width)).result
        odd = arith.AndIOp(high, self.integers(1, width)).result
        rounded = arith.AddIOp(arith.AddIOp(bits, self.integers(0x7FFF, width)).result, odd).result
        rounded = arith.ShRUIOp(rounded, self.integers(16, width)).result
        nan = arith.CmpFOp(arith.CmpFPredicate.UNO, value, value).result
        quiet = arith.OrIOp(high, self.integers(0x40, width)).result
        return arith.SelectOp(nan, quiet, rounded).result

    # ---- control flow ----------------------------------------------------------------------------------------------
    def when(self, condition: Scalar, body: Callable[[], None]) -> None:
        """``body`` where the i1 ``condition`` is set."""
        op = scf.IfOp(condition.value)
        with ir.InsertionPoint(op.then_block):
            body()
            scf.YieldOp([])

    def choose(
        self, condition: Scalar, then: Callable[[], Sequence[ir.Value]], otherwise: Callable[[], Sequence[ir.Value]],
        types: Sequence[ir.Type],
    ) -> list[ir.Value]:  # fmt: skip
        """The values of ``then`` where ``condition`` is set, else those of ``otherwise``; only one of them runs."""
        op = scf.IfOp(condition.value, list(types), has_else=True)
        with ir.InsertionPoint(op.then_block):
            scf.YieldOp(list(then()))
        with ir.InsertionPoint(op.else_block):
            scf.YieldOp(list(otherwise()))
        return list(op.results)

    def loop(
        self,
        start: Scalar,
        stop: Scalar,
        step: int,
        initial: Sequence[ir.Value],
        body: Callable[[Scalar, list[ir.Value]], Sequence[ir.Value]],
    ) -> list[ir.Value]:
        """``scf.for``: ``body(index, carried)`` returns the next carried values; returns the last ones."""
        op = scf.ForOp(start.value, stop.value, Scalar.constant(step, "index").value, list(initial))
        with ir.InsertionPoint(op.body):
            carried = list(op.inner_iter_args)
            scf.YieldOp(list(body(Scalar(cast(Any, op.induction_variable)), carried)))
        return list(op.results)
