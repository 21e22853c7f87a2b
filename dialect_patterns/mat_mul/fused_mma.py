"""Strategy ``fused_mma``: a product of f16 matrices on the matrix units, as one GPU kernel.

    hal.executable.source @mat_mul_fused_mma_... {
      a workgroup: a tile of y; scf.for %k { tiles of a and b through the workgroup's memory, the next ones under way;
        a subgroup: 16 x 16 products, gpu.subgroup_mma_compute, sums in f32 in its registers }
      sums through the workgroup's memory, rounded, to y
    }

Tensor cores on CUDA and cooperative matrices on Vulkan are made of the same text. Rows of the tiles in the workgroup's
memory are one chunk of 16 bytes longer than they need, against bank conflicts. Rows and columns beyond the end are read
from the last one and not written.

Legal: f16 on GPUs with such products, for static sizes, if 32 divides K and 8 divides N. Cost: a once a column of tiles
and b once a row of tiles, from the second-level cache mostly. Source: ONNX schema MatMul-13.
"""

from __future__ import annotations

from dataclasses import dataclass

from iree.compiler import ir

from ..builder import tensor_type
from ..op import LoweringContext
from ..scalar import Scalar
from ..select import Legality, No, Yes
from ..simt_kernel import Group, Kernel, dispatch
from ..target import Target
from .contract import MatMul

_SIDE = 16  # of a matrix
_CHUNK = 8  # f16 of a chunk
_VECTOR = 4  # f32 of a chunk, columns of one store
_LEAST_ROWS = 9  # fewer are the business of fused_simt
_ENOUGH_TILES = 100  # workgroups that keep a large GPU busy
_MIN_DEPTH = 32
_AHEAD = 2  # tiles of a and b that are under way while one is multiplied


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
    """

    rows: int
    columns: int
    depth: int
    down: int
    across: int
    subgroup: int
    unit: tuple[int, int]

    @property
    def threads(self) -> int:
        """Threads of a workgroup."""
        return self.subgroup * self.down * self.across

    @property
    def memory(self) -> int:
        """Chunks of the workgroup's memory: the tiles of a and b, and 16 rows of sums a subgroup."""
        return self.rows * self.stride_a + self.depth * self.stride_b + self.down * self.across * _SIDE * self.stride_y

    @property
    def stride_a(self) -> int:
        """Chunks from row to row of the tile of a."""
        return self.depth // _CHUNK + 1

    @property
    def stride_b(self) -> int:
        """Chunks from row to row of the tile of b."""
        return self.columns // _CHUNK + 1

    @property
    def stride_y(self) -> int:
        """Chunks from row to row of a subgroup's sums."""
        return self.columns // self.across // _VECTOR + 1

    def __str__(self) -> str:
        return f"t{self.rows}x{self.columns}x{self.depth}s{self.down}x{self.across}"


def is_legal(contract: MatMul, target: Target) -> Legality:
    """Where subgroups multiply matrices, for f16."""
    if not target.is_gpu:
        return No(f"{target.name} is not a GPU")
    if target.matrix_stride is None or target.subgroup_size < _SIDE:
        return No(f"{target.name} is compiled for without products of 16x16 matrices")
    if contract.a.dtype != "f16":
        return No(f"{contract.a.dtype}, not f16")
    if not contract.is_plain:
        return No(f"{contract.a} by {contract.b} is not rows times one matrix")
    if contract.rows is None or contract.rows < _LEAST_ROWS:
        return No(f"{'?' if contract.rows is None else contract.rows} rows, less than {_LEAST_ROWS}")
    if contract.depth % _MIN_DEPTH or contract.columns % _CHUNK or not contract.depth:
        return No(f"K={contract.depth} is not a multiple of {_MIN_DEPTH} or N={contract.columns} of {_CHUNK}")
    if plan_for(contract, target).memory * 16 > target.workgroup_memory:
        return No(f"tiles do not fit in {target.workgroup_memory} bytes of a workgroup")
    return Yes()


