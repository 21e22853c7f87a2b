"""A product on the matrix units as one GPU kernel, whatever its right factor is stored as.

    hal.executable.source @... {
      a workgroup: a tile of y; scf.for %k { a barrier; tiles of both factors on their way to the workgroup's memory,
        stages of which hold those of several %k; a subgroup: 16 x 16 products of the oldest stage,
        gpu.subgroup_mma_compute, sums in f32 in its registers }
      sums through the workgroup's memory, rounded, to y
    }

There are two stages: a step writes what the one before it has loaded, loads what the next one writes, and multiplies
meanwhile. No value that is under way is handed from one to another: the move would wait for it. Where threads can copy
past their registers, ``mma_copies`` has more.

Tensor cores on CUDA and cooperative matrices on Vulkan are made of the same text. Rows of the tiles in the workgroup's
memory are one chunk of 16 bytes longer than they need, against bank conflicts. Rows and columns beyond the end are read
from the last one and not written.

The kernel depends on how the product is cut, not on its sizes, which it is given where it can be: a driver compiles
each kernel that a module has, and the products of a model's prompts are of a dozen sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from iree.compiler import ir

from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer, Kernel
from .mma_plan import CHUNK, SIDE, VECTOR, Plan

REST = 2.0**-11
"""What the second term of an element counts: that which the first, of 11 bits, has left fills its own 11 then."""


class RightFactor(Protocol):
    """What the right factor of a product is read from; its tiles lie in the workgroup's memory as f16."""

    def start(self, product: Product) -> None:
        """Emit what comes before the loop."""
        ...

    def load(self, step: Scalar) -> list[ir.Value]:
        """Load this thread's part of the tile that belongs to a step of K."""
        ...

    def put(self, loaded: Sequence[ir.Value], step: Scalar, tile: Scalar) -> None:
        """Write that part to the workgroup's memory, where the tile starts at chunk ``tile``."""
        ...

    def matrix(self, depth: Scalar, across: Scalar, term: int, tile: Scalar) -> ir.Value:
        """The matrix at ``depth`` matrices down and ``across`` matrices to the right of a term's tile in memory."""
        ...

    def finish(self, sums: list[ir.Value], column: Scalar) -> ir.Value:
        """What becomes of four sums from column ``4 * column`` on; of four gates and what they are for, if gated."""
        ...


@dataclass(frozen=True)
class Extent:
    """Sizes of a product inside its kernel.

    Attributes:
        rows: M.
        depth: Chunks of a row of the left factor: K / 8.
        columns: N of each result.
    """

    rows: Scalar
    depth: Scalar
    columns: tuple[Scalar, ...]


@dataclass(frozen=True)
class Part:
    """A product of those that share their left factor.

    Attributes:
        start: Number of its first tile of columns.
        chosen: Whether this workgroup's tile is one of it; None where there is one product.
    """

    start: Scalar
    chosen: Scalar | None


