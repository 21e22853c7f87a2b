"""Matrices of 16 x 16 as a warp of an NVIDIA GPU (sm_80 and newer) holds them: :class:`Kernel`'s by PTX of its own.

``gpu.subgroup_mma_*`` hides where the elements of a matrix lie, and has no multiply-add of elements. Here a factor is
four words a lane as ``ldmatrix`` loads them, and sums are eight numbers a lane, those of two ``mma.sync`` [16, 8]:
lane ``4 g + t`` has columns ``2 t`` and ``2 t + 1`` of row ``g``, then of row ``g + 8``, then the same of the other
eight columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from iree.compiler import ir

from .assembly import assembly
from .scalar import Scalar
from .simt_kernel import Buffer, Kernel
from .warp import LANES

_CHUNK = 16  # bytes
_HALVES = 8  # of a chunk
_MULTIPLY_ADD = (
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)


class WarpMatrices(Kernel):
    """A kernel whose subgroups are warps; strides of matrices are elements."""

    def matrix_zero(self) -> Any:
        """Sums of zero."""
        return [self.constant(0.0)] * 8

    def matrix_load(self, role: str, buffer: Buffer, start: Scalar, stride: int, transposed: bool = False) -> Any:
        """A factor of f16 from the workgroup's memory; see :meth:`Kernel.matrix_load`."""
        lane = self._lane()
        if transposed:  # rows there are columns of the factor, two times eight, with both halves of K each
            row = (lane & 7) + ((lane & 16).shift_right(1))
            chunk = (lane & 8).shift_right(3)
        else:
            row, chunk = lane & 15, lane.shift_right(4)
        inside = (row * (stride // _HALVES) + chunk) * _CHUNK
        kind = "x4.trans" if role == "BOp" and not transposed else "x4"
        text = f"ldmatrix.sync.aligned.m8n8.{kind}.shared.b16 {{$0, $1, $2, $3}}, [$4];"
        return assembly(text, "=r,=r,=r,=r,r", [(self._start(buffer, start) + inside).value], ["i32"] * 4)

    def matrix_multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """The sums ``a b + c``."""
        sums: list[ir.Value] = []
        for half in range(2):
            operands = [*a, *b[2 * half : 2 * half + 2], *c[4 * half : 4 * half + 4]]
            sums += assembly(_MULTIPLY_ADD, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", operands, ["f32"] * 4, is_pure=True)
        return sums

    def matrix_load_sums(self, buffer: Buffer, start: Scalar, stride: int, transposed: bool = False) -> Any:
        """The same 16 numbers of the workgroup's memory as each row, or each column where transposed."""
        assert stride == 0
        lane = self._lane()
        if transposed:
            address = self._start(buffer, start) + lane.shift_right(2) * 4
            low, high = (
                assembly(f"ld.shared.f32 $0, [$1 + {at}];", "=f,r", [address.value], ["f32"])[0] for at in (0, 32)
            )
            return [low, low, high, high] * 2
        address = self._start(buffer, start) + (lane & 3) * 8
        halves = [
            assembly(f"ld.shared.v2.f32 {{$0, $1}}, [$2 + {at}];", "=f,=f,r", [address.value], ["f32"] * 2)
            for at in (0, 32)
        ]
        return [*halves[0] * 2, *halves[1] * 2]

    def matrix_add(self, a: Any, b: Any) -> Any:
        """The sums ``a + b``."""
        return [self.add(x, y) for x, y in zip(a, b, strict=True)]

    def matrix_multiply(self, a: Any, b: Any) -> Any:
        """The products of the elements of two matrices of sums."""
        return [self.mul(x, y) for x, y in zip(a, b, strict=True)]

    def matrix_add_product(self, a: Any, b: Any, c: Any) -> Any:
        """The sums and products of elements ``a + b c``."""
        return [self.fma(y, z, x) for x, y, z in zip(a, b, c, strict=True)]

    def matrix_add_scaled(self, a: Any, b: Any, factor: float) -> Any:
        """The sums ``a + factor b``."""
        return [self.fma(y, self.constant(factor), x) for x, y in zip(a, b, strict=True)]

    def matrix_store(self, sums: Any, buffer: Buffer, start: Scalar, stride: int) -> None:
        """Write sums as f32 to chunks of the workgroup's memory."""
        lane = self._lane()
        address = self._start(buffer, start) + (lane.shift_right(2) * stride + (lane & 3) * 2) * 4
        for i, (row, column) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
            text = f"st.shared.v2.f32 [$0 + {(row * stride + column) * 4}], {{$1, $2}};"
            assembly(text, "r,f,f,~{memory}", [address.value, sums[2 * i], sums[2 * i + 1]])

    def loop(
        self, start: Scalar, stop: Scalar, step: int, initial: Sequence[Any],
        body: Callable[[Scalar, list[Any]], Sequence[Any]],
    ) -> list[Any]:  # fmt: skip
        """``scf.for`` that carries matrices too."""
        sizes = [len(_parts(value)) if isinstance(value, list) else 0 for value in initial]

        def flat(values: Sequence[Any]) -> list[ir.Value]:
            return [part for value in values for part in _parts(value)]

        def grouped(values: list[ir.Value]) -> list[Any]:
            rest = iter(values)
            return [[next(rest) for _ in range(size)] if size else next(rest) for size in sizes]

        found = super().loop(start, stop, step, flat(initial), lambda index, now: flat(body(index, grouped(now))))
        return grouped(found)

    def _lane(self) -> Scalar:
        return self.thread().divide_unsigned(LANES)[1].to("i32")

    def _start(self, buffer: Buffer, start: Scalar) -> Scalar:
        """The address of a chunk, i32."""
        operation = "memref.extract_aligned_pointer_as_index"
        base = Scalar(ir.Operation.create(operation, results=[ir.IndexType.get()], operands=[buffer.value]).result)
        return base.to("i32") + start.to("i32") * _CHUNK


def _parts(value: Any) -> list[ir.Value]:
    """What a matrix, or a value, is made of."""
    return cast("list[ir.Value]", value) if isinstance(value, list) else [value]
