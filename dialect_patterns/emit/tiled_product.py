"""Many rows times a matrix as one GPU kernel without matrix units: the tiles, whatever the weights are stored as.

    hal.executable.source @..._fused_tiled_... {
      a workgroup: a tile of y; scf.for %k { a tile of A and one of weights, f32, in the workgroup's memory,
        the next ones under way; a thread: 4 x 4 to 8 x 8 sums in its registers }
      rounded, to y
    }

A step of K is 16 weights, so that the tiles fit in 16 KiB. Columns of the tile of weights are a chunk of 16 bytes
longer than they need, and in an order in which neighbouring threads read neighbouring ones: no bank conflicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from iree.compiler import ir

from .scalar import Scalar
from .simt_kernel import Buffer, Kernel

VECTOR = 4
DEPTH = 16
"""K of a step."""
CHUNKS = DEPTH // VECTOR
"""Chunks of a step in a row of A or a column of weights."""
STRIDE = CHUNKS + 1
"""Chunks of a column in the tile of weights."""
ACROSS = 16
"""Threads along the columns."""
_ENOUGH_TILES = 100  # workgroups that keep a large GPU busy
_OPEN_ROWS = 512  # what is expected where they are open
_AHEAD = 2  # tiles that are under way while one is multiplied


@dataclass(frozen=True)
class Plan:
    """How the product is cut.

    Attributes:
        rows: Of a workgroup's tile.
        columns: Of a workgroup's tile.
        high: Rows of a thread.
    """

    rows: int
    columns: int
    high: int

    @property
    def down(self) -> int:
        """Threads along the rows."""
        return self.rows // self.high

    @property
    def threads(self) -> int:
        """Threads of a workgroup."""
        return self.down * ACROSS

    @property
    def wide(self) -> int:
        """Columns of a thread."""
        return self.columns // ACROSS

    def __str__(self) -> str:
        return f"t{self.rows}x{self.columns}h{self.high}"


_PLANS = (Plan(64, 128, 8), Plan(64, 64, 8), Plan(32, 64, 4), Plan(16, 64, 4))
"""Larger tiles first; all fit in 16 KiB and 128 threads."""


def plan_for(rows: int | None, columns: int) -> Plan:
    """The largest tiles of which there are enough, and no more rows than there are."""
    rows = rows or _OPEN_ROWS
    for plan in _PLANS[:-1]:
        tiles = -(-rows // plan.rows) * -(-columns // plan.columns)
        if rows > plan.rows // 2 and tiles >= _ENOUGH_TILES:
            return plan
    return _PLANS[-1]


def places(thread: Scalar, loads: int, inner: int, threads: int) -> list[tuple[Scalar, Scalar]]:
    """Quotient and remainder by ``inner`` of the number of each of a thread's loads of a tile."""
    return [(thread + load).divide_unsigned(inner) for load in range(0, loads, threads)]


class WeightsTile(Protocol):
    """Brings the weights of a step into the workgroup's memory."""

    def load(self, step: Scalar) -> list[ir.Value]:
        """This thread's part of a step's weights, as stored."""
        ...

    def put(self, loads: list[ir.Value], step: Scalar) -> None:
        """Write them, in f32: chunk ``j`` of the column of slot ``s`` is chunk ``s * STRIDE + j`` of the tile."""
        ...

    def bias(self, column: Scalar) -> ir.Value | None:
        """What is added to a column, if anything."""
        ...


