"""Strategy ``fused_amx_bf16``: many rows by packed weights as products of bf16 on the CPU's matrix unit.

    %tiles = flow.dispatch @mat_mul_amx_rows_...(%a)           A in bf16, as of ``mat_mul.fused_amx``
    %y     = flow.dispatch @mat_mul_n_bits_fused_amx_bf16_...(%tiles, %words, %scales)

    for each panel of 32 columns:  for each slab of blocks along K:      weights times scales to the stack, in bf16
      for each 32 rows:
        sums [2 x 2 registers of 16 x 16] += a [2 registers of 16 rows x 32] * b [2 of 32 x 16 columns]

Sums in f32 go through the blocks of a slab in the unit's registers, where ``fused_amx`` counts each block's by itself.
A slab is all of K where the stack has room for its weights, as of K = 1024; else sums wait on the stack. Results are
written beside the next products, see ``mat_mul.amx_overlap``.
Rounded to bf16 are A and weights times scales: 0.24 % from the exact product of normal numbers (K = 1024, blocks of
32), where A in int8 with a step a block is 0.53 % off.

Legal: on CPUs with AMX, from 16 rows on, where whole blocks of 32 or more make K; for A in bf16 that stays as it is,
and with --math fast where A may be rounded to int8. Cost: weights unpacked once for each chunk of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from iree.compiler import ir

from ..emit.amx_tiles import ROWS, SUMS, A, AmxTiles, B, multiply_terms
from ..emit.dispatch import Kernel, dispatch
from ..emit.kernel_text import Index, KernelText, vector_type
from ..mat_mul.amx_overlap import overlapped
from ..mat_mul.amx_rows import AXES, WORDS, Rows, arrange, asked_rows, blocks_of
from ..mat_mul.bf16_terms import pair
from ..mat_mul.simd_edges import each
from ..mat_mul.simd_plan import UNIT_FEATURES
from ..op import LoweringContext
from ..select import Legality, No, OtherMachine, Yes, rows_text
from ..target import Target
from . import fused_simd
from .contract import MatMulNBits
from .operands import Operands
from .simd_plan import Plan, amx_bf16_plan
from .simd_tiled import TiledBody

_LEAST_BLOCK, _MOST_BLOCK = 32, 64
_MANTISSA, _BIAS = 23, 127  # of f32
_HALF, _UPPER = 0x8000, -65536  # of the last bit that bf16 has; its bits


def is_legal(contract: MatMulNBits, target: Target) -> Legality:
    """Where the machine has the unit, rows and blocks fill it, and A may be bf16."""
    c = contract
    if not target.features >= UNIT_FEATURES or target.vector_bits != 512:
        return OtherMachine("no matrix unit for bf16")
    if c.rounds_a and not target.fast_math:
        return No("A is rounded to int8 (accuracy_level 4), bf16 only with --math fast")
    if not c.rounds_a and c.a.dtype != "bf16":
        return No(f"A is {c.a.dtype}, and stays as it is")
    if c.rows is not None and c.rows < ROWS:
        return No(f"{rows_text(c.rows)}, from {ROWS} on the matrix unit is worth its start")
    if c.rounds_a and c.block_size > _MOST_BLOCK:
        return No(f"blocks of {c.block_size}, which are faster in int8")
    if c.block_size < _LEAST_BLOCK or c.depth % c.block_size:
        return No(f"K={c.depth} is not of whole blocks of {_LEAST_BLOCK} or more")
    found = amx_bf16_plan(c)
    return No(found) if isinstance(found, str) else Yes()


def describe(contract: MatMulNBits, target: Target) -> str:
    """What the report says about it."""
    del target
    return f"products of bf16 on the CPU's matrix unit, {_plan(contract).row_block} rows with unpacked tiles"


def _plan(contract: MatMulNBits) -> Plan:
    found = amx_bf16_plan(contract)
    assert isinstance(found, Plan)
    return found


def emit_mat_mul_n_bits_fused_amx_bf16(context: LoweringContext, contract: MatMulNBits, x: Operands) -> ir.Value:
    """Emit the product [M, N]."""
    b, c = context.builder, contract
    rows = b.dim(x.a, 0)
    tiles = arrange(b, rows_of(c), x.a)
    weights = [value for value in (x.words, x.scales, x.zeros, x.bias) if value is not None]
    return dispatch(b, product_kernel(c), [tiles, *weights], rows, rows, blocks_of(b, rows))[0]


def rows_of(contract: MatMulNBits) -> Rows:
    """The rows, as they are arranged."""
    return Rows(contract.rows, contract.depth, contract.a.dtype, terms=1)


def product_kernel(contract: MatMulNBits) -> Kernel:
    """The kernel of the product by the arranged rows."""
    c, p = contract, _plan(contract)
    base = fused_simd.product_kernel(c, p)

    def write(k: KernelText, groups: Index, rows: Index, memrefs: Sequence[str]) -> None:
        del groups
        Bf16Body(k, c, p, rows, memrefs).write()

    return replace(
        base,
        name=base.name.replace("_fused_simd_", "_fused_amx_bf16_"),
        inputs=(rows_of(c).arranged, *base.inputs[1:]),
        axes=(AXES, *base.axes[1:]),
        write=write,
    )


class Bf16Body(TiledBody):
    """The body of ``simd_tiled`` with the products of 32 rows on the matrix unit; see there for the arguments."""

    def __init__(
        self, k: KernelText, c: MatMulNBits, p: Plan, rows: Index, memrefs: Sequence[str], before: Index = 0
    ) -> None:
        super().__init__(k, c, p, rows, memrefs, before)
        self.unit, self.tiles = AmxTiles(k), memrefs[0]

    def write(self) -> None:
        """The whole body."""
        super().write()
        self.unit.release()

    def _stack_for_weights(self) -> str:
        return self.k.alloca([self.p.slab * self.c.block_size // 2, self.p.tile], "i32")

    def _float_fields(self, word: str, own: Sequence[Index]) -> list[str]:
        """As words of two bf16; half the instructions of converting integers, which is a fifth of the kernel's time.

        A weight's bits below the exponent of 2^bits are that number and the weight. A half is added before what bf16
        has no bits for is dropped; the scales of a model are no NaN with all bits set, which alone would become a zero.
        """
        k, lanes, bits = self.k, self.p.lanes, self.c.bits
        ints, floats = vector_type(lanes, "i32"), vector_type(lanes)
        scale, base = k.load(self.scales, own, lanes), float(1 << bits)
        offset = k.constant(base + self.c.default_zero, floats)
        if self.zeros:
            offset = k.addf(k.load(self.zeros, own, lanes), k.constant(base, floats))
        top = _MANTISSA - bits
        mask, exponent = k.constant((1 << bits) - 1 << top, ints), k.constant(_BIAS + bits << _MANTISSA, ints)

        def weight(i: int) -> str:
            down = i * bits - top
            field = k.shift_right(word, down) if down >= 0 else k.shift_left(word, -down)
            number = k.op(f"arith.ori {k.andi(field, mask)}, {exponent} : {ints}", ints)
            value = k.mulf(k.subf(k.as_type(number, floats, "arith.bitcast"), offset), scale)
            return k.addi(k.as_type(value, ints, "arith.bitcast"), k.constant(_HALF, ints))

        upper = k.constant(_UPPER, ints)
        return [pair(k, weight(i), k.andi(weight(i + 1), upper)) for i in range(0, self.c.per_word, 2)]

    def _stack_for_sums(self) -> str:
        rows = 2 * ROWS if self.p.slab == self.c.blocks else self.p.row_block
        return self.k.alloca([rows, self.p.tile])

    def _tile(self, column: Index) -> None:
        p, c = self.p, self.c
        last = (c.blocks - 1) // p.slab * p.slab

        def slab(block: Index) -> None:
            self._unpack(column, block, p.slab)
            self._all_rows(block, p.slab)

        if last:
            each(self.k, last, p.slab, slab)
        self._unpack(column, last, c.blocks - last)
        self._last_rows(column, last)

    def _all_rows(self, block: Index, blocks: Index) -> None:
        """All rows times the unpacked weights, 32 at a time."""

        def one(index: Index) -> None:
            self._begin(index, block)
            self.k.loop(self._steps(blocks), [], lambda number, _: self._step(index, block, number))
            self._end(index)

        each(self.k, self._row_blocks, 1, one)

    def _last_rows(self, column: Index, block: int) -> None:
        """The same of the last slab, with the results."""
        k, p = self.k, self.p
        steps = self._steps(self.c.blocks - block)
        assert isinstance(steps, int)

        def finish(index: Index, i: Index) -> None:
            row = k.add(k.mul(index, 2 * ROWS), i)

            def write() -> list[str]:
                at = k.add(self._waiting(index), i)
                sums = [k.load(self.sums, [at, v * p.lanes], p.lanes) for v in range(p.vectors)]
                self.edges.write(k.add(self.first, row), column, sums)
                return []

            if isinstance(self.count, int) and self.count % (2 * ROWS) == 0:
                write()
            else:
                k.when(k.less(row, self.count), [], write, lambda: [])

        def step(index: Index, number: Index) -> None:
            self._step(index, block, number)
            share = -(-2 * ROWS // steps)
            for i in range(share):
                row = k.add(k.mul(index, 2 * ROWS), k.add(k.mul(number, share), i))
                self.edges.ask(k.add(self.first, row), column)

        overlapped(k, self._row_blocks, steps, lambda index: self._begin(index, block), step, self._end, finish)

    @property
    def _row_blocks(self) -> Index:
        return self.k.div(self.k.add(self.count, 2 * ROWS - 1), 2 * ROWS)

    def _steps(self, blocks: Index) -> Index:
        """Of 32 along K, of some blocks."""
        return self.k.mul(blocks, self.c.block_size // (2 * WORDS))

    def _waiting(self, index: Index) -> Index:
        """Where 32 rows' sums are on the stack."""
        return 0 if self.p.slab == self.c.blocks else self.k.mul(index, 2 * ROWS)

    def _places(self, index: Index) -> list[list[Index]]:
        row = self._waiting(index)
        return [[self.k.add(row, register // 2 * ROWS), register % 2 * ROWS] for register in SUMS]

    def _begin(self, index: Index, block: Index) -> None:
        """Sums of 32 rows so far, zeros at the first block."""

        def zeros() -> list[str]:
            for register in SUMS:
                self.unit.zero(register)
            return []

        def again() -> list[str]:
            for register, place in zip(SUMS, self._places(index), strict=True):
                self.unit.load(register, self.sums, place)
            return []

        if isinstance(block, int):
            (again if block else zeros)()
        else:
            self.k.when(self.k.less(0, block), [], again, zeros)

    def _step(self, index: Index, block: Index, number: Index) -> list[str]:
        """32 rows by 32 of K, counted from a slab's first block on."""
        k, unit = self.k, self.unit
        own, at = k.add(k.div(self.first, 2 * ROWS), index), k.add(self._steps(block), number)

        def load_rows(term: int, half: int) -> None:
            unit.load(A[half], self.tiles, [own, term, at, half, 0, 0])

        def load_columns(_: int, half: int) -> None:
            unit.load(B[half], self.unpacked, [k.mul(number, WORDS), half * ROWS])

        multiply_terms(unit, [(0, 0)], load_rows, load_columns, asked_rows(k, self.tiles, [own, 0, at]))
        return []

    def _end(self, index: Index) -> None:
        for register, place in zip(SUMS, self._places(index), strict=True):
            self.unit.store(register, self.sums, place)
