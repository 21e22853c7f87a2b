"""Strategy ``fused_simt``: few rows times a matrix as one GPU kernel that reads each weight once.

    y[m, n] = sum_k a[m, k] b[k, n]                 M up to 8, or N up to 32; sums in f32

    hal.executable.source @mat_mul_fused_simt_... {
      a thread: 4 neighbouring columns, every R-th group of 4 rows of b; scf.for %group { 4 x 4 weights, M x 4 fma }
      gpu.shuffle sums over a subgroup, then over the subgroups through the workgroup's memory; store
    }

Neighbouring threads read neighbouring columns, so that a row of a tile is whole sectors of memory. Such a product is as
fast as memory is; the threads are as many as keep enough loads under way. Several products of one ``a`` are one kernel
too (``joined.py``): a workgroup looks which of them its tile belongs to, or computes a gated pair.

Many rows are blocks of 8, each read by workgroups of its own: a matrix of few columns, of a prompt's gates, comes out
of a cache. On an H100 IREE's own products of 512 rows, K=1024 and N=16 in f32 take 130 to 250 us.

Legal: on GPUs, for 1 to 8 static rows, or any number where columns are few, if 4 divides K and N. Cost: b once a block
of rows, a once a tile of columns.
Source: ONNX schema MatMul-13.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..emit.builder import tensor_type
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer, Group, Kernel, dispatch
from ..op import LoweringContext
from ..select import Legality, No, OtherMachine, Yes
from ..target import Target
from .contract import MatMul

_WIDTH = 4  # columns of a thread, rows of a group
_MAX_ROWS = 8  # of a workgroup
_FEW_COLUMNS = 32
_ENOUGH_TILES = 128  # workgroups that keep a large GPU busy
_LEAST_GROUPS = 4  # of a thread
_UNROLL = 4  # groups whose loads are under way


@dataclass(frozen=True)
class Plan:
    """How the product is cut.

    Attributes:
        lanes: Threads along the columns of a tile.
        across: Threads along the rows of b.
        subgroup: Threads of a subgroup, 0 to do without its operations.
    """

    lanes: int
    across: int
    subgroup: int

    @property
    def threads(self) -> int:
        """Threads of a workgroup."""
        return self.lanes * self.across

    @property
    def tile(self) -> int:
        """Columns of a workgroup."""
        return self.lanes * _WIDTH

    @property
    def partial(self) -> int:
        """Sums of a column that meet in the workgroup's memory."""
        return self.threads // self.subgroup if self.subgroup else self.across

    def memory(self, rows: int) -> int:
        """Bytes of the workgroup's memory for that many rows."""
        return 4 * self.partial * rows * self.tile


def is_legal(contract: MatMul, target: Target) -> Legality:
    """On a GPU, for a few rows."""
    if not target.is_gpu:
        return OtherMachine(f"{target.name} is not a GPU")
    if not contract.is_plain:
        return No(f"{contract.a} by {contract.b} is not rows times one matrix")
    if contract.rows is None or not contract.rows:
        return No(f"{'?' if contract.rows is None else contract.rows} rows")
    if contract.rows > _MAX_ROWS and not is_narrow(contract):
        return No(f"{contract.rows} rows, not 1 to {_MAX_ROWS}, of more than {_FEW_COLUMNS} columns")
    if contract.depth % _WIDTH or contract.columns % _WIDTH or not contract.depth:
        return No(f"K={contract.depth} or N={contract.columns} is not a multiple of {_WIDTH}")
    return Yes()


def is_narrow(contract: MatMul) -> bool:
    """Whether columns are so few that many rows are no reason for another strategy."""
    return contract.columns <= _FEW_COLUMNS


def plan_for(contract: MatMul, target: Target, weights: int = 1) -> Plan:
    """The widest tiles of which there are enough, and threads for a few groups of rows each; by measurement (H100).

    Args:
        contract: The product.
        target: The machine.
        weights: Matrices that a thread multiplies with.
    """
    subgroup = target.subgroup_size
    vectors, groups = contract.columns // _WIDTH, contract.depth // _WIDTH
    lanes = 4
    while lanes < max(subgroup, 8) and vectors // (2 * lanes) >= _ENOUGH_TILES:
        lanes *= 2
    plan = Plan(lanes, 1, 0)
    while groups % (2 * plan.across) == 0 and groups // plan.across > _LEAST_GROUPS:
        across = 2 * plan.across
        wider = Plan(lanes, across, subgroup if subgroup and lanes * across % subgroup == 0 else 0)
        memory = wider.memory(weights * min(contract.rows or 1, _MAX_ROWS))
        if wider.threads > target.max_threads or memory > target.workgroup_memory:
            break
        plan = wider
    return plan


