"""Strategy ``fused_simt``: few rows times packed weights as one GPU kernel that reads each byte of the weights once.

    y[m, n] = sum_blocks scale[n, block] sum_k a[m, k] (q[n, k] - zero[n, block])      M up to 8, sums in f32

    hal.executable.source @mat_mul_n_bits_fused_simt_... {
      a thread: some columns, every R-th word of each; scf.for %word { unpack in registers, M fma a weight }
      gpu.shuffle sums over a subgroup, then over the subgroups through the workgroup's memory; store
    }

Neighbouring threads read neighbouring words of a column, and with them neighbouring pieces of A, which a thread uses
for all its columns. With ``accuracy_level`` 4 the threads that share a block find its largest value by shuffles, and
multiply whole numbers; without subgroup operations A is rounded in a dispatch before.

Legal: on GPUs, for 1 to 8 static rows. Cost: the weights once, A once a tile of columns; about 3 instructions a weight
of one row. On an H100 (CUDA, weights not in its caches) one row, 4 bits, K=1024 to N=3584 takes 3 us in f16, 3.4
in f32 with A rounded, N=32000 11 us where memory alone takes 6.2; the portable form 74 and 637 us.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from iree.compiler import ir

from ..emit.builder import spec_of, tensor_type
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer, Group, Kernel, dispatch
from ..op import LoweringContext
from ..select import Legality, No, OtherMachine, rows_text
from ..target import Target
from .contract import MatMulNBits
from .operands import Operands
from .rounded_simt import emit_a, inverse_and_step, largest_of, round_even
from .simt_weights import PackedWeights, bound, readable

_VECTOR = 4  # elements of A that are loaded at once
_MAX_ROWS = 8
_THREADS = 128
_WORDS = 2  # of a column, for a thread
_FEW_ROWS = 2  # up to which a thread waits for memory more than it computes
_LOADED = 32  # elements of A whose loads are under way


@dataclass(frozen=True)
class Plan:
    """How the product is cut.

    Attributes:
        across: Threads along K.
        groups: Such rows of threads in a workgroup.
        columns: Columns of a thread.
        subgroup: Threads of a subgroup, 0 to do without its operations.
        unroll: Words of a column that a thread loads at once.
    """

    across: int
    groups: int
    columns: int
    subgroup: int
    unroll: int

    @property
    def threads(self) -> int:
        """Threads of a workgroup."""
        return self.across * self.groups

    @property
    def tile(self) -> int:
        """Columns of a workgroup."""
        return self.groups * self.columns

    @property
    def shuffled(self) -> int:
        """Threads whose sums meet by shuffles."""
        return min(self.subgroup, self.across) if self.subgroup else 1

    @property
    def partial(self) -> int:
        """Sums of a column that meet in the workgroup's memory."""
        return self.across // self.shuffled

    def memory(self, rows: int) -> int:
        """Bytes of the workgroup's memory for that many rows."""
        return 4 * self.partial * rows * self.tile if self.partial > 1 else 0

    def __str__(self) -> str:
        return f"a{self.across}x{self.groups}c{self.columns}g{self.subgroup}u{self.unroll}"


def is_legal(contract: MatMulNBits, target: Target) -> Legality:
    """On a GPU, for a few rows."""
    if not target.is_gpu:
        return OtherMachine(f"{target.name} is not a GPU")
    rows = contract.rows
    if rows is None or not 1 <= rows <= _MAX_ROWS:
        return No(f"{'?' if rows is None else rows} rows, not 1 to {_MAX_ROWS}")
    return readable(contract)


def describe(contract: MatMulNBits, target: Target) -> str:
    """What the report says about it."""
    rounded = ", A rounded on the way" if rounds_itself(contract, plan_for(contract, target)) else ""
    return f"{rows_text(contract.rows)} in one kernel that reads each weight once{rounded}"


