"""The product of :mod:`mma_kernel` where threads can copy past their registers (cp.async).

The workgroup's memory holds up to four stages then, and up to three tiles are under way.
"""

from __future__ import annotations

from typing import Protocol

from iree.compiler import ir

from ..emit.scalar import Scalar
from ..emit.simt_kernel import Kernel
from .mma_kernel import Extent, Product, RightFactor
from .mma_plan import Plan


class CopiedFactor(RightFactor, Protocol):
    """A right factor that lies in the device's memory as its tiles do."""

    def copy(self, step: Scalar, tile: Scalar) -> None:
        """Begin to copy this thread's part of a tile to the workgroup's memory past the registers."""
        ...


class CopiedProduct(Product):
    """Emits the kernel.

    Args:
        k: Emits instructions.
        size: Of the product.
        plan: How it is cut.
        right: The right factor.
        output: Binding of the first result [M, N].
    """

    def __init__(self, k: Kernel, size: Extent, plan: Plan, right: CopiedFactor, output: int) -> None:
        super().__init__(k, size, plan, right, output)
        self._copied = right

    def _loop(self, steps: Scalar, initial: list[ir.Value]) -> list[ir.Value]:
        k, p, zero = self.k, self.p, Scalar.constant(0, "index")

        def copy(step: Scalar, stage: Scalar) -> None:
            k.when(step < steps, lambda: self._copy(step, stage))
            k.end_copies()  # of none at the end: the count of groups tells which tiles are there

        for i in range(p.stages - 1):
            copy(Scalar.constant(i, "index"), Scalar.constant(i * p.stage, "index"))

        def step(index: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            stage, free, sums = Scalar(carried[0]), Scalar(carried[1]), carried[2:]
            k.await_copies(p.stages - 2)
            k.barrier()
            copy(index + (p.stages - 1), free)
            return [self._next(stage).value, stage.value, *self._step_products(sums, stage)]

        last = Scalar.constant((p.stages - 1) * p.stage, "index")
        return k.loop(zero, steps, 1, [zero.value, last.value, *initial], step)[2:]

    def _copy(self, step: Scalar, stage: Scalar) -> None:
        """Begin to copy this thread's part of both tiles to the stage that starts at chunk ``stage``."""
        for at, place in self._chunks_a(step):
            self.k.copy_chunk(self.a, at, self.memory, stage + place)
        self._copied.copy(step, stage + self.p.terms * self.p.chunks_a)
