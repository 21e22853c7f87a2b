"""Strategy ``fused_mma``: many rows times packed weights on the matrix units, as one GPU kernel.

    %y = flow.dispatch @mat_mul_n_bits_fused_mma_...(%a, %words, %scales)

The product is that of ``mat_mul.mma_kernel``; a tile of weights is unpacked in registers, (q - zero) * scale in f32,
and written to the workgroup's memory as f16, column by column, as the words are in the model. So no weight lies
unpacked in the device's memory, and one is unpacked once a row of tiles. Where ``accuracy_level`` 4 has A rounded, that
is a dispatch before.

f32 are two terms of f16, x = x1 + 2^-11 x2, of rows of A that a dispatch before divides by a power of two, and of the
unpacked weights; of the products of terms the three largest count. With ``--math fast`` only: it is as exact as f32
(5e-7 of the largest element, K=1024 and 3584; rounding A and B once leaves 3e-4), but an inf in a row makes all of it
NaN. By operations it takes three times the f16 product, where f32 has a 15th of its rate on an H100, half on a GeForce.

Where ``accuracy_level`` 4 has f32 or bf16 rounded and blocks are of 32 or more, both factors are whole numbers that f16
holds, whatever the math: A's rounded ones, with a step for each block, and the weights less their zero points. Their
products are exact; those of 32 K are multiplied by the scales of their row and their column and added to the sums. The
scales are matrices of factors that are read with a stride of nothing, 4 bytes a row; on CUDA (sm_80) sums lie in
registers that are known (``warp_matrices``), and a scale is a multiply-add. Words are taken apart two fields at a time,
as whole numbers of f16, in an order that the rounding of A follows.

Legal: f16, and f32 and bf16 so, on GPUs with such products, for 9 static rows or more, if 32 divides K in whole blocks
and 4 divides N.
Cost: that of the f16 product, less the reads, plus about 4 instructions a weight and row of tiles. On an H100 (CUDA)
64 and 512 rows, K=1024 to N=3584, take 7.2 and 26.6 us; the portable form, which writes the weights first, 33 and 56.
"""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir

from ..emit.builder import tensor_type
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Group, Kernel, dispatch
from ..emit.warp_matrices import WarpMatrices
from ..mat_mul.mma_kernel import Extent, Product
from ..mat_mul.mma_plan import CHUNK, SIDE, VECTOR, Plan, Size, is_possible, plan_for
from ..op import LoweringContext
from ..select import Legality, No, OtherMachine, rows_text
from ..target import Target
from .contract import MatMulNBits
from .operands import Operands
from .rounded_simt import emit_a, emit_whole
from .simt_weights import PackedWeights, bound, readable
from .split_rows import emit_split, two_terms

_MAX_WIDTH = 4  # words of a load
_STEP, _MOST_STEP = 32, 64  # K that count the same where factors are whole numbers


def _size(contract: MatMulNBits) -> Size:
    return Size(contract.rows, contract.padded_depth, contract.columns)


def _is_whole(contract: MatMulNBits) -> bool:
    """Whether both factors are whole numbers, with a scale for each block of whole steps of K; f16 has its own way."""
    return contract.rounds_a and contract.a.dtype != "f16" and contract.block_size % _STEP == 0


def _scaled(contract: MatMulNBits) -> int:
    """K of the products that share scales, as far as a tile holds them; 0 where factors are no whole numbers."""
    return min(contract.block_size, _STEP) if _is_whole(contract) else 0


def _terms(contract: MatMulNBits) -> int:
    return 2 if contract.a.dtype == "f32" and not _is_whole(contract) else 1


def is_legal(contract: MatMulNBits, target: Target) -> Legality:
    """Where subgroups multiply matrices, for f16."""
    words = readable(contract)
    if isinstance(words, No):
        return words
    if not target.is_gpu:
        return OtherMachine(f"{target.name} is not a GPU")
    whole, terms = _is_whole(contract), _terms(contract)
    if contract.a.dtype == "bf16" and not whole:
        return No("bf16, neither f16 nor f32")
    if terms > 1 and not target.fast_math:
        return No("f32, which --math fast takes as two terms of f16")
    return is_possible(_size(contract), target, transposed=True, step=VECTOR, terms=terms, scaled=_scaled(contract))