class TiledProduct:
    """Emits the kernel.

    Args:
        k: Emits instructions.
        plan: How the product is cut.
        a: Rows of A, of ``depth // VECTOR`` loads each.
        y: Rows of the result, of ``columns // VECTOR`` vectors each.
        rows: M.
        depth: K, a multiple of `DEPTH`.
        columns: N, a multiple of `VECTOR`.
    """

    def __init__(self, k: Kernel, plan: Plan, a: Buffer, y: Buffer, rows: Scalar, depth: int, columns: int) -> None:
        self.k, self.p, self.rows = k, plan, rows
        self._a, self._y, self._depth, self._vectors = a, y, depth, columns // VECTOR
        self._tile_a = k.shared_chunks(plan.rows * CHUNKS)
        self.tile_b = k.shared_chunks(plan.columns * STRIDE)
        self.thread = k.thread()
        self._down, self._across = self.thread.divide_unsigned(ACROSS)
        self._row = k.item() * plan.rows

    def column(self, slot: Scalar) -> Scalar:
        """The column that lies in a slot of the tile: a thread's columns are each ``ACROSS`` slots apart."""
        part, across = slot.divide_unsigned(ACROSS)
        return self.k.tile() * self.p.columns + across * self.p.wide + part

    def emit(self, weights: WeightsTile) -> None:
        """Emit everything."""
        self._weights = weights
        self._places_a = places(self.thread, self.p.rows * CHUNKS, CHUNKS, self.p.threads)
        self._write(self._products())

    def _load(self, step: Scalar) -> list[ir.Value]:
        """This thread's part of the tiles that belong to a step of K."""
        k, last = self.k, self.rows - 1
        loads: list[ir.Value] = []
        for row, chunk in self._places_a:
            start = (self._row + row).minimum(last) * (self._depth // VECTOR)
            loads.append(k.load(self._a, start + step * CHUNKS + chunk))
        return [*loads, *self._weights.load(step)]

    def _put(self, loads: list[ir.Value], step: Scalar) -> None:
        """Write that part to the workgroup's memory."""
        k, count = self.k, len(self._places_a)
        for (row, chunk), stored in zip(self._places_a, loads, strict=False):
            k.store(k.widen(self._a, stored), self._tile_a, row * CHUNKS + chunk)
        self._weights.put(loads[count:], step)

    def _products(self) -> list[ir.Value]:
        """The sums of this thread, row after row."""
        k = self.k
        steps = self._depth // DEPTH
        zero = Scalar.constant(0, "index")
        ahead = [self._load(Scalar.constant(min(i, steps - 1), "index")) for i in range(_AHEAD)]
        size, count = len(ahead[0]), len(ahead[0]) * _AHEAD

        def step(index: Scalar, carried: list[ir.Value]) -> Sequence[ir.Value]:
            k.barrier()
            self._put(carried[:size], index)
            k.barrier()
            following = self._load((index + _AHEAD).minimum(steps - 1))
            return [*carried[size:count], *following, *self._step_products(carried[count:])]

        initial = [*(v for loads in ahead for v in loads), *[k.constant(0.0)] * (self.p.high * self.p.wide)]
        return k.loop(zero, Scalar.constant(steps, "index"), 1, initial, step)[count:]

    def _step_products(self, sums: list[ir.Value]) -> list[ir.Value]:
        """Add the products of a step; as a loop, 8 x 8 sums take a quarter longer on NVIDIA's Vulkan."""
        k, p = self.k, self.p
        sums = list(sums)
        for chunk in range(CHUNKS):
            slots = [self._across + j * ACROSS for j in range(p.wide)]
            right = [k.elements(k.load(self.tile_b, slot * STRIDE + chunk)) for slot in slots]
            for r in range(p.high):
                row = self._down + r * p.down
                left = k.elements(k.load(self._tile_a, row * CHUNKS + chunk))
                for j, column in enumerate(right, start=r * p.wide):
                    for x, y in zip(left, column, strict=True):
                        sums[j] = k.fma(x, y, sums[j])
        return sums

    def _write(self, sums: list[ir.Value]) -> None:
        k, p, vectors = self.k, self.p, self._vectors
        for v in range(p.wide // VECTOR):
            column = (k.tile() * ACROSS + self._across) * (p.wide // VECTOR) + v
            parts = [self._weights.bias(column.minimum(vectors - 1) * VECTOR + i) for i in range(VECTOR)]
            known = [part for part in parts if part is not None]
            bias = k.join(known) if known else None
            for r in range(p.high):
                start = r * p.wide + v * VECTOR
                value = k.join(sums[start : start + VECTOR])
                row = self._row + self._down + r * p.down
                result = value if bias is None else k.add(value, bias)

                def write(row: Scalar = row, column: Scalar = column, result: ir.Value = result) -> None:
                    k.store(result, self._y, row * vectors + column)

                k.when((row < self.rows) & (column < vectors), write)
