"""Strategy ``fused_amx``: many rows by packed weights as products of bytes on the CPU's matrix unit.

    %q:3 = flow.dispatch @mat_mul_n_bits_rows_...(%a)          as ``fused_simd``'s, for whole blocks of 32 rows
    %y   = flow.dispatch @mat_mul_n_bits_fused_amx_...(%q#0, %q#1, %q#2, %words, %scales)

    for each panel of 32 columns:  for each slab of blocks along K:      unpacked to the stack, as for ``fused_simd``
      for each 32 rows, for each block:  i32 sums [2 x 2 registers of 16 x 16] of its products
                                         y (on the stack) += what they count

Sums of a block are exact, as everywhere; what they count takes as long as the products of a block of 64.

Legal: on CPUs with AMX where A is rounded to int8, from 16 rows on, blocks of 32 or more. Cost: a fifth of a cycle for
each 64 multiply-adds, and two instructions for each 16 sums of a block.
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
    """The body of ``simd_tiled`` with the products of 32 rows on the matrix unit; see there for the arguments."""

    def __init__(
        self, k: KernelText, c: MatMulNBits, p: Plan, rows: Index, memrefs: Sequence[str], before: Index = 0
    ) -> None:
        super().__init__(k, c, p, rows, memrefs, before)
        self.words = min(c.block_size // 4, ROWS)
        self.unit = AmxTiles(k, self.words)
        self.ints = k.alloca([p.rows, p.tile], "i32")

    def write(self) -> None:
        """The whole body."""
        super().write()
        self.unit.release()

    def _rows(self, row: Index, block: Index, blocks: Index) -> list[str]:
        """32 rows times the unpacked weights."""

        def one(index: str, _: list[str]) -> list[str]:
            self._multiply(k.add(self.first, row), index, k.add(block, index))
            self._count(row, index, k.add(block, index))
            return []

        k = self.k
        k.loop(blocks, [], one)
        return []

    def _multiply(self, row: Index, index: Index, block: Index) -> None:
        """The sums of one block to the stack.

        Args:
            row: The first row of the arranged A.
            index: The block, counted from the start of the slab.
            block: The same, counted from the start of the row.
        """
        k, unit, words = self.k, self.unit, self.c.block_size // 4
        assert self.bytes is not None
        for register in SUMS:
            unit.zero(register)
        for word in range(0, words, self.words):
            for half, register in enumerate(A):
                unit.load(register, self.bytes.bytes, [k.add(row, half * ROWS), k.add(k.mul(block, words), word)])
            for half, register in enumerate(B):
                unit.load(register, self.unpacked, [k.add(k.mul(index, words), word), half * ROWS])
            for register in SUMS:
                unit.multiply_bytes(register, A[register // 2], B[register % 2])
        for register in SUMS:
            unit.store(register, self.ints, [register // 2 * ROWS, register % 2 * ROWS])

    def _count(self, row: Index, index: Index, block: Index) -> None:
        """Adds what the sums of a block count to the rows' sums."""
        k, p, products = self.k, self.p, self.bytes
        assert products is not None
        starts = [v * p.lanes for v in range(p.vectors)]
        factors = [
            (
                k.load(self.scales, [index, start], p.lanes),
                k.load(self.zeros, [index, start], p.lanes) if self.zeros else None,
            )
            for start in starts
        ]

        def one(i: str, _: list[str]) -> list[str]:
            place = k.add(row, i)
            sums = [k.load(self.sums, [place, start], p.lanes) for start in starts]
            ints = [k.load(self.ints, [i, start], p.lanes) for start in starts]
            at = k.add(self.first, place)
            for start, value in zip(starts, products.add_blocks([sums], [ints], [at], block, factors)[0], strict=True):
                k.store(value, self.sums, [place, start])
            return []

        k.loop(p.rows, [], one)
