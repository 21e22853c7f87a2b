"""Strategy ``fused_tiled``: many rows times packed weights as one GPU kernel, without matrix units.

    hal.executable.source @mat_mul_n_bits_fused_tiled_... {
      a workgroup: a tile of y; scf.for %k { a tile of A and one of unpacked weights, f32, in the workgroup's memory,
        the next ones under way; a thread: 4 x 4 to 8 x 8 sums in its registers }
      rounded, to y
    }

A weight is unpacked once a row of tiles, in registers, and lies unpacked in the workgroup's memory only. A step of K is
16 weights, so that the tiles fit in 16 KiB. Columns of the tile of weights are a chunk of 16 bytes longer than they
need, and in an order in which neighbouring threads read neighbouring ones: no bank conflicts. Where ``accuracy_level``
4 has A rounded, that is a dispatch before.

Legal: on GPUs, for any number of rows, open ones too, if 4 divides N. Cost: all multiply-adds in f32, 16 reads of 16
bytes from the workgroup's memory for 256 of them. On an H100 (Vulkan) 64 and 512 rows, K=1024 to N=3584, take 39 and
134 us, 40 % of its rate for the latter; the portable form 190 and 353 us.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..builder import spec_of, tensor_type
from ..op import LoweringContext
from ..scalar import Scalar
from ..select import Legality, No
from ..simt_kernel import Group, Kernel, dispatch
from ..target import Target
from .contract import MatMulNBits
from .operands import Operands
from .rounded_simt import emit_a
from .simt_weights import PackedWeights, bound, readable

_VECTOR = 4
_DEPTH = 16  # K of a step: every block is a multiple
_ACROSS = 16  # threads along the columns
_ENOUGH_TILES = 100  # workgroups that keep a large GPU busy
_OPEN_ROWS = 512  # what is expected where they are open
_AHEAD = 2  # tiles that are under way while one is multiplied
_CHUNKS = _DEPTH // _VECTOR  # of a row of A's tile
_STRIDE = _CHUNKS + 1  # chunks of a column of the tile of weights


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
        return self.down * _ACROSS

    @property
    def wide(self) -> int:
        """Columns of a thread."""
        return self.columns // _ACROSS

    def __str__(self) -> str:
        return f"t{self.rows}x{self.columns}h{self.high}"


_PLANS = (Plan(64, 128, 8), Plan(64, 64, 8), Plan(32, 64, 4), Plan(16, 64, 4))
"""Larger tiles first; all fit in 16 KiB and 128 threads."""


def is_legal(contract: MatMulNBits, target: Target) -> Legality:
    """On any GPU."""
    if not target.is_gpu:
        return No(f"{target.name} is not a GPU")
    if contract.columns % _VECTOR:
        return No(f"N={contract.columns} is not a multiple of {_VECTOR}")
    return readable(contract)


def describe(contract: MatMulNBits, target: Target) -> str:
    """What the report says about it."""
    del target
    plan = plan_for(contract)
    return f"f32 products of {plan.rows} rows with unpacked tiles of {plan.columns} columns"


def plan_for(contract: MatMulNBits) -> Plan:
    """The largest tiles of which there are enough, and no more rows than there are."""
    rows = contract.rows or _OPEN_ROWS
    for plan in _PLANS[:-1]:
        tiles = -(-rows // plan.rows) * -(-contract.columns // plan.columns)
        if rows > plan.rows // 2 and tiles >= _ENOUGH_TILES:
            return plan
    return _PLANS[-1]


def emit_mat_mul_n_bits_fused_tiled(context: LoweringContext, contract: MatMulNBits, x: Operands) -> ir.Value:
    """Emit the product [M, N]."""
    c, b, plan = contract, context.builder, plan_for(contract)
    a, rows = emit_a(b, c, x.a, "f32"), b.dim(x.a, 0)
    dtype = spec_of(a).dtype

    def body(k: Kernel) -> None:
        count = k.number(0) if c.rows is None else Scalar.constant(c.rows, "index")
        _Product(k, c, dtype, plan, count).emit()

    numbers = [rows] if not isinstance(rows, int) else []
    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [(tensor_type((c.rows, c.columns), c.a.dtype), numbers)]
    size = f"{'x' if c.rows is None else c.rows}x{c.depth}x{c.columns}"
    name = f"mat_mul_n_bits_fused_tiled_{dtype}_{c.key}_{size}_{plan}"
    items, tiles = b.index(b.floordiv(b.add(rows, plan.rows - 1), plan.rows)), -(-c.columns // plan.columns)
    group, inputs = Group(plan.threads, context.target.subgroup_size), [a, *bound(c, x)]
    return dispatch(name, group, tiles, items, numbers, inputs, outputs, body)[0]


class _Product:
    """Emits the kernel.

    Args:
        k: Emits instructions.
        contract: What to compute.
        dtype: Element type of A as the kernel gets it.
        plan: How the product is cut.
        rows: M.
    """

    def __init__(self, k: Kernel, contract: MatMulNBits, dtype: str, plan: Plan, rows: Scalar) -> None:
        self.k, self.c, self.p, self.rows = k, contract, plan, rows
        vectors = contract.columns // _VECTOR
        self._a = k.buffer(0, dtype, rows * (contract.padded_depth // _VECTOR), _VECTOR)
        self._weights = PackedWeights(k, contract, self._width())
        self._y = k.buffer(self._weights.output, contract.a.dtype, rows * vectors, _VECTOR)
        self._tile_a = k.shared_chunks(plan.rows * _CHUNKS)
        self._tile_b = k.shared_chunks(plan.columns * _STRIDE)
        self._thread = k.thread()
        self._down, self._across = self._thread.divide_unsigned(_ACROSS)
        self._row = k.item() * plan.rows

    def _width(self) -> int:
        """Words of a load: of a column's step, or fewer if that gives more threads a load."""
        words = _DEPTH // self.c.per_word
        return max(1, min(words, self.p.columns * words // self.p.threads))

    def emit(self) -> None:
        """Emit everything."""
        p = self.p
        self._share = _DEPTH // self._weights.per_load  # loads of a column
        self._places_a = self._places(p.rows * _CHUNKS, _CHUNKS)
        self._places_b = self._places(p.columns * self._share, p.columns)
        self._columns = [self._column(slot).minimum(self.c.columns - 1) for _, slot in self._places_b]
        self._write(self._products())

    def _places(self, loads: int, inner: int) -> list[tuple[Scalar, Scalar]]:
        """Quotient and remainder by ``inner`` of the number of each of this thread's loads of a tile."""
        return [(self._thread + load).divide_unsigned(inner) for load in range(0, loads, self.p.threads)]

    def _column(self, slot: Scalar) -> Scalar:
        """The column that lies in a slot of the tile: a thread's columns are each ``_ACROSS`` slots apart."""
        part, across = slot.divide_unsigned(_ACROSS)
        return self.k.tile() * self.p.columns + across * self.p.wide + part

    def _load(self, step: Scalar) -> list[ir.Value]:
        """This thread's part of the tiles that belong to a step of K."""
        k, c = self.k, self.c
        last = self.rows - 1
        loads: list[ir.Value] = []
        for row, chunk in self._places_a:
            start = (self._row + row).minimum(last) * (c.padded_depth // _VECTOR)
            loads.append(k.load(self._a, start + step * _CHUNKS + chunk))
        for column, (place, _) in zip(self._columns, self._places_b, strict=True):
            loads += self._weights.load(column, step * self._share + place)
        return loads

    def _put(self, loads: list[ir.Value], step: Scalar) -> None:
        """Write that part to the workgroup's memory."""
        k, weights = self.k, self._weights
        count, chunks = len(self._places_a), weights.per_load // _VECTOR
        for (row, chunk), stored in zip(self._places_a, loads, strict=False):
            k.store(k.widen(self._a, stored), self._tile_a, row * _CHUNKS + chunk)
        size = (len(loads) - count) // len(self._places_b)

        def write() -> None:
            for i, (place, slot) in enumerate(self._places_b):
                part = loads[count + i * size : count + (i + 1) * size]
                values = weights.dequantise(part, self._columns[i], step * self._share + place)
                for j in range(chunks):
                    chunk = k.join(values[j * _VECTOR : (j + 1) * _VECTOR])
                    k.store(chunk, self._tile_b, slot * _STRIDE + place * chunks + j)

        if self.p.columns * self._share < self.p.threads:  # with few bits there are fewer loads than threads
            k.when(self._thread < self.p.columns * self._share, write)
        else:
            write()

    def _products(self) -> list[ir.Value]:
        """The sums of this thread, row after row."""
        k = self.k
        steps = self.c.padded_depth // _DEPTH
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
        for chunk in range(_CHUNKS):
            slots = [self._across + j * _ACROSS for j in range(p.wide)]
            right = [k.elements(k.load(self._tile_b, slot * _STRIDE + chunk)) for slot in slots]
            for r in range(p.high):
                row = self._down + r * p.down
                left = k.elements(k.load(self._tile_a, row * _CHUNKS + chunk))
                for j, column in enumerate(right, start=r * p.wide):
                    for x, y in zip(left, column, strict=True):
                        sums[j] = k.fma(x, y, sums[j])
        return sums

    def _write(self, sums: list[ir.Value]) -> None:
        k, c, p = self.k, self.c, self.p
        vectors = c.columns // _VECTOR
        for v in range(p.wide // _VECTOR):
            column = (k.tile() * _ACROSS + self._across) * (p.wide // _VECTOR) + v
            bias: ir.Value | None = None
            if c.with_bias:
                first = column.minimum(vectors - 1) * _VECTOR
                bias = k.join([self._weights.bias(first + i) for i in range(_VECTOR)])
            for r in range(p.high):
                start = r * p.wide + v * _VECTOR
                value = k.join(sums[start : start + _VECTOR])
                row = self._row + self._down + r * p.down
                result = value if bias is None else k.add(value, bias)

                def write(row: Scalar = row, column: Scalar = column, result: ir.Value = result) -> None:
                    k.store(result, self._y, row * vectors + column)

                k.when((row < self.rows) & (column < vectors), write)
