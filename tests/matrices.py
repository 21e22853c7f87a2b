"""Products of 16 x 16 matrices by scalar code, for devices without matrix units: all but the units is tested with it.

A group of 32 threads holds the sums as a subgroup would: each thread half a row. Factors are read where they lie, in
the workgroup's memory, as the units would read them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from iree.compiler import ir
from iree.compiler.dialects import arith, vector
from linattn.dialect_patterns.emit import simt_kernel
from linattn.dialect_patterns.emit.scalar import Scalar
from linattn.dialect_patterns.emit.simt_kernel import Buffer, Group, Kernel
from linattn.dialect_patterns.target import Target

SUBGROUP = 32
TARGET = Target(
    "vulkan", is_gpu=True, subgroup_size=SUBGROUP, max_threads=512, workgroup_memory=32_768, matrix_stride="chunks"
)
_SIDE, _CHUNK = 16, 8


class _Sums(list):
    """Eight sums of a thread."""


class ScalarMatrices(Kernel):
    """A kernel whose matrices are scalars."""

    def _place(self) -> tuple[Scalar, Scalar]:
        """Row and half row of this thread."""
        lane = self.thread().divide_unsigned(SUBGROUP)[1]
        return lane.divide_unsigned(2)

    def matrix_zero(self) -> Any:
        return _Sums([self.constant(0.0)] * _CHUNK)

    def matrix_load(self, role: str, buffer: Buffer, start: Scalar, stride: int, transposed: bool = False) -> Any:
        del role
        return buffer, start, stride, transposed

    def matrix_multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        row, half = self._place()
        left = self._line(a, row)
        buffer, start, stride, transposed = b
        if transposed:
            columns = [self._line(b, half * _CHUNK + i) for i in range(_CHUNK)]
        else:
            rows = [self._chunk(buffer, start + k * stride + half) for k in range(_SIDE)]
            columns = list(zip(*rows, strict=True))
        sums = _Sums(c)
        for i, column in enumerate(columns):
            for x, y in zip(left, column, strict=True):
                sums[i] = self.fma(x, y, sums[i])
        return sums

    def matrix_store(self, sums: Any, buffer: Buffer, start: Scalar, stride: int) -> None:
        row, half = self._place()
        for i in range(2):
            self.store(self.join(sums[4 * i : 4 * i + 4]), buffer, start + row * stride + half * 2 + i)

    def loop(
        self, start: Scalar, stop: Scalar, step: int, initial: Sequence[Any],
        body: Callable[[Scalar, list[Any]], Sequence[Any]],
    ) -> list[Any]:  # fmt: skip
        sums = [isinstance(value, _Sums) for value in initial]

        def flat(values: Sequence[Any]) -> list[ir.Value]:
            return [v for value in values for v in (value if isinstance(value, _Sums) else [value])]

        def grouped(values: list[ir.Value]) -> list[Any]:
            rest = iter(values)
            return [_Sums(next(rest) for _ in range(_CHUNK)) if is_sums else next(rest) for is_sums in sums]

        return grouped(
            super().loop(start, stop, step, flat(initial), lambda index, carried: flat(body(index, grouped(carried))))
        )

    def _line(self, factor: Any, line: Scalar) -> list[ir.Value]:
        """Sixteen elements that are neighbours in memory."""
        buffer, start, stride, _ = factor
        return [e for i in range(2) for e in self._chunk(buffer, start + line * stride + i)]

    def _chunk(self, buffer: Buffer, index: Scalar) -> list[ir.Value]:
        single, pair = ir.Type.parse("vector<1xf32>"), ir.Type.parse("vector<2xf16>")
        found: list[ir.Value] = []
        for word in self.elements(self.load(buffer, index)):
            halves = vector.BitCastOp(pair, vector.BroadcastOp(single, word).result).result
            found += [arith.ExtFOp(self.type(1), half).result for half in self.elements(halves)]
        return found


def emulate(monkeypatch: pytest.MonkeyPatch, strategy: Any) -> None:
    """Have the kernels of a strategy's module be emitted with scalar matrices, and without subgroup operations."""
    monkeypatch.setattr(simt_kernel, "Kernel", ScalarMatrices)
    monkeypatch.setattr(strategy, "Group", lambda threads, subgroup: Group(threads, 0))
