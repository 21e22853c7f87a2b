"""Grouping of strategy ``fused_simt``: the assignments of each expert as tiles of a few rows, by one workgroup.

    order [tiles * rows]   assignments t k + j, -1 where there is none       owner [tiles]   their expert

Each thread looks through all assignments for those of its experts, twice: to count and to write. Each place is written
once, so that threads need not see what others write to the buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from iree.compiler import ir

from ..emit.builder import Size, tensor_type
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Group, Kernel, dispatch
from ..op import LoweringContext
from .contract import Experts
from .simt_routing import clamped

_THREADS = 128


def emit_groups(
    context: LoweringContext, c: Experts, experts: ir.Value, size: Size, tiles: Size, rows: int
) -> tuple[ir.Value, ir.Value]:
    """Order and owner.

    Args:
        context: Where, and for what.
        c: The contract.
        experts: Of each assignment, i32 [T * k].
        size: How many assignments.
        tiles: As many as they can need.
        rows: Of a tile.
    """
    b = context.builder
    threads = min(_THREADS, context.target.max_threads)

    def body(k: Kernel) -> None:
        _Groups(k, c, rows, threads).emit()

    def output(count: Size) -> tuple[ir.RankedTensorType, list[ir.Value]]:
        if isinstance(count, int):
            return tensor_type((count,), "i32"), []
        return tensor_type((None,), "i32"), [count]

    name = f"experts_groups_simt_{c.chosen}of{c.count}_r{rows}_t{threads}"
    numbers = [b.index(size), b.index(tiles)]
    outputs = [output(b.mul(tiles, rows)), output(tiles)]
    order, owner = dispatch(name, Group(threads, 0), 1, b.index(1), numbers, [experts], outputs, body)
    return order, owner


class _Groups:
    """Emits the kernel."""

    def __init__(self, k: Kernel, c: Experts, rows: int, threads: int) -> None:
        self.k, self.c, self.rows, self.threads = k, c, rows, threads
        self.size, self.tiles = k.number(0), k.number(1)
        self.experts = k.buffer(0, "i32", self.size)
        self.order = k.buffer(1, "i32", self.tiles * rows)
        self.owner = k.buffer(2, "i32", self.tiles)
        self.needed = k.shared(c.count)  # tiles of each expert, as floats

    def emit(self) -> None:
        """Emit everything."""
        k, c = self.k, self.c
        own = [k.thread() + start for start in range(0, c.count, self.threads)]
        self._for(own, lambda e: self._count(e))
        k.barrier()
        self._for(own, lambda e: self._write(e))
        total = self._before(Scalar.constant(c.count, "index"))
        none, zero = Scalar.constant(-1, "i32").value, Scalar.constant(0, "i32").value
        self._each(total + k.thread(), self.tiles, self.threads, lambda at: k.store_as_is(zero, self.owner, at))
        start = total * self.rows + k.thread()
        self._each(start, self.tiles * self.rows, self.threads, lambda at: k.store_as_is(none, self.order, at))

    def _for(self, own: list[Scalar], body: Callable[[Scalar], None]) -> None:
        for e in own:
            if self.c.count % self.threads == 0:
                body(e)
            else:
                self.k.when(e < self.c.count, partial(body, e))

    def _each(self, start: Scalar, stop: Scalar, step: int, body: Callable[[Scalar], None]) -> None:
        def once(at: Scalar, _: list[ir.Value]) -> list[ir.Value]:
            body(at)
            return []

        self.k.loop(start, stop, step, [], once)

    def _is_mine(self, at: Scalar, e: Scalar) -> Scalar:
        return clamped(self.k.load(self.experts, at), self.c.count).equals(e)

    def _counted(self, e: Scalar, body: Callable[[Scalar, Scalar], None] | None) -> Scalar:
        """How many assignments an expert has; ``body(place, assignment)`` for each."""
        zero = Scalar.constant(0, "index")

        def step(at: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            mine, count = self._is_mine(at, e), Scalar(carried[0])
            if body is not None:
                self.k.when(mine, partial(body, count, at))
            return [mine.select(count + 1, count).value]

        return Scalar(self.k.loop(zero, self.size, 1, [zero.value], step)[0])

    def _count(self, e: Scalar) -> None:
        needed = (self._counted(e, None) + (self.rows - 1)).divide_unsigned(self.rows)[0]
        self.k.store(needed.to("i32", unsigned=True).to("f32", unsigned=True).value, self.needed, e)

    def _needed(self, e: Scalar) -> Scalar:
        return Scalar(self.k.load(self.needed, e)).to("i32").to("index", unsigned=True)

    def _before(self, e: Scalar) -> Scalar:
        """Tiles of all experts before one."""
        zero = Scalar.constant(0, "index")

        def step(at: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            return [(Scalar(carried[0]) + self._needed(at)).value]

        return Scalar(self.k.loop(zero, e, 1, [zero.value], step)[0])

    def _write(self, e: Scalar) -> None:
        k, rows = self.k, self.rows
        first, needed = self._before(e), self._needed(e)
        number = e.to("i32", unsigned=True).value
        self._each(first, first + needed, 1, lambda at: k.store_as_is(number, self.owner, at))

        def put(place: Scalar, assignment: Scalar) -> None:
            k.store_as_is(assignment.to("i32", unsigned=True).value, self.order, first * rows + place)

        count = self._counted(e, put)
        none = Scalar.constant(-1, "i32").value
        stop = (first + needed) * rows
        self._each(first * rows + count, stop, 1, lambda at: k.store_as_is(none, self.order, at))
