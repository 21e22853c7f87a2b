"""Strategy ``fused_amx``: many rows by packed weights as products of bytes on the CPU's matrix unit.

    %q:3 = flow.dispatch @mat_mul_n_bits_rows_...(%a)          as ``fused_simd``'s, for whole tiles of 16 rows
    %y   = flow.dispatch @mat_mul_n_bits_fused_amx_...(%q#0, %q#1, %q#2, %words, %scales)

    for each panel of 32 columns:  for each slab of blocks along K:      unpacked to the stack, as for ``fused_simd``
      for each 16 rows, for each few blocks:
        i32 sums of each [2 registers of 16 x 16] of its products        to the stack
        y (on the stack) += what they all count                          read and written once

Sums of a block are exact, as everywhere. What they count is what takes the time where blocks are small. For a block of
32 and 16 x 16 sums the unit needs 16 cycles, as for one of 64. Counting takes 24 of the two units for vectors (from
integers, times A's step, times the weights' scale) and a store of 64 bytes each cycle: 16 for the integers, and 16 for
y, but 4 where 4 blocks are counted at once. (On paper, for a Golden Cove.)

Legal: on CPUs with AMX where A is rounded to int8, from 16 rows on, blocks of 32 or more. Cost: a fifth of a cycle for
each 64 multiply-adds, and five instructions for each 16 sums of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from iree.compiler import ir

from ..emit.amx_tiles import ROWS, SUMS, A, AmxTiles, B
from ..emit.dispatch import Kernel, dispatch
from ..emit.kernel_text import Index, KernelText
from ..node import Dim
from ..op import LoweringContext
from ..select import Legality, No, OtherMachine, Yes, rows_text
from ..target import Target
from . import fused_simd
from .contract import MatMulNBits
from .operands import Operands
from .simd_plan import Plan, amx_plan
from .simd_rows import arranged_specs
from .simd_tiled import TiledBody

FEATURES = frozenset({"amx-tile", "amx-int8", "avx512vnni"})
_LEAST_BLOCK = 32


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
    padded = b.mul(b.floordiv(b.add(rows, p.rows - 1), p.rows), p.rows)
    arranging = fused_simd.rows_kernel(c, p)
    specs = tuple(arranged_specs(c, p, _padded(c.rows, p)))
    arranging = replace(
        arranging, name=f"{arranging.name}_by{p.rows}", outputs=specs, axes=("T_", *("R_" for _ in specs))
    )
    arranged = dispatch(b, arranging, [x.a], rows, rows, padded)
    weights = [value for value in (x.words, x.scales, x.zeros, x.bias) if value is not None]
    return dispatch(b, product_kernel(c, p), [*arranged, *weights], rows, rows, padded)[0]


def _padded(rows: Dim, p: Plan) -> Dim:
    return None if rows is None else -(-rows // p.rows) * p.rows


def product_kernel(contract: MatMulNBits, p: Plan) -> Kernel:
    """The kernel of the product."""
    c = contract
    base = fused_simd.product_kernel(c, p)
    specs = tuple(arranged_specs(c, p, _padded(c.rows, p)))
    count = len(specs)

    def write(k: KernelText, groups: Index, rows: Index, memrefs: Sequence[str]) -> None:
        del groups
        AmxBody(k, c, p, rows, memrefs).write()

    return replace(
        base,
        name=base.name.replace("_fused_simd_", "_fused_amx_"),
        inputs=(*specs, *base.inputs[count:]),
        axes=(*("R_" for _ in specs), *base.axes[count:]),
        write=write,
    )


class AmxBody(TiledBody):
    """The body of ``simd_tiled`` with the products of 16 rows on the matrix unit; see there for the arguments."""

    def __init__(
        self, k: KernelText, c: MatMulNBits, p: Plan, rows: Index, memrefs: Sequence[str], before: Index = 0
    ) -> None:
        super().__init__(k, c, p, rows, memrefs, before)
        self.words = min(c.block_size // 4, ROWS)
        self.unit = AmxTiles(k, self.words)
        self.ints = k.alloca([p.counted * p.rows, p.tile], "i32")

    def write(self) -> None:
        """The whole body."""
        super().write()
        self.unit.release()

    def _rows(self, row: Index, block: Index, blocks: Index) -> list[str]:
        """16 rows times the unpacked weights."""

        def some(index: Index, count: int) -> None:
            self._multiply(self.k.add(self.first, row), index, self.k.add(block, index), count)
            self._count(row, index, self.k.add(block, index), count)

        self._in_chunks(self.p.counted, blocks, self.c.blocks, some)
        return []

    def _multiply(self, row: Index, index: Index, block: Index, count: int) -> None:
        """The sums of some blocks to the stack; each while the next one's are under way.

        Args:
            row: The first row of the arranged A.
            index: The first block, counted from the start of the slab.
            block: The same, counted from the start of the row.
            count: Blocks.
        """
        k, unit, words = self.k, self.unit, self.c.block_size // 4
        assert self.bytes is not None
        for i in range(count):
            sums, a = self._registers(i), A[i % 2]
            for register in sums:
                unit.zero(register)
            for word in range(0, words, self.words):
                unit.load(a, self.bytes.bytes, [row, k.add(k.mul(k.add(block, i), words), word)])
                for half, register in enumerate(B):
                    unit.load(register, self.unpacked, [k.add(k.mul(k.add(index, i), words), word), half * ROWS])
                for register, b in zip(sums, B, strict=True):
                    unit.multiply_bytes(register, a, b)
            if i:
                self._keep(i - 1)
        self._keep(count - 1)

    def _registers(self, i: int) -> tuple[int, int]:
        """Those of a block's sums; the next block has the other two."""
        return SUMS[i % 2 * 2], SUMS[i % 2 * 2 + 1]

    def _keep(self, i: int) -> None:
        """A block's sums to the stack."""
        for half, register in enumerate(self._registers(i)):
            self.unit.store(register, self.ints, [i * ROWS, half * ROWS])

    def _count(self, row: Index, index: Index, block: Index, count: int) -> None:
        """Adds what the sums of some blocks count to the rows' sums, which are read and written once."""
        k, p, products = self.k, self.p, self.bytes
        assert products is not None
        starts = [v * p.lanes for v in range(p.vectors)]

        def factor(i: int, start: int) -> tuple[str, str | None]:
            place = [k.add(index, i), start]
            return k.load(self.scales, place, p.lanes), k.load(self.zeros, place, p.lanes) if self.zeros else None

        factors = [[factor(i, start) for start in starts] for i in range(count)]

        def one(r: str, _: list[str]) -> list[str]:
            place = k.add(row, r)
            sums, at = [k.load(self.sums, [place, start], p.lanes) for start in starts], k.add(self.first, place)
            for i in range(count):
                ints = [k.load(self.ints, [k.add(r, i * ROWS), start], p.lanes) for start in starts]
                (sums,) = products.add_blocks([sums], [ints], [at], k.add(block, i), factors[i])
            for start, value in zip(starts, sums, strict=True):
                k.store(value, self.sums, [place, start])
            return []

        k.loop(p.rows, [], one)