def plan_for(contract: MatMulNBits, target: Target) -> Plan:
    """Two words of a column for a thread, and as many columns as leave enough workgroups; by measurement (H100)."""
    c, subgroup, rows = contract, target.subgroup_size, contract.rows or 1
    most, across = min(_THREADS, target.max_threads), 1
    while across < most and across * _WORDS < c.row_words:
        across *= 2
    steps, unroll = -(-c.row_words // across), max(1, _LOADED // (c.per_word * rows))
    while unroll > steps:
        unroll //= 2
    few = rows <= _FEW_ROWS
    columns, enough = (4, 264) if few or not c.rounds_a else (8, 128)  # rounding wants to be shared
    plan = Plan(across, max(1, most // across), columns, subgroup, unroll)
    if subgroup and plan.threads % subgroup:
        plan = replace(plan, subgroup=0)
    while plan.columns > 1 and (c.columns < plan.tile * enough or plan.memory(rows) > target.workgroup_memory):
        plan = replace(plan, columns=plan.columns // 2)
    while plan.memory(rows) > target.workgroup_memory:
        plan = replace(plan, groups=plan.groups // 2) if plan.groups > 1 else replace(plan, across=plan.across // 2)
    return plan


def rounds_itself(contract: MatMulNBits, plan: Plan) -> bool:
    """Whether the kernel rounds A, where the contract has it rounded."""
    return contract.rounds_a and contract.block_words <= plan.shuffled


def emit_mat_mul_n_bits_fused_simt(context: LoweringContext, contract: MatMulNBits, x: Operands) -> ir.Value:
    """Emit the product [M, N]."""
    c, b, plan = contract, context.builder, plan_for(contract, context.target)
    assert c.rows is not None
    if rounds_itself(c, plan):
        a, kind = b.pad_end(x.a, 1, c.padded_depth), "round"
    else:
        a, kind = emit_a(b, c, x.a, "f32"), ""
    dtype = spec_of(a).dtype

    def body(k: Kernel) -> None:
        _Product(k, c, dtype, plan).emit()

    name = f"mat_mul_n_bits_fused_simt_{dtype}{kind}_{c.key}_{c.rows}x{c.depth}x{c.columns}_{plan}"
    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [(tensor_type((c.rows, c.columns), c.a.dtype), [])]
    group, inputs = Group(plan.threads, plan.subgroup), [a, *bound(c, x)]
    return dispatch(name, group, -(-c.columns // plan.tile), b.index(1), [], inputs, outputs, body)[0]


class _Product:
    """Emits the kernel.

    Args:
        k: Emits instructions.
        contract: What to compute.
        dtype: Element type of A as the kernel gets it.
        plan: How it is cut.
    """

    def __init__(self, k: Kernel, contract: MatMulNBits, dtype: str, plan: Plan) -> None:
        self.k, self.c, self.p, self.rows = k, contract, plan, contract.rows or 0
        self._rounds = rounds_itself(contract, plan)
        self._a = k.buffer(0, dtype, self._count(self.rows * contract.padded_depth // _VECTOR), _VECTOR)
        self._weights = PackedWeights(k, contract, 1)
        self._y = k.buffer(self._weights.output, contract.a.dtype, self._count(self.rows * contract.columns))

    @staticmethod
    def _count(elements: int) -> Scalar:
        return Scalar.constant(elements, "index")

    def emit(self) -> None:
        """Emit everything."""
        k, c, p = self.k, self.c, self.p
        self._group, self._lane = k.thread().divide_unsigned(p.across)
        first = k.tile() * p.tile + self._group * p.columns
        self._columns: list[Scalar] = [first + i for i in range(p.columns)]
        if c.columns % p.tile:  # threads beyond the last column compute it again and write nothing
            self._columns = [column.minimum(c.columns - 1) for column in self._columns]
        sums = self._shuffled(self._sums())
        if p.partial == 1:
            self._write_own(sums, first)
        else:
            self._write_shared(sums)

    # ---- sums of a thread, [row][column] in one list ----------------------------------------------------------------
    def _sums(self) -> list[ir.Value]:
        k, p = self.k, self.p
        steps = -(-self.c.row_words // p.across)
        zero = [k.constant(0.0)] * (self.rows * p.columns)
        sums = zero
        whole = steps // p.unroll * p.unroll
        if whole == p.unroll:
            sums = self._step(self._count(0), p.unroll, sums)
        elif whole:
            sums = k.loop(
                self._count(0), self._count(whole), p.unroll, sums, lambda i, carried: self._step(i, p.unroll, carried)
            )
        return self._step(self._count(whole), steps - whole, sums) if steps > whole else sums

    def _step(self, index: Scalar, unroll: int, sums: list[ir.Value]) -> list[ir.Value]:
        """Add ``unroll`` words of each column; all loads come first."""
        k, c, p = self.k, self.c, self.p
        places = [(index + u) * p.across + self._lane for u in range(unroll)]
        valid = [place < c.row_words for place in places]
        if c.row_words % p.across:  # words beyond the last one count nothing
            places = [place.minimum(c.row_words - 1) for place in places]
        weights = [[self._weights.load(column, place) for column in self._columns] for place in places]
        vectors, row = c.per_word // _VECTOR, c.padded_depth // _VECTOR
        inputs = [
            [[k.load(self._a, place * vectors + (m * row + i)) for i in range(vectors)] for m in range(self.rows)]
            for place in places
        ]
        for place, fits, loads, stored in zip(places, valid, weights, inputs, strict=True):
            rows = [[e for vector in one for e in k.elements(k.widen(self._a, vector))] for one in stored]
            if self._rounds:
                rounded = [self._rounded(one) for one in rows]
                sums = self._add(sums, [r[0] for r in rounded], [r[1] for r in rounded], loads, place, fits)
            else:
                sums = self._add(sums, rows, None, loads, place, fits)
        return sums

    def _rounded(self, values: list[ir.Value]) -> tuple[list[ir.Value], ir.Value]:
        """This thread's elements of a row as whole numbers, and what they count; see ``rounded``."""
        k, c = self.k, self.c
        most = largest_of(Scalar(values[0]).abs().value, values[1:])
        offset = 1
        while offset < c.block_words:
            most = Scalar(most).maximum(Scalar(k.shuffle_xor(most, offset))).value
            offset *= 2
        inverse, step = inverse_and_step(k, most)
        return [round_even(k, k.mul(value, inverse)) for value in values], step

    def _add(
        self, sums: list[ir.Value], rows: list[list[ir.Value]], steps: list[ir.Value] | None,
        loads: list[list[ir.Value]], place: Scalar, fits: Scalar,
    ) -> list[ir.Value]:  # fmt: skip
        """Add one word of each column; ``steps`` is what the elements of each row count, None for one."""
        k, c, p = self.k, self.c, self.p
        sums = list(sums)
        totals = [self._total(values) for values in rows] if c.zero_points != "default" else []
        for j, (column, stored) in enumerate(zip(self._columns, loads, strict=True)):
            (part,) = self._weights.unpack(stored, column, place)
            scale = part.scale
            if c.row_words % p.across:
                scale = k.select(fits, scale, k.constant(0.0))
            for m, values in enumerate(rows):
                product = k.mul(values[0], part.values[0])
                for value, weight in zip(values[1:], part.values[1:], strict=True):
                    product = k.fma(value, weight, product)
                if part.offset is not None:
                    product = k.sub(product, k.mul(part.offset, totals[m]))
                factor = scale if steps is None else k.mul(scale, steps[m])
                sums[m * p.columns + j] = k.fma(product, factor, sums[m * p.columns + j])
        return sums

    def _total(self, values: list[ir.Value]) -> ir.Value:
        total = values[0]
        for value in values[1:]:
            total = self.k.add(total, value)
        return total

    # ---- sums of a workgroup ----------------------------------------------------------------------------------------
    def _shuffled(self, sums: list[ir.Value]) -> list[ir.Value]:
        offset = 1
        while offset < self.p.shuffled:
            sums = [self.k.add(value, self.k.shuffle_xor(value, offset)) for value in sums]
            offset *= 2
        return sums

    def _write_own(self, sums: list[ir.Value], first: Scalar) -> None:
        """Where all sums of a thread are whole: the first of those that have the same writes them."""
        k, c, p = self.k, self.c, self.p

        def write() -> None:
            for j in range(p.columns):
                column = first + j

                def write_column(j: int = j, column: Scalar = column) -> None:
                    for m in range(self.rows):
                        self._store(sums[m * p.columns + j], self._count(m), column)

                if c.columns % p.tile:
                    k.when(column < c.columns, write_column)
                else:
                    write_column()

        k.when(self._lane.equals(0), write)

    def _write_shared(self, sums: list[ir.Value]) -> None:
        """Through the workgroup's memory, [partial][row][column of the tile]."""
        k, c, p = self.k, self.c, self.p
        size = self.rows * p.tile
        scratch = k.shared(p.partial * size)
        part, inside = self._lane.divide_unsigned(p.shuffled)
        start = part * size + self._group * p.columns

        def put() -> None:
            for i, value in enumerate(sums):
                m, j = divmod(i, p.columns)
                k.store(value, scratch, start + (m * p.tile + j))

        if p.shuffled > 1:
            k.when(inside.equals(0), put)
        else:
            put()
        k.barrier()
        for offset in range(0, size, p.threads):
            element = k.thread() + offset
            row, place = element.divide_unsigned(p.tile)
            column = k.tile() * p.tile + place

            def write(element: Scalar = element, row: Scalar = row, column: Scalar = column) -> None:
                self._store(self._meeting(scratch, element, size), row, column)

            k.when((element < size) & (column < c.columns), write)

    def _meeting(self, scratch: Buffer, element: Scalar, size: int) -> ir.Value:
        k = self.k
        found = [k.load(scratch, element + part * size) for part in range(self.p.partial)]
        while len(found) > 1:
            found = [k.add(found[i], found[i + 1]) for i in range(0, len(found), 2)]
        return found[0]

    def _store(self, value: ir.Value, row: Scalar, column: Scalar) -> None:
        k = self.k
        if self.c.with_bias:
            value = k.add(value, self._weights.bias(column))
        k.store(value, self._y, row * self.c.columns + column)
