"""Products of 16 x 16 matrices by scalar code, for devices without matrix units: all but the units is tested with it.

A group of 32 threads holds the sums as a subgroup would: each thread half a row. Factors are read where they lie, in
the workgroup's memory, as the units would read them.

Lavapipe ends every loop when those of a thread have turned 65,535 times in all (Mesa 22.3), without a word: in this
form ``fused_mma_chunks`` is right up to 45,600 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
_DYNAMIC = -(1 << 63)  # instead of a static position, where a value says it


class _Sums(list):
    """Eight sums of a thread, and the products that are still to be added."""

    def __init__(self, values: Iterable[ir.Value], terms: Sequence[Any] = ()) -> None:
        super().__init__(values)
        self.terms = list(terms)


class ScalarMatrices(Kernel):
    """A kernel whose matrices are scalars."""

    def _place(self) -> tuple[Scalar, Scalar]:
        """Row and half row of this thread."""
        lane = self.thread().divide_unsigned(SUBGROUP)[1]
        return lane.divide_unsigned(2)

    def copy_chunk(self, source: Buffer, index: Scalar, target: Buffer, to: Scalar) -> None:
        self.store_as_is(self.load(source, index), target, to)

    def end_copies(self) -> None:
        pass

    def await_copies(self, under_way: int) -> None:
        del under_way

    def matrix_zero(self) -> Any:
        return _Sums([self.constant(0.0)] * _CHUNK)

    def matrix_load(self, role: str, buffer: Buffer, start: Scalar, stride: int, transposed: bool = False) -> Any:
        del role
        return buffer, start, stride, transposed

    def matrix_multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """Put off until the sums are wanted, so that one loop does: a loop each is minutes of compiling."""
        return _Sums(c, [*c.terms, (a, b)])

    def _done(self, sums: Any) -> Any:
        """The sums with all their products, which are of the same buffers; of kernels that wait for no one before."""
        if not sums.terms:
            return sums
        row, half = self._place()
        (a, b), zero = sums.terms[0], Scalar.constant(0, "index")
        starts = [[factor[1] for factor in pair] for pair in sums.terms]
        assert all((x[0], *x[2:]) == (a[0], *a[2:]) and (y[0], *y[2:]) == (b[0], *b[2:]) for x, y in sums.terms)

        def step(part: Scalar, found: list[ir.Value]) -> list[ir.Value]:
            term, chunk = part.divide_unsigned(2)
            at_a, at_b = starts[0]
            for i, (start_a, start_b) in enumerate(starts[1:], 1):
                at_a, at_b = term.equals(i).select(start_a, at_a), term.equals(i).select(start_b, at_b)
            first = chunk * _CHUNK
            left = self._column(a, at_a, first, row) if a[3] else self._chunk(a[0], at_a + row * a[2] + chunk)
            if b[3]:
                columns = [self._chunk(b[0], at_b + (half * _CHUNK + i) * b[2] + chunk) for i in range(_CHUNK)]
            else:
                rows = [self._chunk(b[0], at_b + (first + k) * b[2] + half) for k in range(_CHUNK)]
                columns = list(zip(*rows, strict=True))
            for i, column in enumerate(columns):
                for x, y in zip(left, column, strict=True):
                    found[i] = self.fma(x, y, found[i])
            return found

        last = Scalar.constant(2 * len(starts), "index")
        return _Sums(super().loop(zero, last, 1, list(sums), step))

    def matrix_add_scaled(self, a: Any, b: Any, factor: float) -> Any:
        pairs = zip(self._done(a), self._done(b), strict=True)
        return _Sums(self.fma(y, self.constant(factor), x) for x, y in pairs)

    def matrix_load_sums(self, buffer: Buffer, start: Scalar, stride: int, transposed: bool = False) -> Any:
        row, half = self._place()
        if transposed:
            chunk, inside = row.divide_unsigned(4)
            columns = [self.load(buffer, start + (half * _CHUNK + i) * stride + chunk) for i in range(_CHUNK)]
            return _Sums(vector.ExtractOp(four, [inside.value], [_DYNAMIC]).result for four in columns)
        chunks = [self.load(buffer, start + row * stride + half * 2 + i) for i in range(2)]
        return _Sums(value for chunk in chunks for value in self.elements(chunk))

    def matrix_add(self, a: Any, b: Any) -> Any:
        return _Sums(self.add(x, y) for x, y in zip(self._done(a), self._done(b), strict=True))

    def matrix_multiply(self, a: Any, b: Any) -> Any:
        return _Sums(self.mul(x, y) for x, y in zip(self._done(a), self._done(b), strict=True))

    def matrix_store(self, sums: Any, buffer: Buffer, start: Scalar, stride: int) -> None:
        row, half = self._place()
        sums = self._done(sums)
        if buffer.width == 1:
            for i, value in enumerate(sums):
                self.store(value, buffer, start + row * stride + half * _CHUNK + i)
            return
        for i in range(2):
            self.store(self.join(sums[4 * i : 4 * i + 4]), buffer, start + row * stride + half * 2 + i)

    def loop(
        self, start: Scalar, stop: Scalar, step: int, initial: Sequence[Any],
        body: Callable[[Scalar, list[Any]], Sequence[Any]],
    ) -> list[Any]:  # fmt: skip
        sums = [isinstance(value, _Sums) for value in initial]

        def flat(values: Sequence[Any]) -> list[ir.Value]:
            return [v for value in values for v in (self._done(value) if isinstance(value, _Sums) else [value])]

        def grouped(values: list[ir.Value]) -> list[Any]:
            rest = iter(values)
            return [_Sums(next(rest) for _ in range(_CHUNK)) if is_sums else next(rest) for is_sums in sums]

        return grouped(
            super().loop(start, stop, step, flat(initial), lambda index, carried: flat(body(index, grouped(carried))))
        )

    def _column(self, factor: Any, start: Scalar, first: Scalar, column: Scalar) -> list[ir.Value]:
        """Eight elements of a column, from row ``first`` on."""
        buffer, _, stride, _ = factor
        chunk, inside = column.divide_unsigned(_CHUNK)
        word, upper = inside.divide_unsigned(2)
        found: list[ir.Value] = []
        for i in range(_CHUNK):
            words = self.load(buffer, start + (first + i) * stride + chunk)
            low, high = self._halves_of(vector.ExtractOp(words, [word.value], [_DYNAMIC]).result)
            found.append(self.select(upper.equals(0), low, high))
        return found

    def _chunk(self, buffer: Buffer, index: Scalar) -> list[ir.Value]:
        words = self.elements(self.load(buffer, index))
        return [half for word in words for half in self._halves_of(word)]

    def _halves_of(self, word: ir.Value) -> list[ir.Value]:
        """The two f16 of an f32's bits, in f32."""
        single, pair = ir.Type.parse("vector<1xf32>"), ir.Type.parse("vector<2xf16>")
        halves = vector.BitCastOp(pair, vector.BroadcastOp(single, word).result).result
        return [arith.ExtFOp(self.type(1), half).result for half in self.elements(halves)]


def emulate(monkeypatch: pytest.MonkeyPatch, strategy: Any) -> None:
    """Have the kernels of a strategy's module be emitted with scalar matrices, and without subgroup operations."""
    monkeypatch.setattr(simt_kernel, "Kernel", ScalarMatrices)
    monkeypatch.setattr(strategy, "Group", lambda threads, subgroup: Group(threads, 0))