def emit_mat_mul_fused_simt(context: LoweringContext, contract: MatMul, a: ir.Value, b: ir.Value) -> ir.Value:
    """Emit the product."""
    return emit_products(context, [contract], a, [b], False)[0]


def emit_products(
    context: LoweringContext, products: Sequence[MatMul], a: ir.Value, weights: Sequence[ir.Value], gated: bool
) -> list[ir.Value]:
    """Emit products of one ``a`` as one kernel.

    Args:
        context: Where, and for what.
        products: What each computes; all legal.
        a: Their left operand.
        weights: The right operand of each.
        gated: Whether there are two, of equal columns, and the one result is silu(first) * second.
    """
    c = products[0]
    assert c.rows is not None
    columns = [product.columns for product in products]
    outputs = columns[:1] if gated else columns
    plan = plan_for(max(products, key=lambda product: product.columns), context.target, 2 if gated else 1)
    tiles = [-(-count // plan.tile) for count in outputs]
    kind = "_gated" if gated else "_of" + "_".join(map(str, columns)) if len(columns) > 1 else ""
    name = f"mat_mul_fused_simt_{c.a.dtype}_{c.rows}x{c.depth}x{sum(columns)}{kind}"
    name += f"_l{plan.lanes}r{plan.across}g{plan.subgroup}"

    def body(k: Kernel) -> None:
        _Products(k, c.a.dtype, c.rows or 0, c.depth, plan).emit(columns, tiles, gated)

    blocks = context.builder.index(-(-c.rows // _MAX_ROWS))
    lead = [size or 0 for size in c.a.shape[:-1]]
    results: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [
        (tensor_type([*lead, count], c.a.dtype), []) for count in outputs
    ]
    group = Group(plan.threads, plan.subgroup)
    return dispatch(name, group, sum(tiles), blocks, [], [a, *weights], results, body)


@dataclass
class _Products:
    """Emits the kernel.

    Attributes:
        k: Emits instructions.
        dtype: Of all operands.
        count: M.
        depth: K.
        p: How it is cut.
    """

    k: Kernel
    dtype: str
    count: int
    depth: int
    p: Plan

    def __post_init__(self) -> None:
        self.rows = min(self.count, _MAX_ROWS)  # of a workgroup
        self.first = self.k.item() * self.rows if self.count > self.rows else None

    def emit(self, columns: Sequence[int], tiles: Sequence[int], gated: bool) -> None:
        """Emit everything.

        Args:
            columns: N of each right operand.
            tiles: Workgroups of each result.
            gated: See :func:`emit_products`.
        """
        k, p, count = self.k, self.p, len(columns)
        self.a = k.buffer(0, self.dtype, self._count(self.count * self.depth // _WIDTH), _WIDTH)
        b = [k.buffer(1 + i, self.dtype, self._count(self.depth * n // _WIDTH), _WIDTH) for i, n in enumerate(columns)]
        y = [
            k.buffer(1 + count + i, self.dtype, self._count(self.count * n))
            for i, n in enumerate(columns[: len(tiles)])
        ]
        self.across, self.lane = k.thread().divide_unsigned(p.lanes)
        self.scratch = k.shared(p.partial * self.rows * p.tile * (2 if gated else 1))
        tile = k.tile()
        if len(tiles) == 1:
            self._emit_tile(b, y[0], columns[0], tile)
            return
        start = 0
        for weight, output, n, number in zip(b, y, columns, tiles, strict=True):
            first = start

            def one(weight: Buffer = weight, output: Buffer = output, n: int = n, first: int = first) -> None:
                self._emit_tile([weight], output, n, tile - first)

            start += number
            k.when((tile >= first) & (tile < start), one)

    def _count(self, elements: int) -> Scalar:
        return Scalar.constant(elements, "index")

    def _emit_tile(self, b: Sequence[Buffer], y: Buffer, columns: int, tile: Scalar) -> None:
        p, vectors = self.p, columns // _WIDTH
        column = tile * p.lanes + self.lane
        if vectors % p.lanes:  # threads beyond the last column compute it again and write nothing
            column = column.minimum(vectors - 1)
        self._share([sums for weight in b for sums in self._sums(weight, vectors, column)])
        self._write(y, columns, tile, len(b) > 1)

    def _sums(self, b: Buffer, vectors: int, column: Scalar) -> list[ir.Value]:
        """This thread's part of each row's sums."""
        k, p = self.k, self.p
        groups = self.depth // _WIDTH // p.across
        unroll = max(u for u in range(1, _UNROLL + 1) if groups % u == 0)

        def step(index: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            places = [(index + u) * p.across + self.across for u in range(unroll)]
            weights = [[k.load(b, (place * _WIDTH + r) * vectors + column) for r in range(_WIDTH)] for place in places]
            inputs = [
                [k.load(self.a, place + self._row(m) * (self.depth // _WIDTH)) for m in range(self.rows)]
                for place in places
            ]
            sums = list(carried)
            for four, given in zip(weights, inputs, strict=True):
                wide = [k.widen(b, weight) for weight in four]
                for m, stored in enumerate(given):
                    for factor, weight in zip(k.elements(k.widen(self.a, stored)), wide, strict=True):
                        sums[m] = k.fma(k.splat(factor, _WIDTH), weight, sums[m])
            return sums

        zero = [k.constant(0.0, _WIDTH)] * self.rows
        start = Scalar.constant(0, "index")
        if groups == unroll:
            return step(start, zero)
        return k.loop(start, Scalar.constant(groups, "index"), unroll, zero, step)

    def _row(self, m: int) -> Scalar:
        """Row ``m`` of the workgroup's, or the last one there is."""
        if self.first is None:
            return Scalar.constant(m, "index")
        return (self.first + m).minimum(self.count - 1)

    def _share(self, sums: list[ir.Value]) -> None:
        """Puts this thread's sums, or those of its subgroup, into the workgroup's memory."""
        k, p = self.k, self.p
        if p.subgroup:
            offset = p.lanes
            while offset < p.subgroup:
                sums = [k.join([k.add(e, k.shuffle_xor(e, offset)) for e in k.elements(s)]) for s in sums]
                offset *= 2
        size = len(sums) * p.tile
        place, first = self.across, None
        if p.subgroup:
            place, inside = k.thread().divide_unsigned(p.subgroup)
            first = inside < p.lanes

        def put() -> None:
            for m, value in enumerate(sums):
                for i, element in enumerate(k.elements(value)):
                    k.store(element, self.scratch, place * size + (m * p.tile + i) + self.lane * _WIDTH)

        if first is None or p.lanes == p.subgroup:
            put()
        else:
            k.when(first, put)
        k.barrier()

    def _write(self, y: Buffer, columns: int, tile: Scalar, gated: bool) -> None:
        """The sums over the workgroup, spread over its threads."""
        k, p = self.k, self.p
        size = self.rows * p.tile
        for start in range(0, size, p.threads):
            element = k.thread() + start
            inside = element.minimum(size - 1)
            value = self._total(inside, 2 * size if gated else size)
            if gated:
                value = k.mul(self._silu(value), self._total(inside + size, 2 * size))
            row, place = element.divide_unsigned(p.tile)
            column = tile * p.tile + place
            valid = (element < size) & (column < columns)
            if self.first is not None:
                row = self.first + row
                valid = valid & (row < self.count)

            def write(value: ir.Value = value, row: Scalar = row, column: Scalar = column) -> None:
                k.store(value, y, row * columns + column)

            k.when(valid, write)

    def _total(self, element: Scalar, size: int) -> ir.Value:
        """The sum of an element's ``partial`` parts, of ``size`` elements each."""
        k = self.k
        found = [k.load(self.scratch, element + part * size) for part in range(self.p.partial)]
        while len(found) > 1:
            found = [k.add(found[i], found[i + 1]) if i + 1 < len(found) else found[i] for i in range(0, len(found), 2)]
        return found[0]

    def _silu(self, value: ir.Value) -> ir.Value:
        k = self.k
        return k.div(value, k.add(k.constant(1.0), k.exp(k.neg(value))))
