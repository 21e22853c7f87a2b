"""Strategy ``fused_simt``: few rows times a matrix as one GPU kernel that reads each weight once.

    y[m, n] = sum_k a[m, k] b[k, n]                 M up to 8, sums in f32

    hal.executable.source @mat_mul_fused_simt_... {
      a thread: 4 neighbouring columns, every R-th group of 4 rows of b; scf.for %group { 4 x 4 weights, M x 4 fma }
      gpu.shuffle sums over a subgroup, then over the subgroups through the workgroup's memory; store
    }

Neighbouring threads read neighbouring columns, so that a row of a tile is whole sectors of memory. Such a product is as
fast as memory is; the threads are as many as keep enough loads under way.

Legal: on GPUs, for 1 to 8 static rows, if 4 divides K and N. Cost: b once, a once a tile of columns.
Source: ONNX schema MatMul-13.
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

_WIDTH = 4  # columns of a thread, rows of a group
_MAX_ROWS = 8
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
        return No(f"{target.name} is not a GPU")
    if not contract.is_plain:
        return No(f"{contract.a} by {contract.b} is not rows times one matrix")
    if contract.rows is None or not 1 <= contract.rows <= _MAX_ROWS:
        return No(f"{'?' if contract.rows is None else contract.rows} rows, not 1 to {_MAX_ROWS}")
    if contract.depth % _WIDTH or contract.columns % _WIDTH or not contract.depth:
        return No(f"K={contract.depth} or N={contract.columns} is not a multiple of {_WIDTH}")
    return Yes()


def plan_for(contract: MatMul, target: Target) -> Plan:
    """The widest tiles of which there are enough, and threads for a few groups of rows each; by measurement (H100)."""
    subgroup = target.subgroup_size
    vectors, groups = contract.columns // _WIDTH, contract.depth // _WIDTH
    lanes = 4
    while lanes < max(subgroup, 8) and vectors // (2 * lanes) >= _ENOUGH_TILES:
        lanes *= 2
    plan = Plan(lanes, 1, 0)
    while groups % (2 * plan.across) == 0 and groups // plan.across > _LEAST_GROUPS:
        across = 2 * plan.across
        wider = Plan(lanes, across, subgroup if subgroup and lanes * across % subgroup == 0 else 0)
        if wider.threads > target.max_threads or wider.memory(contract.rows or 1) > target.workgroup_memory:
            break
        plan = wider
    return plan


def emit_mat_mul_fused_simt(context: LoweringContext, contract: MatMul, a: ir.Value, b: ir.Value) -> ir.Value:
    """Emit the product."""
    c, plan = contract, plan_for(contract, context.target)
    assert c.rows is not None
    sizes = [size or 0 for size in c.a.shape[:-1]] + [c.columns]
    tiles = -(-c.columns // plan.tile)
    name = f"mat_mul_fused_simt_{c.a.dtype}_{c.rows}x{c.depth}x{c.columns}_l{plan.lanes}r{plan.across}g{plan.subgroup}"

    def body(k: Kernel) -> None:
        _Product(k, c, c.rows or 0, plan).emit()

    one = context.builder.index(1)
    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [(tensor_type(sizes, c.a.dtype), [])]
    return dispatch(name, Group(plan.threads, plan.subgroup), tiles, one, [], [a, b], outputs, body)[0]


@dataclass
class _Product:
    """Emits the kernel."""

    k: Kernel
    c: MatMul
    rows: int
    p: Plan

    def emit(self) -> None:
        """Emit everything."""
        k, c, p = self.k, self.c, self.p
        dtype, vectors = c.a.dtype, c.columns // _WIDTH

        def count(elements: int) -> Scalar:
            return Scalar.constant(elements, "index")

        self.a = k.buffer(0, dtype, count(self.rows * c.depth // _WIDTH), _WIDTH)
        self.b = k.buffer(1, dtype, count(c.depth * vectors), _WIDTH)
        self.y = k.buffer(2, dtype, count(self.rows * c.columns))
        across, lane = k.thread().divide_unsigned(p.lanes)
        column = k.tile() * p.lanes + lane
        if vectors % p.lanes:  # threads beyond the last column compute it again and write nothing
            column = column.minimum(vectors - 1)
        sums = self._sums(across, column)
        self._write(self._shared_sums(sums, across, lane))

    def _sums(self, across: Scalar, column: Scalar) -> list[ir.Value]:
        """This thread's part of each row's sums."""
        k, c, p = self.k, self.c, self.p
        groups, vectors = c.depth // _WIDTH // p.across, c.columns // _WIDTH
        unroll = max(u for u in range(1, _UNROLL + 1) if groups % u == 0)

        def step(index: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            places = [(index + u) * p.across + across for u in range(unroll)]
            weights = [
                [k.load(self.b, (place * _WIDTH + r) * vectors + column) for r in range(_WIDTH)] for place in places
            ]
            inputs = [[k.load(self.a, place + m * (c.depth // _WIDTH)) for m in range(self.rows)] for place in places]
            sums = list(carried)
            for four, given in zip(weights, inputs, strict=True):
                wide = [k.widen(self.b, weight) for weight in four]
                for m, stored in enumerate(given):
                    for factor, weight in zip(k.elements(k.widen(self.a, stored)), wide, strict=True):
                        sums[m] = k.fma(k.splat(factor, _WIDTH), weight, sums[m])
            return sums

        zero = [k.constant(0.0, _WIDTH)] * self.rows
        start = Scalar.constant(0, "index")
        if groups == unroll:
            return step(start, zero)
        return k.loop(start, Scalar.constant(groups, "index"), unroll, zero, step)

    def _shared_sums(self, sums: list[ir.Value], across: Scalar, lane: Scalar) -> tuple[list[ir.Value], Scalar, int]:
        """The sums over the workgroup, spread over its threads.

        Returns:
            For each of a thread's elements the sum; the first element's number; and the step to the next one.
        """
        k, p = self.k, self.p
        if p.subgroup:
            offset = p.lanes
            while offset < p.subgroup:
                sums = [k.join([k.add(e, k.shuffle_xor(e, offset)) for e in k.elements(s)]) for s in sums]
                offset *= 2
        size = self.rows * p.tile
        scratch = k.shared(p.partial * size)
        place, first = across, None
        if p.subgroup:
            place, inside = k.thread().divide_unsigned(p.subgroup)
            first = inside < p.lanes

        def put() -> None:
            for m, value in enumerate(sums):
                for i, element in enumerate(k.elements(value)):
                    k.store(element, scratch, place * size + (m * p.tile + i) + lane * _WIDTH)

        if first is None or p.lanes == p.subgroup:
            put()
        else:
            k.when(first, put)
        k.barrier()
        totals: list[ir.Value] = []
        for start in range(0, size, p.threads):
            element = (k.thread() + start).minimum(size - 1)
            found = [k.load(scratch, element + part * size) for part in range(p.partial)]
            while len(found) > 1:
                found = [
                    k.add(found[i], found[i + 1]) if i + 1 < len(found) else found[i] for i in range(0, len(found), 2)
                ]
            totals.append(found[0])
        return totals, k.thread(), p.threads

    def _write(self, totals: tuple[list[ir.Value], Scalar, int]) -> None:
        k, c, p = self.k, self.c, self.p
        values, first, step = totals
        size = self.rows * p.tile
        for i, value in enumerate(values):
            element = first + i * step
            row, inside = element.divide_unsigned(p.tile)
            column = k.tile() * p.tile + inside
            valid = (element < size) & (column < c.columns)

            def write(value: ir.Value = value, row: Scalar = row, column: Scalar = column) -> None:
                k.store(value, self.y, row * c.columns + column)

            k.when(valid, write)