def plan_for(contract: MatMul, target: Target) -> Plan:
    """The largest tiles of which there are enough; by measurement (H100)."""
    rows, columns = contract.rows or 0, contract.columns
    unit = (1, 1) if target.matrix_stride == "elements" else (_CHUNK, _VECTOR)
    deep = 64 if contract.depth % 64 == 0 else _MIN_DEPTH
    tiles = -(-rows // 128) * -(-columns // 128)
    if rows >= 128 and tiles >= _ENOUGH_TILES and target.max_threads >= 8 * target.subgroup_size:
        return Plan(128, 128, _MIN_DEPTH, 2, 4, target.subgroup_size, unit)
    if columns <= 32 or rows <= 32:
        return Plan(32, 32, deep, 2, 2, target.subgroup_size, unit)
    return Plan(64, 64, deep, 2, 2, target.subgroup_size, unit)


def emit_mat_mul_fused_mma(context: LoweringContext, contract: MatMul, a: ir.Value, b: ir.Value) -> ir.Value:
    """Emit the product."""
    c, plan = contract, plan_for(contract, context.target)
    assert c.rows is not None
    sizes = [size or 0 for size in c.a.shape[:-1]] + [c.columns]
    tiles, items = -(-c.columns // plan.columns), -(-c.rows // plan.rows)

    def body(k: Kernel) -> None:
        _Product(k, c, c.rows or 0, plan).emit()

    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [(tensor_type(sizes, c.a.dtype), [])]
    name = f"mat_mul_fused_mma_f16_{c.rows}x{c.depth}x{c.columns}_{plan}"
    group, count = Group(plan.threads, plan.subgroup), context.builder.index(items)
    return dispatch(name, group, tiles, count, [], [a, b], outputs, body)[0]


class _Product:
    """Emits the kernel.

    Args:
        k: Emits instructions.
        contract: What to compute.
        rows: M.
        plan: How it is cut.
    """

    def __init__(self, k: Kernel, contract: MatMul, rows: int, plan: Plan) -> None:
        self.k, self.c, self.rows, self.p = k, contract, rows, plan
        self.high = plan.rows // plan.down // _SIDE  # matrices of a subgroup
        self.wide = plan.columns // plan.across // _SIDE

    def emit(self) -> None:
        """Emit everything."""
        k, c, p = self.k, self.c, self.p
        self.a = k.chunks(0, Scalar.constant(self.rows * c.depth // _CHUNK, "index"))
        self.b = k.chunks(1, Scalar.constant(c.depth * c.columns // _CHUNK, "index"))
        self.y = k.buffer(2, c.a.dtype, Scalar.constant(self.rows * c.columns // _VECTOR, "index"), _VECTOR)
        self.tile_a = k.shared_chunks(p.rows * p.stride_a)
        self.tile_b = k.shared_chunks(p.depth * p.stride_b)
        self.sums = k.shared_chunks(p.down * p.across * _SIDE * p.stride_y)
        self.thread = k.thread()
        self.subgroup, self.lane = self.thread.divide_unsigned(p.subgroup)
        self.down, self.across = self.subgroup.divide_unsigned(p.across)
        self.row, self.column = k.item() * p.rows, k.tile() * p.columns
        self.places_a = [self._place(i, p.depth // _CHUNK) for i in range(p.rows * p.depth // _CHUNK // p.threads)]
        self.places_b = [self._place(i, p.columns // _CHUNK) for i in range(p.columns * p.depth // _CHUNK // p.threads)]
        self._write(self._products())

    def _place(self, load: int, chunks: int) -> tuple[Scalar, Scalar]:
        """Row and chunk in a tile of this thread's load number ``load``."""
        return (self.thread + load * self.p.threads).divide_unsigned(chunks)

    def _loads(self, step: Scalar) -> list[ir.Value]:
        """This thread's part of the tiles that belong to a step of K."""
        k, c, p = self.k, self.c, self.p
        across, last = c.columns // _CHUNK, c.columns // _CHUNK - 1
        loads: list[ir.Value] = []
        for row, chunk in self.places_a:
            start = (self.row + row).minimum(self.rows - 1) * (c.depth // _CHUNK)
            loads.append(k.load(self.a, start + chunk + step * (p.depth // _CHUNK)))
        for row, chunk in self.places_b:
            column = (k.tile() * (p.columns // _CHUNK) + chunk).minimum(last)
            loads.append(k.load(self.b, (step * p.depth + row) * across + column))
        return loads

    def _products(self) -> list[ir.Value]:
        """The sums of this thread's subgroup, row after row."""
        k, p = self.k, self.p
        steps = self.c.depth // p.depth
        zero = Scalar.constant(0, "index")
        ahead = [self._loads(Scalar.constant(min(i, steps - 1), "index")) for i in range(_AHEAD)]
        size, count = len(ahead[0]), len(ahead[0]) * _AHEAD

        def step(index: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            loaded, later, sums = carried[:size], carried[size:count], carried[count:]
            k.barrier()
            for (row, chunk), value in zip(self.places_a, loaded, strict=False):
                k.store_as_is(value, self.tile_a, row * p.stride_a + chunk)
            for (row, chunk), value in zip(self.places_b, loaded[len(self.places_a) :], strict=True):
                k.store_as_is(value, self.tile_b, row * p.stride_b + chunk)
            k.barrier()
            following = self._loads((index + _AHEAD).minimum(steps - 1))
            return [*later, *following, *self._step_products(sums)]

        initial = [*(v for loads in ahead for v in loads), *[k.matrix_zero() for _ in range(self.high * self.wide)]]
        return k.loop(zero, Scalar.constant(steps, "index"), 1, initial, step)[count:]

    def _step_products(self, sums: list[ir.Value]) -> list[ir.Value]:
        k, p = self.k, self.p
        unit, chunks = p.unit[0], _SIDE // _CHUNK
        for depth in range(p.depth // _SIDE):
            left = [
                k.matrix_load("AOp", self.tile_a, (self.down * self.high + i) * (_SIDE * p.stride_a) + depth * chunks,
                             p.stride_a * _CHUNK // unit)
                for i in range(self.high)
            ]  # fmt: skip
            right = [
                k.matrix_load("BOp", self.tile_b, (self.across * self.wide + j) * chunks + depth * _SIDE * p.stride_b,
                             p.stride_b * _CHUNK // unit)
                for j in range(self.wide)
            ]  # fmt: skip
            pairs = [(a, b) for a in left for b in right]
            sums = [k.matrix_multiply_add(a, b, s) for (a, b), s in zip(pairs, sums, strict=True)]
        return sums

    def _write(self, sums: list[ir.Value]) -> None:
        """Sixteen rows of each subgroup at a time, through its part of the workgroup's memory."""
        k, c, p = self.k, self.c, self.p
        base, width = self.subgroup * (_SIDE * p.stride_y), self.wide * _SIDE // _VECTOR
        for i in range(self.high):
            k.barrier()
            for j in range(self.wide):
                start = base + j * (_SIDE // _VECTOR)
                k.matrix_store(sums[i * self.wide + j], self.sums, start, p.stride_y * _VECTOR // p.unit[1])
            k.barrier()
            for vector in range(0, _SIDE * width, p.subgroup):
                row, place = (self.lane + vector).divide_unsigned(width)
                value = k.load(self.sums, base + row * p.stride_y + place)
                row = self.row + (self.down * self.high + i) * _SIDE + row
                column = k.tile() * (p.columns // _VECTOR) + self.across * width + place
                valid = (row < self.rows) & (column < c.columns // _VECTOR)

                def write(value: ir.Value = value, row: Scalar = row, column: Scalar = column) -> None:
                    k.store(value, self.y, row * (c.columns // _VECTOR) + column)

                k.when(valid, write)
