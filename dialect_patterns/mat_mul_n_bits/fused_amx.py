"""Strategy ``fused_amx``: many rows by packed weights as products of bytes on the CPU's matrix unit.

    %q:3 = flow.dispatch @mat_mul_n_bits_rows_...(%a)          the registers' contents, one after the other in memory
    %y   = flow.dispatch @mat_mul_n_bits_fused_amx_...(%q#0, %q#1, %q#2, %words, %scales)

    for each panel of 32 columns:  for each slab of blocks along K:      unpacked to the stack, as for ``fused_simd``
      for each two blocks, for each 32 rows (16 of few):
        i32 sums [2 x 2 registers of 16 x 16] of a block's products      to the stack
        y (on the stack) += what those of the rows before count          meanwhile; read and written once

Weights are without their zero points, signed (but of 8 bits with zero points of their own, which take a byte more), so
that rows need no offsets. Sums of a block are exact, as everywhere. What they count is what takes the time where blocks
are small: of a block of 32 the unit alone takes 50 cycles for 16 x 16 sums that leave it (16 of them the products, 16
the store), counting alone 27, and together they take about the sum of both, however far counting is behind (measured,
docs/benchmarks.md). With 32 rows a register that is loaded is in two products; loads are what is slow in that machine's
second state.

Legal: on CPUs with AMX where A is rounded to int8, from 16 rows on, blocks of 32 or more. Cost: a fifth of a cycle for
each 64 multiply-adds, and four instructions for each 16 sums of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from iree.compiler import ir

from ..emit.amx_tiles import ROW_BYTES, ROWS, SUMS, A, AmxTiles, B
from ..emit.dispatch import Kernel, dispatch
from ..emit.kernel_text import Index, KernelText, vector_type
from ..node import Dim, TensorSpec
from ..op import LoweringContext
from ..select import Legality, No, OtherMachine, Yes, rows_text
from ..target import Target
from . import fused_simd
from .contract import MatMulNBits
from .operands import Operands
from .simd_plan import Plan, amx_plan
from .simd_products import ByteProducts
from .simd_rows import RowWriter
from .simd_tiled import TiledBody

Factors = Sequence[tuple[str, str | None]]
"""Of a block for each vector of columns: the scale, and zero point times scale, or None where weights are without."""

FEATURES = frozenset({"amx-tile", "amx-int8", "avx512vnni"})
_LEAST_BLOCK = 32
_AXES = ("R___", "R__", "R__")  # of the arranged rows


def is_legal(contract: MatMulNBits, target: Target) -> Legality:
    """Where the machine has the unit, and rows and blocks fill it."""
    c = contract
    if not target.features >= FEATURES:
        return OtherMachine("no matrix unit for bytes")
    if not c.rounds_a:
        return No("A is not rounded to int8 (accuracy_level 4)")
    if c.rows is not None and c.rows < ROWS:
        return No(f"{rows_text(c.rows)}, from {ROWS} on the matrix unit is worth its start")
    if c.block_size < _LEAST_BLOCK:
        return No(f"blocks of {c.block_size}, from {_LEAST_BLOCK} on they fill the matrix unit")
    found = amx_plan(c, target)
    return No(found) if isinstance(found, str) else Yes()


def describe(contract: MatMulNBits, target: Target) -> str:
    """What the report says about it."""
    return f"products of bytes on the CPU's matrix unit, {_plan(contract, target).row_block} rows with unpacked tiles"


def _plan(contract: MatMulNBits, target: Target) -> Plan:
    found = amx_plan(contract, target)
    assert isinstance(found, Plan)
    return found


def emit_mat_mul_n_bits_fused_amx(context: LoweringContext, contract: MatMulNBits, x: Operands) -> ir.Value:
    """Emit the product [M, N]."""
    b, c, p = context.builder, contract, _plan(contract, context.target)
    rows = b.dim(x.a, 0)
    tiles = b.mul(b.floordiv(b.add(rows, p.rows - 1), p.rows), p.rows // ROWS)
    arranging = fused_simd.rows_kernel(c, p, TileWriter)
    arranging = replace(arranging, name=f"{arranging.name}_tiles", outputs=_arranged(c, p), axes=("T_", *_AXES))
    arranged = dispatch(b, arranging, [x.a], rows, rows, tiles)
    weights = [value for value in (x.words, x.scales, x.zeros, x.bias) if value is not None]
    return dispatch(b, product_kernel(c, p), [*arranged, *weights], rows, rows, tiles)[0]


def _arranged(c: MatMulNBits, p: Plan) -> tuple[TensorSpec, ...]:
    """What the rows become: the contents of the unit's registers, and 16 rows' steps and offsets side by side."""
    tiles: Dim = None if c.rows is None else -(-c.rows // p.rows) * p.rows // ROWS
    factors = TensorSpec((tiles, c.blocks, ROWS), "f32")
    return TensorSpec((tiles, c.blocks, ROWS, c.block_size // 4), "i32"), factors, factors


class TileWriter(RowWriter):
    """Writes the code that arranges one row."""

    def _word(self, row: Index, block: Index, word: Index) -> list[Index]:
        return [*self._factor(row, block), word]

    def _factor(self, row: Index, block: Index) -> list[Index]:
        return [self.k.div(row, ROWS), block, self.k.rem(row, ROWS)]


class TileProducts(ByteProducts):
    """Products of bytes of which the matrix unit has the sums."""

    def factor_place(self, row: Index, block: Index) -> list[Index]:
        """Where the step and the offset of a row's block are."""
        return [self.k.div(row, ROWS), block, self.k.rem(row, ROWS)]


