"""A product on the matrix units as one GPU kernel, whatever its right factor is stored as.

    hal.executable.source @... {
      a workgroup: a tile of y; scf.for %k { a barrier; tiles of both factors on their way to the workgroup's memory,
        stages of which hold those of several %k; a subgroup: 16 x 16 products of the oldest stage,
        gpu.subgroup_mma_compute, sums in f32 in its registers }
      sums through the workgroup's memory, rounded, to y
    }

Where threads can copy past their registers (cp.async) there are up to four stages, and up to three tiles are under way.
Elsewhere there are two: a step writes what the one before it has loaded, loads what the next one writes, and multiplies
meanwhile. No value that is under way is handed from one to another: the move would wait for it.

Tensor cores on CUDA and cooperative matrices on Vulkan are made of the same text. Rows of the tiles in the workgroup's
memory are one chunk of 16 bytes longer than they need, against bank conflicts. Rows and columns beyond the end are read
from the last one and not written.

The kernel depends on how the product is cut, not on its sizes, which it is given where it can be: a driver compiles
each kernel that a module has, and the products of a model's prompts are of a dozen sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from iree.compiler import ir

from ..emit.scalar import Scalar
from ..emit.simt_kernel import Kernel
from ..select import Legality, No, OtherMachine, Yes
from ..target import Target

SIDE = 16
"""Rows and columns of a matrix."""

CHUNK = 8
"""Elements of f16 in a chunk of 16 bytes."""

VECTOR = 4
"""Elements of f32 in a chunk; columns of one store."""

REST = 2.0**-11
"""What the second term of an element counts: that which the first, of 11 bits, has left fills its own 11 then."""

_LEAST_ROWS = 9  # fewer are the business of fused_simt
_ENOUGH_TILES = 100  # workgroups that keep a large GPU busy
_MIN_DEPTH = 32
_STAGES = 4  # most tiles in the workgroup's memory


@dataclass(frozen=True)
class Size:
    """Of a product.

    Attributes:
        rows: M; None where open.
        depth: K.
        columns: N.
    """

    rows: int | None
    depth: int
    columns: int


@dataclass(frozen=True)
class Plan:
    """How the product is cut.

    Attributes:
        rows: Of a workgroup's tile.
        columns: Of a workgroup's tile.
        depth: K at once.
        down: Subgroups along the rows.
        across: Subgroups along the columns.
        subgroup: Threads of a subgroup.
        unit: f16 elements of one unit of a stride, and f32 ones.
        transposed: Whether the right factor's tile lies in memory column by column.
        terms: f16 numbers of an element of a factor; with two, the second counts 2^-11 and is what the first leaves.
        along: Subgroups along K, each of which multiplies its part of every tile.
        stages: Tiles that the workgroup's memory holds.
        copies: Whether they get there past the registers.
    """

    rows: int
    columns: int
    depth: int
    down: int
    across: int
    subgroup: int
    unit: tuple[int, int]
    transposed: bool
    terms: int = 1
    along: int = 1
    stages: int = 2
    copies: bool = False

    @property
    def threads(self) -> int:
        """Threads of a workgroup."""
        return self.subgroup * self.along * self.down * self.across

    @property
    def memory(self) -> int:
        """Chunks of the workgroup's memory: the tiles of both factors, then at least 16 rows of sums a subgroup."""
        return max(self.stages * self.stage, self.piece)

    @property
    def stage(self) -> int:
        """Chunks of the tiles of both factors."""
        return self.terms * (self.chunks_a + self.chunks_b)

    @property
    def piece(self) -> int:
        """Chunks of 16 rows of sums of every subgroup."""
        return self.along * self.down * self.across * SIDE * self.stride_y

    @property
    def pieces(self) -> int:
        """Times 16 rows that are written at once."""
        high, fit = self.rows // self.down // SIDE, self.memory // self.piece
        return next(n for n in range(min(high, fit), 0, -1) if high % n == 0)

    @property
    def chunks_a(self) -> int:
        """Chunks of the left tile, of one term."""
        return self.rows * self.stride_a

    @property
    def stride_a(self) -> int:
        """Chunks from row to row of the left tile."""
        return self.depth // CHUNK + 1

    @property
    def stride_b(self) -> int:
        """Chunks from row to row of the right tile, from column to column where it is transposed."""
        return (self.depth if self.transposed else self.columns) // CHUNK + 1

    @property
    def chunks_b(self) -> int:
        """Chunks of the right tile, of one term."""
        return (self.columns if self.transposed else self.depth) * self.stride_b

    @property
    def stride_y(self) -> int:
        """Chunks from row to row of a subgroup's sums."""
        return self.columns // self.across // VECTOR + 1

    def __str__(self) -> str:
        terms = f"_{self.terms}terms" if self.terms > 1 else ""
        stages = f"c{self.stages}" if self.copies else ""
        along = f"x{self.along}" if self.along > 1 else ""
        return f"t{self.rows}x{self.columns}x{self.depth}s{self.down}x{self.across}{along}{stages}{terms}"