def describe(contract: MatMulNBits, target: Target) -> str:
    """What the report says about it."""
    plan = _plan(contract, target)
    how = " as two terms of f16" if plan.terms > 1 else " as whole numbers" if plan.scaled else ""
    return f"{rows_text(contract.rows)} on the matrix units{how}, tiles of {plan.rows}x{plan.columns}"


def _plan(contract: MatMulNBits, target: Target) -> Plan:
    size, terms = _size(contract), _terms(contract)
    return plan_for(size, target, transposed=True, terms=terms, scaled=_scaled(contract))


def emit_mat_mul_n_bits_fused_mma(context: LoweringContext, contract: MatMulNBits, x: Operands) -> ir.Value:
    """Emit the product [M, N]."""
    c, b, size = contract, context.builder, _size(contract)
    plan, dtype = _plan(contract, context.target), contract.a.dtype
    split, more = plan.terms > 1, plan.terms > 1 or plan.scaled > 0
    assert c.rows is not None

    def body(k: Kernel) -> None:
        right = _Scaled(k, c, plan) if plan.scaled else _Packed(k, c, plan)
        depth, columns = (Scalar.constant(n, "index") for n in (size.depth // CHUNK, size.columns))
        extent, last = Extent(k.number(0), depth, (columns,)), right.weights.output
        Product(k, extent, plan, right, last + more, dtype, last if split else None).emit()

    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [(tensor_type((c.rows, c.columns), dtype), [])]
    name = f"mat_mul_n_bits_fused_mma_{c.key}_nx{c.depth}x{c.columns}_{plan}"
    if plan.scaled:
        a, *factors = emit_whole(b, c, x.a)
    elif split:
        a, *factors = emit_split(b, emit_a(b, c, x.a, dtype))
    else:
        a, factors = emit_a(b, c, x.a, dtype), list[ir.Value]()
    inputs, items = [a, *bound(c, x), *factors], b.index(plan.workgroups(c.rows, [c.columns]))
    group = Group(plan.threads, plan.subgroup)
    kernel = WarpMatrices if plan.scaled and context.target.copy_memory else None
    return dispatch(name, group, 1, items, [b.index(c.rows)], inputs, outputs, body, kernel=kernel)[0]


class _Packed:
    """The right factor as packed weights [N, K].

    Args:
        k: Emits instructions.
        contract: The node.
        plan: How the product is cut.

    Attributes:
        weights: Their buffers.
    """

    def __init__(self, k: Kernel, contract: MatMulNBits, plan: Plan) -> None:
        self.k, self.c, self.p = k, contract, plan
        row = plan.depth // contract.per_word  # words of a column of a tile
        least = max(1, CHUNK // contract.per_word)
        width = min(_MAX_WIDTH, row, max(least, plan.columns * row // plan.threads))
        self.weights = PackedWeights(k, contract, width)
        self._loads = row // width  # of a column of a tile

    def start(self, product: Product) -> None:
        """Emit what comes before the loop."""
        c, p = self.c, self.p
        self.memory = product.memory
        self._places = product.places(p.columns, self._loads)
        self._columns = [(product.tile * p.columns + column).minimum(c.columns - 1) for column, _ in self._places]
        self._size = len(self._places)
        # With few bits there are fewer loads than threads.
        self._partial = self._loads * p.columns < p.threads
        self._takes_part = product.thread < self._loads * p.columns

    def load(self, step: Scalar) -> list[ir.Value]:
        """Load this thread's part of a tile."""
        loads: list[ir.Value] = []
        for column, (_, place) in zip(self._columns, self._places, strict=True):
            loads += self.weights.load(column, step * self._loads + place)
        return loads

    def put(self, loaded: Sequence[ir.Value], step: Scalar, tile: Scalar) -> None:
        """Unpack that part into the workgroup's memory."""
        size = len(loaded) // self._size

        def write() -> None:
            for i, (column, place) in enumerate(self._places):
                part = list(loaded[i * size : (i + 1) * size])
                at = tile + (column * self.p.stride_b + place * (self.weights.per_load // CHUNK))
                for term, kept in enumerate(self._chunks(part, self._columns[i], step * self._loads + place)):
                    for j, chunk in enumerate(kept):
                        self.k.store_as_is(chunk, self.memory, at + (j + term * self.p.chunks_b))

        if self._partial:
            self.k.when(self._takes_part, write)
        else:
            write()

    def _chunks(self, loads: list[ir.Value], column: Scalar, place: Scalar) -> list[list[ir.Value]]:
        """Of each term the chunks of the weights that were loaded."""
        numbers = self.weights.dequantise(loads, column, place)
        terms = two_terms(self.k, numbers) if self.p.terms > 1 else (numbers,)
        return [[self.k.chunk_of_f16(t[i : i + CHUNK]) for i in range(0, len(t), CHUNK)] for t in terms]

    def matrix(self, depth: Scalar, across: Scalar, term: int, tile: Scalar) -> ir.Value:
        """A matrix of a term's tile in memory."""
        start = across * (SIDE * self.p.stride_b) + (tile + depth * (SIDE // CHUNK) + term * self.p.chunks_b)
        stride = self.p.stride_b * CHUNK // self.p.unit[0]
        return self.k.matrix_load("BOp", self.memory, start, stride, transposed=True)

    def finish(self, sums: list[ir.Value], column: Scalar) -> ir.Value:
        """Add the bias."""
        if not self.c.with_bias:
            return sums[0]
        bias = [self.weights.bias(column * VECTOR + i) for i in range(VECTOR)]
        return self.k.add(sums[0], self.k.join(bias))


class _Scaled(_Packed):
    """The same as whole numbers, with the scales of a step's rows and columns in the workgroup's memory."""

    def start(self, product: Product) -> None:
        """Emit what comes before the loop."""
        super().start(product)
        k, c, p = self.k, self.c, self.p
        groups = p.depth // p.scaled
        self._vectors = (product.size.rows + (VECTOR - 1)).divide_unsigned(VECTOR)[0]
        self._steps = k.chunks(self.weights.output, self._vectors * c.blocks)
        rows, columns = p.rows // VECTOR, p.columns // VECTOR
        self._row_spots = [spot.divide_unsigned(rows) for spot in self._turns(product, groups * rows)]
        self._column_spots = [spot.divide_unsigned(columns) for spot in self._turns(product, groups * columns)]
        self._row, self._column = product.row.divide_unsigned(VECTOR)[0], product.tile * columns

    def _turns(self, product: Product, count: int) -> list[Scalar]:
        """Numbers of this thread's chunks of so many, the last one again where there are too few."""
        return [(product.thread + i).minimum(count - 1) for i in range(0, count, self.p.threads)]

    def load(self, step: Scalar) -> list[ir.Value]:
        """Load this thread's part of a tile, and of the scales."""
        k, c, p = self.k, self.c, self.p

        def block(group: Scalar) -> Scalar:
            return (step * (p.depth // p.scaled) + group).divide_unsigned(c.block_size // p.scaled)[0]

        found: list[ir.Value] = []
        for group, row in self._row_spots:
            found.append(
                k.load(self._steps, block(group) * self._vectors + (self._row + row).minimum(self._vectors - 1))
            )
        for group, vector in self._column_spots:
            first = (self._column + vector).minimum(c.columns // VECTOR - 1) * VECTOR
            found += [self.weights.load_scale(first + i, block(group)) for i in range(VECTOR)]
        return [*found, *super().load(step)]

    def put(self, loaded: Sequence[ir.Value], step: Scalar, tile: Scalar) -> None:
        """Write that part to the workgroup's memory."""
        k, p, rows = self.k, self.p, len(self._row_spots)
        start, used = tile + p.chunks_b, rows + VECTOR * len(self._column_spots)
        for (group, row), steps in zip(self._row_spots, loaded, strict=False):
            k.store_as_is(steps, self.memory, start + (group * p.group + row))
        for i, (group, vector) in enumerate(self._column_spots):
            stored = loaded[rows + VECTOR * i : rows + VECTOR * (i + 1)]
            scales = k.join([self.weights.scale(value) for value in stored])
            k.store_as_is(scales, self.memory, start + (group * p.group + vector + p.rows // VECTOR))
        super().put(loaded[used:], step, tile)

    def _chunks(self, loads: list[ir.Value], column: Scalar, place: Scalar) -> list[list[ir.Value]]:
        return [self.weights.whole(loads, column, place)]