def product_kernel(contract: MatMulNBits, p: Plan) -> Kernel:
    """The kernel of the product."""
    c = contract
    base = fused_simd.product_kernel(c, p)
    specs = _arranged(c, p)
    count = len(specs)

    def write(k: KernelText, groups: Index, rows: Index, memrefs: Sequence[str]) -> None:
        del groups
        AmxBody(k, c, p, rows, memrefs).write()

    return replace(
        base,
        name=base.name.replace("_fused_simd_", "_fused_amx_"),
        inputs=(*specs, *base.inputs[count:]),
        axes=(*_AXES, *base.axes[count:]),
        write=write,
    )


class AmxBody(TiledBody):
    """The body of ``simd_tiled`` with the products of 16 rows on the matrix unit; see there for the arguments."""

    def __init__(
        self, k: KernelText, c: MatMulNBits, p: Plan, rows: Index, memrefs: Sequence[str], before: Index = 0
    ) -> None:
        super().__init__(k, c, p, rows, memrefs, before)
        self.bytes = TileProducts(k, c, p, memrefs[: len(_AXES)])
        self.words = min(c.block_size // 4, ROWS)
        self.unit = AmxTiles(k, self.words)
        self.ints = k.alloca([2 * p.counted * p.rows, p.tile], "i32")

    @property
    def signed(self) -> bool:
        """Whether weights fit in a signed byte without their zero point."""
        return self.c.bits < 8 or self.c.zero_points == "default"

    def write(self) -> None:
        """The whole body."""
        super().write()
        self.unit.release()

    def _zero(self, zero: str, scale: str) -> str:
        if not self.signed:
            return super()._zero(zero, scale)
        k, ints = self.k, vector_type(self.p.lanes, "i32")
        each = k.constant(0x01010101, ints)
        four = k.op(f"arith.muli {k.as_type(zero, ints, 'arith.fptosi')}, {each} : {ints}", ints)
        return k.as_type(four, vector_type(self.p.lanes), "vector.bitcast")

    def _byte_fields(self, word: str, own: Sequence[Index]) -> list[str]:
        parts = super()._byte_fields(word, own)
        if not self.signed:
            return parts
        k, words, kind = self.k, self.k.types[word], vector_type(4 * self.p.lanes, "i8")
        if self.zeros:
            zero = k.as_type(k.load(self.zeros, own, self.p.lanes), kind, "vector.bitcast")
        else:
            zero = k.constant(int(self.c.default_zero) - (256 if self.c.bits == 8 else 0), kind)
        parts = [k.as_type(part, kind, "vector.bitcast") for part in parts]
        parts = [k.op(f"arith.subi {part}, {zero} : {kind}", kind) for part in parts]
        return [k.as_type(part, words, "vector.bitcast") for part in parts]

    def _all_rows(self, block: Index, blocks: Index) -> None:
        """All rows times the unpacked weights, a few blocks after the other."""

        def some(index: Index, count: int) -> None:
            self._some_blocks(index, self.k.add(block, index), count)

        self._in_chunks(self.p.counted, blocks, self.c.blocks, some)

    def _some_blocks(self, index: Index, block: Index, count: int) -> None:
        """All rows by some blocks; the sums of 16 rows are counted while the next ones' products are under way.

        Args:
            index: The first block, counted from the start of the slab.
            block: The same, counted from the start of the row.
            count: Blocks.
        """
        k, p = self.k, self.p
        starts = [v * p.lanes for v in range(p.vectors)]

        def factor(i: int, start: int) -> tuple[str, str | None]:
            place = [k.add(index, i), start]
            zero = k.load(self.zeros, place, p.lanes) if self.zeros and not self.signed else None
            return k.load(self.scales, place, p.lanes), zero

        factors = [[factor(i, start) for start in starts] for i in range(count)]
        tiles = k.div(k.add(self.count, p.rows - 1), p.rows)
        share = p.rows // count

        def one(tile: str, _: list[str]) -> list[str]:
            before = k.sub(tile, 1)
            self._multiply(
                tile,
                index,
                block,
                count,
                lambda i: self._count(before, block, factors, range(i * share, (i + 1) * share)),
            )
            return []

        self._multiply(0, index, block, count, lambda _: None)
        k.loop(tiles, [], one, start=1)
        self._count(k.sub(tiles, 1), block, factors, range(p.rows))

    def _multiply(self, tile: Index, index: Index, block: Index, count: int, meanwhile: Callable[[int], None]) -> None:
        """The sums of 16 rows by some blocks to the stack; ``meanwhile`` after the products of each."""
        k, unit, words = self.k, self.unit, self.c.block_size // 4
        assert self.bytes is not None
        multiply = unit.multiply_signed if self.signed else unit.multiply_bytes
        for i in range(count):
            for register in self._registers(i):
                unit.zero(register)
            self._ask(k.add(tile, 1), k.add(block, i))
            rows = A if self._high == len(A) else A[i % 2 :][:1]
            for word in range(0, words, self.words):
                for half, register in enumerate(rows):
                    unit.load(register, self.bytes.bytes, [k.add(self._own(tile), half), k.add(block, i), 0, word])
                for half, register in enumerate(B):
                    unit.load(register, self.unpacked, [k.add(k.mul(k.add(index, i), words), word), half * ROWS])
                for sums, register in enumerate(self._registers(i)):
                    multiply(register, rows[sums // len(B)], B[sums % len(B)])
            if i and self._high == 1:
                self._keep(tile, i - 1)
            meanwhile(i)
            if i == count - 1 or self._high > 1:
                self._keep(tile, i)

    def _ask(self, tile: Index, block: Index) -> None:
        """Ask for a tile's rows of a block, for the first-level cache."""
        assert self.bytes is not None
        words = self.c.block_size // 4
        for half in range(self._high):
            for word in range(0, ROWS * words, ROW_BYTES // 4):
                place = [self.k.add(self._own(tile), half), block, word // words, word % words]
                self.k.prefetch(self.bytes.bytes, place)

    @property
    def _high(self) -> int:
        """Registers of A."""
        return self.p.rows // ROWS

    def _own(self, tile: Index) -> Index:
        """Which 16 rows of all are a tile's first."""
        return self.k.add(self.k.div(self.first, ROWS), self.k.mul(tile, self._high))

    def _registers(self, i: int) -> Sequence[int]:
        """Those of a block's sums; of 16 rows the next block has the other two."""
        return SUMS if self._high == len(A) else SUMS[i % 2 * 2 :][:2]

    def _keep(self, tile: Index, i: int) -> None:
        """A block's sums to the stack."""
        for sums, register in enumerate(self._registers(i)):
            row = self.k.add(self._waiting(tile, i), sums // len(B) * ROWS)
            self.unit.store(register, self.ints, [row, sums % len(B) * ROWS])

    def _waiting(self, tile: Index, i: int) -> Index:
        """Where the stack has the sums of a tile by a block: every other tile is in the same place."""
        return self.k.add(self.k.mul(self.k.rem(tile, 2), self.p.counted * self.p.rows), i * self.p.rows)

    def _count(self, tile: Index, block: Index, factors: Sequence[Factors], rows: range) -> None:
        """Adds what the sums of some blocks count to some rows' sums, which are read and written once."""
        k, p, products = self.k, self.p, self.bytes
        assert products is not None
        starts = [v * p.lanes for v in range(p.vectors)]

        def one(r: Index, half: int) -> None:
            row = k.add(half * ROWS, r)
            place = k.add(k.mul(tile, p.rows), row)
            sums = [k.load(self.sums, [place, start], p.lanes) for start in starts]
            for i, own in enumerate(factors):
                ints = [k.load(self.ints, [k.add(self._waiting(tile, i), row), start], p.lanes) for start in starts]
                if self.signed:
                    step = k.load(products.steps, [k.add(self._own(tile), half), k.add(block, i), r])
                    sums = self._added(sums, ints, step, own)
                else:
                    (sums,) = products.add_blocks([sums], [ints], [k.add(self.first, place)], k.add(block, i), own)
            for start, value in zip(starts, sums, strict=True):
                k.store(value, self.sums, [place, start])

        for half in range(self._high):
            start, stop = max(0, rows.start - half * ROWS), min(ROWS, rows.stop - half * ROWS)
            if start < stop:
                k.loop(stop, [], lambda r, _, half=half: one(r, half) or [], start=start)

    def _added(self, sums: Sequence[str], ints: Sequence[str], step: str, factors: Factors) -> list[str]:
        """``sums`` and what those of a block count, for one row."""
        k, floats = self.k, vector_type(self.p.lanes)
        step = k.splat(step, self.p.lanes)
        reals = [k.mulf(k.as_type(value, floats, "arith.sitofp"), step) for value in ints]
        return [k.fma(real, scale, total) for real, (scale, _), total in zip(reals, factors, sums, strict=True)]