def plan_for(size: Size, target: Target, transposed: bool, terms: int = 1) -> Plan:
    """The largest tiles of which there are enough, and that fit; by measurement (H100).

    Where the right factor is transposed (packed, so that its loads are small), small tiles are deep ones. Those of two
    terms are neither large nor deep.
    """
    rows, columns = size.rows or 0, size.columns
    deep = 64 if size.depth % 64 == 0 and terms == 1 else _MIN_DEPTH
    deepest = 128 if transposed and size.depth % 128 == 0 and terms == 1 else deep
    shapes = [(128, 128, _MIN_DEPTH, 2, 2), (64, 64, deep, 2, 2), (64, 64, _MIN_DEPTH, 2, 2)]
    if transposed:
        shapes += [(64, 32, deepest, 2, 2), (64, 32, deep, 2, 2)]
    if rows < 128 or terms > 1 or target.max_threads < 4 * target.subgroup_size:
        shapes = shapes[1:]
    small = [(32, 32, deepest, 2, 2), (32, 32, _MIN_DEPTH, 2, 2)]
    shapes = small if columns <= 32 or rows <= 32 else shapes + small[1:]
    plans = [_plan(shape, target, transposed, terms) for shape in shapes]
    fitting = [p for p in plans if p.memory * 16 <= _memory(p, target)] or plans[-1:]
    busy = [p for p in fitting if -(-rows // p.rows) * -(-columns // p.columns) >= _ENOUGH_TILES]
    return (busy or fitting[-1:])[0]


def _plan(shape: tuple[int, int, int, int, int], target: Target, transposed: bool, terms: int) -> Plan:
    """With as many stages as fit, where they are copied."""
    unit = (1, 1) if target.matrix_stride == "elements" else (CHUNK, VECTOR)
    plan = Plan(*shape, target.subgroup_size, unit, transposed, terms)
    copied = [] if transposed else [replace(plan, stages=n, copies=True) for n in range(_STAGES, 2, -1)]
    return next((p for p in copied if p.memory * 16 <= target.copy_memory), plan)


def _memory(plan: Plan, target: Target) -> int:
    """Bytes that a plan may take."""
    return target.copy_memory if plan.copies else target.workgroup_memory


def is_possible(size: Size, target: Target, transposed: bool, step: int, terms: int = 1) -> Legality:
    """Whether a target multiplies such matrices.

    Args:
        size: Of the product.
        target: The machine.
        transposed: See :class:`Plan`.
        step: What must divide the columns.
        terms: See :class:`Plan`.
    """
    if not target.is_gpu:
        return OtherMachine(f"{target.name} is not a GPU")
    if target.matrix_stride is None or target.subgroup_size < SIDE:
        return No(f"{target.name} is compiled for without products of 16x16 matrices")
    if size.rows is None or size.rows < _LEAST_ROWS:
        return No(f"{'?' if size.rows is None else size.rows} rows, less than {_LEAST_ROWS}")
    if size.depth % _MIN_DEPTH or size.columns % step or not size.depth:
        return No(f"K={size.depth} is not a multiple of {_MIN_DEPTH} or N={size.columns} of {step}")
    plan = plan_for(size, target, transposed, terms)
    if plan.memory * 16 > _memory(plan, target):
        return No(f"tiles do not fit in {target.workgroup_memory} bytes of a workgroup")
    return Yes()


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

    def copy(self, step: Scalar, tile: Scalar) -> None:
        """Begin to copy this thread's part there past the registers."""
        ...

    def matrix(self, depth: Scalar, across: Scalar, term: int, tile: Scalar) -> ir.Value:
        """The matrix at ``depth`` matrices down and ``across`` matrices to the right of a term's tile in memory."""
        ...

    def finish(self, sums: ir.Value, column: Scalar) -> ir.Value:
        """What becomes of four sums from column ``4 * column`` on."""
        ...


@dataclass(frozen=True)
class Extent:
    """Sizes of a product inside its kernel.

    Attributes:
        rows: M.
        depth: Chunks of a row of the left factor: K / 8.
        columns: N.
    """

    rows: Scalar
    depth: Scalar
    columns: Scalar


def workgroups(size: Size, plan: Plan) -> int:
    """Of a whole product: as many items, of one tile each."""
    assert size.rows is not None
    return -(-size.rows // plan.rows) * -(-size.columns // plan.columns)


class Product:
    """Emits the kernel: buffer 0 is the left factor, f16 [M, K]; of two terms [M, 2 K], one after the other in a row.

    Args:
        k: Emits instructions.
        size: Of the product.
        plan: How it is cut.
        right: The right factor.
        output: Binding of the result [M, N].
        dtype: Its type.
        factors: Binding of what each row of the result is to be multiplied by, f32 [M]; None for nothing.

    Attributes:
        thread: This thread's number in the workgroup.
        tile: Of the columns, the one that this workgroup computes.
        memory: The workgroup's: stages, in each the terms of the left tile, then of the right one; in the end sums.
    """

    def __init__(
        self, k: Kernel, size: Extent, plan: Plan, right: RightFactor, output: int,
        dtype: str = "f16", factors: int | None = None,
    ) -> None:  # fmt: skip
        self.k, self.size, self.p, self.right = k, size, plan, right
        self.high = plan.rows // plan.down // SIDE  # matrices of a subgroup
        self.wide = plan.columns // plan.across // SIDE
        self.vectors = size.columns.divide_unsigned(VECTOR)[0]
        self.a = k.chunks(0, size.rows * size.depth * plan.terms)
        self.y = k.buffer(output, dtype, size.rows * self.vectors, VECTOR)
        self.factors = None if factors is None else k.buffer(factors, "f32", size.rows)
        self.memory = k.shared_chunks(plan.memory)
        self.thread = k.thread()

    def emit(self) -> None:
        """Emit everything."""
        k, p = self.k, self.p
        tiles = (self.size.columns + (p.columns - 1)).divide_unsigned(p.columns)[0]
        row, self.tile = k.item_by(tiles)
        self.row = row * p.rows
        self.right.start(self)
        self.subgroup, self.lane = self.thread.divide_unsigned(p.subgroup)
        self.along, place = self.subgroup.divide_unsigned(p.down * p.across)
        self.down, self.across = place.divide_unsigned(p.across)
        self.places_a = self.places(p.rows, p.depth // CHUNK)
        self._write(self._products())

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

    def _copy(self, step: Scalar, stage: Scalar) -> None:
        """Begin to copy it there."""
        for at, place in self._chunks_a(step):
            self.k.copy_chunk(self.a, at, self.memory, stage + place)
        self.right.copy(step, stage + self.p.terms * self.p.chunks_a)

    def _products(self) -> list[ir.Value]:
        """The sums of this thread's subgroup, row after row."""
        p, each = self.p, self.high * self.wide
        steps = self.size.depth.divide_unsigned(p.depth // CHUNK)[0]
        initial = [self.k.matrix_zero() for _ in range(each * p.terms)]
        found = self._copied(steps, initial) if p.copies else self._loaded(steps, initial)
        if p.terms == 1:
            return found
        return [self.k.matrix_add_scaled(a, b, REST) for a, b in zip(found[:each], found[each:], strict=True)]

    def _next(self, stage: Scalar) -> Scalar:
        """The stage after one."""
        last = (self.p.stages - 1) * self.p.stage
        return stage.equals(last).select(Scalar.constant(0, "index"), stage + self.p.stage)

    def _loaded(self, steps: Scalar, initial: list[ir.Value]) -> list[ir.Value]:
        """Products of tiles that pass through registers."""
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

    def _copied(self, steps: Scalar, initial: list[ir.Value]) -> list[ir.Value]:
        """Products of tiles that are copied."""
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

    def _step_products(self, sums: list[ir.Value], stage: Scalar) -> list[ir.Value]:
        k, p = self.k, self.p
        unit, chunks, each = p.unit[0], SIDE // CHUNK, self.high * self.wide

        def left(depth: Scalar, term: int) -> list[ir.Value]:
            stride, start = p.stride_a * CHUNK // unit, stage + depth * chunks + term * p.chunks_a
            first = self.down * (self.high * SIDE * p.stride_a) + start
            return [k.matrix_load("AOp", self.memory, first + i * SIDE * p.stride_a, stride) for i in range(self.high)]

        def right(depth: Scalar, term: int) -> list[ir.Value]:
            tile = stage + p.terms * p.chunks_a
            return [self.right.matrix(depth, self.across * self.wide + j, term, tile) for j in range(self.wide)]

        def added(rows: list[ir.Value], columns: list[ir.Value], sums: list[ir.Value]) -> list[ir.Value]:
            pairs = [(a, b) for a in rows for b in columns]
            return [k.matrix_multiply_add(a, b, s) for (a, b), s in zip(pairs, sums, strict=True)]

        for part in range(0, p.depth // SIDE, p.along):
            depth = Scalar.constant(part, "index") if p.along == 1 else self.along + part
            first, others = left(depth, 0), right(depth, 0)
            sums[:each] = added(first, others, sums[:each])
            if p.terms > 1:  # the product of both second terms is below the last bit
                sums[each:] = added(left(depth, 1), others, sums[each:])
                sums[each:] = added(first, right(depth, 1), sums[each:])
        return sums

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
            for vector in range(0, rows * width, p.subgroup * p.along):
                inside = self.lane + self.along * p.subgroup + vector
                row, column = inside.divide_unsigned(width)
                at = place + row * p.stride_y + column
                value = k.load(self.memory, at)
                for other in range(1, p.along):
                    value = k.add(value, k.load(self.memory, at + other * p.down * p.across * size))
                row = self.row + (self.down * self.high + first) * SIDE + row
                column = self.tile * (p.columns // VECTOR) + self.across * width + column
                valid = (row < self.size.rows) & (column < self.vectors)

                def write(value: ir.Value = value, row: Scalar = row, column: Scalar = column) -> None:
                    if self.factors is not None:
                        value = k.mul(value, k.splat(k.load(self.factors, row), VECTOR))
                    k.store(self.right.finish(value, column), self.y, row * self.vectors + column)

                k.when(valid, write)