class Product:
    """Emits the kernel: buffer 0 is the left factor, f16 [M, K]; of two terms [M, 2 K], one after the other in a row.

    Products of one left factor are one kernel; which of them a workgroup computes is the same for all of its threads.

    Args:
        k: Emits instructions.
        size: Of the product.
        plan: How it is cut.
        right: The right factor.
        output: Binding of the first result [M, N].
        dtype: Its type.
        factors: Binding of what each row of the result is to be multiplied by, f32 [M]; None for nothing.

    Attributes:
        thread: This thread's number in the workgroup.
        tile: Of the columns of its product, the one that this workgroup computes.
        parts: The products.
        memory: The workgroup's: stages, in each the terms of the left tile, then of the right one; in the end sums.
    """

    def __init__(
        self, k: Kernel, size: Extent, plan: Plan, right: RightFactor, output: int,
        dtype: str = "f16", factors: int | None = None,
    ) -> None:  # fmt: skip
        self.k, self.size, self.p, self.right = k, size, plan, right
        self.high = plan.rows // plan.down // SIDE  # matrices of a subgroup
        self.wide = plan.columns // plan.across // SIDE
        self.vectors = [columns.divide_unsigned(VECTOR)[0] for columns in size.columns]
        self.a = k.chunks(0, size.rows * size.depth * plan.terms)
        self.y = [k.buffer(output + i, dtype, size.rows * n, VECTOR) for i, n in enumerate(self.vectors)]
        self.factors = None if factors is None else k.buffer(factors, "f32", size.rows)
        self.memory = k.shared_chunks(plan.memory)
        self.thread = k.thread()

    def emit(self) -> None:
        """Emit everything."""
        k, p = self.k, self.p
        counts = [(columns + (p.width - 1)).divide_unsigned(p.width)[0] for columns in self.size.columns]
        total = counts[0]
        for count in counts[1:]:
            total = total + count
        row, self.tile = k.item_by(total)
        self.row, self.parts = row * p.rows, [Part(Scalar.constant(0, "index"), None)]
        if len(counts) > 1:
            self._choose(counts)
        self.right.start(self)
        self.subgroup, self.lane = self.thread.divide_unsigned(p.subgroup)
        self.along, place = self.subgroup.divide_unsigned(p.down * p.across)
        self.down, self.across = place.divide_unsigned(p.across)
        self.places_a = self.places(p.rows, p.depth // CHUNK)
        self._write(self._products())

    def _choose(self, counts: Sequence[Scalar]) -> None:
        """Which product a tile is of."""
        self.parts.clear()
        start = Scalar.constant(0, "index")
        for count in counts:
            chosen = (self.tile >= start) & (self.tile < start + count)
            self.parts.append(Part(start, chosen))
            start = start + count
        self.tile = self.tile - self.chosen([part.start for part in self.parts])

    def chosen(self, values: Sequence[Scalar]) -> Scalar:
        """Of a value for each product that of the one which this workgroup computes."""
        found = values[-1]
        for part, value in zip(self.parts[:-1], values, strict=False):
            assert part.chosen is not None
            found = part.chosen.select(value, found)
        return found

    def places(self, rows: int, chunks: int) -> list[tuple[Scalar, Scalar]]:
        """Row and chunk of each of this thread's loads of a tile."""
        loads = range(0, rows * chunks, self.p.threads)
        return [(self.thread + load).divide_unsigned(chunks) for load in loads]

    def _chunks_a(self, step: Scalar) -> list[tuple[Scalar, Scalar]]:
        """Where each of this thread's chunks of the left tile lies in its buffer and in the tile."""
        p = self.p
        found: list[tuple[Scalar, Scalar]] = []
        for row, chunk in self.places_a:
            start = (self.row + row).minimum(self.size.rows - 1) * self.size.depth * p.terms
            for term in range(p.terms):
                first = start + self.size.depth * term if term else start
                at = first + chunk + step * (p.depth // CHUNK)
                found.append((at, row * p.stride_a + chunk + term * p.chunks_a))
        return found

    def _load(self, step: Scalar) -> list[ir.Value]:
        """This thread's part of the tiles that belong to a step of K."""
        return [*(self.k.load(self.a, at) for at, _ in self._chunks_a(step)), *self.right.load(step)]

    def _put(self, loaded: Sequence[ir.Value], step: Scalar, stage: Scalar) -> None:
        """Write it to the stage that starts at chunk ``stage``."""
        places = self._chunks_a(step)
        for (_, place), value in zip(places, loaded, strict=False):
            self.k.store_as_is(value, self.memory, stage + place)
        self.right.put(loaded[len(places) :], step, stage + self.p.terms * self.p.chunks_a)

    def _products(self) -> list[ir.Value]:
        """The sums of this thread's subgroup, row after row."""
        p, each = self.p, self.high * self.wide
        steps = self.size.depth.divide_unsigned(p.depth // CHUNK)[0]
        initial = [self.k.matrix_zero() for _ in range(each * p.terms)]
        found = self._loop(steps, initial)
        if p.terms == 1:
            return found
        return [self.k.matrix_add_scaled(a, b, REST) for a, b in zip(found[:each], found[each:], strict=True)]

    def _next(self, stage: Scalar) -> Scalar:
        """The stage after one."""
        last = (self.p.stages - 1) * self.p.stage
        return stage.equals(last).select(Scalar.constant(0, "index"), stage + self.p.stage)

    def _loop(self, steps: Scalar, initial: list[ir.Value]) -> list[ir.Value]:
        """The sums after all steps; tiles pass through registers."""
        k, zero = self.k, Scalar.constant(0, "index")
        self._put(self._load(zero), zero, zero)
        following = self._load(Scalar.constant(1, "index").minimum(steps - 1))
        size = len(following)

        def step(index: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            stage, loaded, sums = Scalar(carried[0]), carried[1 : 1 + size], carried[1 + size :]
            after, last = self._next(stage), steps - 1
            k.barrier()
            self._put(loaded, (index + 1).minimum(last), after)
            later = self._load((index + 2).minimum(last))
            return [after.value, *later, *self._step_products(sums, stage)]

        return k.loop(zero, steps, 1, [zero.value, *following, *initial], step)[1 + size :]

    def _step_products(self, sums: list[ir.Value], stage: Scalar) -> list[ir.Value]:
        p, each = self.p, self.high * self.wide
        for part in range(0, p.depth // SIDE, p.along * (p.scaled // SIDE or 1)):
            if p.scaled:
                sums = self._counted(sums, stage, part)
                continue
            depth = Scalar.constant(part, "index") if p.along == 1 else self.along + part
            first, others = self._left(stage, depth, 0), self._right(stage, depth, 0)
            sums[:each] = self._more(first, others, sums[:each])
            if p.terms > 1:  # the product of both second terms is below the last bit
                sums[each:] = self._more(self._left(stage, depth, 1), others, sums[each:])
                sums[each:] = self._more(first, self._right(stage, depth, 1), sums[each:])
        return sums

    def _counted(self, sums: list[ir.Value], stage: Scalar, part: int) -> list[ir.Value]:
        """The sums with the products of the K that share factors, from matrix ``part`` of a stage on.

        A matrix of factors is read with a stride of nothing: its rows, or its columns, are the same 16 numbers.
        """
        k, p = self.k, self.p
        first = part * SIDE // p.scaled
        group = Scalar.constant(first, "index") if p.along == 1 else self.along + first
        depths = [group * (p.scaled // SIDE) + i for i in range(p.scaled // SIDE)]
        left = [self._left(stage, depth, 0) for depth in depths]
        right = [self._right(stage, depth, 0) for depth in depths]
        size = SIDE // VECTOR
        start = stage + p.factors + group * p.group
        row = start + self.down * (self.high * size)
        column = start + self.across * (self.wide * size) + p.rows // VECTOR
        rows = [k.matrix_load_sums(self.memory, row + i * size, 0, transposed=True) for i in range(self.high)]
        columns = [k.matrix_load_sums(self.memory, column + i * size, 0) for i in range(self.wide)]
        total: list[ir.Value] = []
        for i in range(self.high):
            for j in range(self.wide):
                found = k.matrix_zero()
                for a, b in zip(left, right, strict=True):
                    found = k.matrix_multiply_add(a[i], b[j], found)
                total.append(k.matrix_add_product(sums[len(total)], k.matrix_multiply(found, rows[i]), columns[j]))
        return total

    def _left(self, stage: Scalar, depth: Scalar, term: int) -> list[ir.Value]:
        """The left factor's matrices of this subgroup, ``depth`` matrices along K of a stage."""
        p = self.p
        stride, start = p.stride_a * CHUNK // p.unit[0], stage + depth * (SIDE // CHUNK) + term * p.chunks_a
        first = self.down * (self.high * SIDE * p.stride_a) + start
        return [self.k.matrix_load("AOp", self.memory, first + i * SIDE * p.stride_a, stride) for i in range(self.high)]

    def _right(self, stage: Scalar, depth: Scalar, term: int) -> list[ir.Value]:
        """The right factor's."""
        tile = stage + self.p.terms * self.p.chunks_a
        return [self.right.matrix(depth, self.across * self.wide + j, term, tile) for j in range(self.wide)]

    def _more(self, rows: list[ir.Value], columns: list[ir.Value], sums: list[ir.Value]) -> list[ir.Value]:
        pairs = [(a, b) for a in rows for b in columns]
        return [self.k.matrix_multiply_add(a, b, s) for (a, b), s in zip(pairs, sums, strict=True)]

    def _write(self, sums: list[ir.Value]) -> None:
        """Some rows of each subgroup at a time, through its part of the workgroup's memory."""
        k, p = self.k, self.p
        rows, width = p.pieces * SIDE, self.wide * SIDE // VECTOR
        size = rows * p.stride_y
        base, place = self.subgroup * size, (self.down * p.across + self.across) * size
        for first in range(0, self.high, p.pieces):
            k.barrier()
            for i in range(p.pieces):
                for j in range(self.wide):
                    start = base + (i * SIDE * p.stride_y + j * (SIDE // VECTOR))
                    stride = p.stride_y * VECTOR // p.unit[1]
                    k.matrix_store(sums[(first + i) * self.wide + j], self.memory, start, stride)
            k.barrier()
            for values, row, column in self._found(rows, width, size, place):
                self._store(values, self.row + (self.down * self.high + first) * SIDE + row, column)

    def _found(
        self, rows: int, width: int, size: int, place: Scalar
    ) -> Iterator[tuple[list[ir.Value], Scalar, Scalar]]:
        """Sums in the workgroup's memory, with their row there and their column; gates come with what they are for."""
        k, p = self.k, self.p
        pairs = 2 if p.gated else 1
        helpers, number = p.along * pairs, self.along * pairs + (self.across if p.gated else 0)
        for vector in range(0, rows * width, p.subgroup * helpers):
            row, column = (self.lane + number * p.subgroup + vector).divide_unsigned(width)
            found: list[ir.Value] = []
            for half in range(pairs):
                at = row * p.stride_y + column + (self.down * (p.across * size) + half * size if p.gated else place)
                value = k.load(self.memory, at)
                for other in range(1, p.along):
                    value = k.add(value, k.load(self.memory, at + other * p.down * p.across * size))
                found.append(value)
            yield found, row, self.tile * (p.width // VECTOR) + (0 if p.gated else self.across * width) + column

    def _store(self, values: list[ir.Value], row: Scalar, column: Scalar) -> None:
        k = self.k
        for part, y, vectors in zip(self.parts, self.y, self.vectors, strict=True):
            valid = (row < self.size.rows) & (column < vectors)

            def write(y: Buffer = y, vectors: Scalar = vectors) -> None:
                found = values
                if self.factors is not None:
                    factor = k.splat(k.load(self.factors, row), VECTOR)
                    found = [k.mul(value, factor) for value in values]
                k.store(self.right.finish(found, column), y, row * vectors + column)

            k.when(valid if part.chosen is None else valid & part.chosen, write)
