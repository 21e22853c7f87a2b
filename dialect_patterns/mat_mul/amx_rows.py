"""Rows as the matrix unit (AMX) takes them: the contents of its registers, one after the other in memory.

    [M / 32, terms, K / 32, 2 registers, 16 rows, 16 words of two bf16]

A product takes 32 rows at a time: what it reads is one after the other, as the caches ask for it ahead.

Where rows lie, those of a register would be kilobytes apart and share a few lines of the first-level cache. f16 and f32
are taken apart into bf16 terms as they are arranged, or rounded to one. Where 32 does not divide K, zeros follow. There
are whole blocks of 32 rows; nothing is written beyond the last row, and what is there is computed with, but its
products are of no row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from iree.compiler import ir

from ..emit.amx_tiles import ROWS
from ..emit.builder import Builder, Size
from ..emit.dispatch import Kernel, dispatch
from ..emit.kernel_text import Index, KernelText
from ..node import Dim, TensorSpec
from .bf16_terms import split_words
from .simd_edges import each, workgroup_range

WORDS = 16
"""Words of a row in a register."""
_AHEAD = 1  # pairs of registers
AXES = "R_____"
"""The letters of the arranged rows' dimensions, as in ``Kernel.axes``."""


@dataclass(frozen=True)
class Rows:
    """Rows [M, K] of bf16, f16 or f32.

    Attributes:
        count: M, None where open.
        depth: K.
        dtype: Of their elements.
        terms: bf16 of each number: one of bf16 itself or what is rounded to it, else two.
    """

    count: Dim
    depth: int
    dtype: str
    terms: int

    @property
    def arranged(self) -> TensorSpec:
        """What they become."""
        blocks = None if self.count is None else -(-self.count // (2 * ROWS))
        return TensorSpec((blocks, self.terms, -(-self.depth // (2 * WORDS)), 2, ROWS, WORDS), "i32")


def blocks_of(build: Builder, rows: Size) -> Size:
    """How many times 32 the arranged rows are."""
    return build.floordiv(build.add(rows, 2 * ROWS - 1), 2 * ROWS)


def arrange(build: Builder, rows: Rows, a: ir.Value) -> ir.Value:
    """The arranged rows of ``a`` [M, K]."""
    count = build.dim(a, 0)
    return dispatch(build, rows_kernel(rows), [a], count, count, blocks_of(build, count))[0]


def asked_rows(k: KernelText, tiles: str, place: Sequence[Index]) -> list[Callable[[], None]]:
    """What asks for the registers that come after these, for the first-level cache: [block, term, number]."""
    block, term, number = place

    def line(half: int, i: int) -> None:
        k.prefetch(tiles, [block, term, k.add(number, _AHEAD), half, i, 0])

    return [partial(line, half, i) for half in range(2) for i in range(ROWS)]


def rows_kernel(rows: Rows) -> Kernel:
    """The kernel that arranges them, 16 a workgroup."""

    def write(k: KernelText, batch: Index, count: Index, memrefs: Sequence[str]) -> None:
        del batch
        source, target = memrefs
        first, own = workgroup_range(k, "1", ROWS, count if rows.count is None else rows.count)
        block, half = k.div(first, 2 * ROWS), k.rem(k.div(first, ROWS), 2)
        whole = rows.depth // (2 * WORDS)

        def move(memref: str, place: Sequence[Index], number: Index, i: Index) -> None:
            for term, words in enumerate(split_words(k, memref, place, WORDS, rows.terms)):
                k.store(words, target, [block, term, number, half, i, 0])

        def step(number: Index) -> None:
            each(k, own, 1, lambda i: move(source, [k.add(first, i), k.mul(number, 2 * WORDS)], number, i))

        each(k, whole, 1, step)
        rest = rows.depth - whole * 2 * WORDS
        if rest:
            copy, zero = k.alloca([1, 2 * WORDS], rows.dtype), k.constant(0.0, "f32")
            k.store(k.splat(zero, 2 * WORDS), copy, [0, 0])

            def last(i: Index) -> None:
                for at in range(rest):
                    k.store(k.load(source, [k.add(first, i), whole * 2 * WORDS + at]), copy, [0, at])
                move(copy, [0, 0], whole, i)

            each(k, own, 1, last)

    count = "x" if rows.count is None else rows.count
    return Kernel(
        name=f"mat_mul_amx_rows_{rows.dtype}_{count}x{rows.depth}_in{rows.terms}",
        inputs=(TensorSpec((rows.count, rows.depth), rows.dtype),),
        outputs=(rows.arranged,),
        axes=("T_", AXES),
        workgroups=(1, 1),
        write=write,
        share=ROWS,
    )
