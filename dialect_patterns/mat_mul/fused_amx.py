"""Strategy ``fused_amx``: many rows by a matrix of weights on the CPU's matrix unit, which multiplies bf16.

    %y = flow.dispatch @mat_mul_fused_amx_...(%a, %packed)        bf16: in the pairs that ``fused_simd`` reads too

    %terms = flow.dispatch @mat_mul_amx_rows_...(%a)              f16, and f32 with --math fast: sums of two bf16
    %y = flow.dispatch @mat_mul_fused_amx_...(%terms, %packed)    weights taken apart block by block, on the stack

    for each panel of 32 columns:  for each block of K:  for each 32 rows:
      sums [2 x 2 registers of 16 x 16] += a [2 registers of 16 rows x 32] * b [2 of 32 x 16 columns]

Four products for four loads, so that the unit waits for no memory within the second-level cache. A block of a panel
stays in the first-level cache while the rows stream past it; sums wait on the stack for the next block. Where 32 does
not divide the rows, the last ones begin earlier and some are computed twice.

Rows whose number is open are copied to whole blocks of 32 first; what is beyond the last one is computed, not written.

Legal: on CPUs with AMX, from 16 rows on, where 32 divides K. Cost: a once for each group of
panels, b once for each chunk of rows; with two terms three products for one. Sums in f32; subnormal bf16 count as zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from iree.compiler import ir

from ..emit.amx_tiles import ROWS, SUMS, A, AmxTiles, B
from ..emit.builder import spec_of
from ..emit.dispatch import Kernel, dispatch
from ..emit.kernel_text import Index, KernelText
from ..emit.workers import slowest_share
from ..node import Dim, TensorSpec
from ..op import LoweringContext, weight_symbol
from ..select import Legality, No, OtherMachine, Yes, rows_text
from ..target import Target
from . import fused_simd
from .bf16_terms import PRODUCTS, write_split_rows, write_split_weights
from .contract import MatMul
from .simd_edges import each, store_rows, workgroup_range
from .simd_plan import UNIT_FEATURES, Plan, weight_layout

FEATURES = UNIT_FEATURES
_COLUMNS = 32  # of a panel
_WORDS = 16  # of K in one product
# By terms: words of K in a block, 20 KiB of a panel or 16 on the stack; blocks of 32 rows whose sums wait there, of the
# 32 KiB that IREE allows.
_BLOCK, _CHUNK = {1: 160, 2: 64}, {1: 6, 2: 3}
_MOST_PANELS = 16
_START = 8.0  # products of 32 x 32 x 32 that would take as long as the start of a workgroup


@dataclass(frozen=True)
class Tiling:
    """Sizes of one kernel.

    Attributes:
        rows: M, None where open.
        words: Pairs of K.
        block: Words of a block.
        chunk: Blocks of 32 rows of a workgroup.
        group: Panels of a workgroup.
        terms: Of each number, see ``bf16_terms``.
    """

    rows: Dim
    words: int
    block: int
    chunk: int
    group: int
    terms: int

    @property
    def arranged(self) -> bool:
        """Whether rows are taken apart or copied first."""
        return self.terms > 1 or self.rows is None

    @property
    def row_axis(self) -> str:
        """Which sizes the arranged rows have: those of the product, or whole blocks of 32."""
        return "R" if self.rows is None else "T"


def is_legal(contract: MatMul, target: Target) -> Legality:
    """Where the machine has the unit and the sizes fill it."""
    possible = fused_simd.is_legal(contract, target)
    if isinstance(possible, No):
        return possible
    dtype = contract.a.dtype
    if not target.features >= FEATURES:
        return OtherMachine(f"no matrix unit for {dtype}")
    if dtype == "f32" and not target.fast_math:
        return No("its matrix unit rounds f32, which --math fast allows")
    if contract.rows is not None and contract.rows < ROWS:
        return No(f"{rows_text(contract.rows)}, from {ROWS} on the matrix unit is worth its start")
    if contract.depth % (2 * _WORDS):
        return No(f"{2 * _WORDS} does not divide K={contract.depth}")
    return Yes()


def tiling(contract: MatMul) -> Tiling:
    """The sizes for a product that is legal."""
    words, terms = contract.depth // 2, 1 if contract.a.dtype == "bf16" else 2
    blocks = -(-words // _BLOCK[terms])
    block = -(-words // (blocks * _WORDS)) * _WORDS
    steps = _CHUNK[terms] if contract.rows is None else -(-contract.rows // (2 * ROWS))
    panels = -(-contract.columns // _COLUMNS)
    cost = words / _WORDS * (1 if terms == 1 else len(PRODUCTS))

    def slowest(option: tuple[int, int]) -> float:
        chunk, group = option
        return slowest_share(-(-steps // chunk) * -(-panels // group), _START + group * chunk * cost)

    chunks = sorted({-(-steps // count) for count in range(-(-steps // _CHUNK[terms]), steps + 1)}, reverse=True)
    options = [(chunk, group) for chunk in chunks[:4] for group in range(1, min(panels, _MOST_PANELS) + 1)]
    if contract.rows is None:  # as many at a time as there may be
        options = [option for option in options if option[0] == _CHUNK[terms]]
    chunk, group = min(options, key=slowest)
    return Tiling(contract.rows, words, block, chunk, group, terms)


def emit_mat_mul_fused_amx(context: LoweringContext, contract: MatMul, a: ir.Value, b: ir.Value) -> ir.Value:
    """Emit the product of ``a`` [..., K] and the weight ``b`` [K, N]."""
    build, symbol = context.builder, weight_symbol(b)
    assert symbol is not None
    assert context.weights is not None
    packed_as = weight_layout(context.target, contract.a.dtype)
    t = tiling(contract)
    packed = context.weights.repacked(symbol, packed_as.name, packed_as.pack, "i32" if t.terms == 1 else None)
    leading = build.shape(a)[:-1]
    a = build.refine(a, TensorSpec((*spec_of(a).shape[:-1], contract.depth), contract.a.dtype))
    rows = build.collapse(a, 0, len(leading) - 1)
    count = build.dim(rows, 0)
    padded = build.mul(build.floordiv(build.add(count, 2 * ROWS - 1), 2 * ROWS), 2 * ROWS)
    if t.arranged:
        (rows,) = dispatch(build, rows_kernel(contract, t), [rows], count, count, padded)
    kernel = product_kernel(contract, fused_simd.plan_for(contract, context.target), t)
    (y,) = dispatch(build, kernel, [rows, packed], count, count, padded)
    return build.expand(y, 0, leading) if len(leading) > 1 else y


def rows_kernel(contract: MatMul, t: Tiling) -> Kernel:
    """The kernel that takes the rows apart, or copies them."""
    dtype, depth = contract.a.dtype, contract.depth
    split = TensorSpec((t.terms, t.rows, t.words), "i32")

    def write(k: KernelText, batch: Index, count: Index, memrefs: Sequence[str]) -> None:
        del batch, count
        row = k.op("hal.interface.workgroup.id[1] : index", "index")
        if t.terms > 1:
            write_split_rows(k, row, depth, _WORDS, *memrefs)
            return
        source, target = memrefs
        each(k, depth, _COLUMNS, lambda at: k.store(k.load(source, [row, at], _COLUMNS, raw=True), target, [row, at]))

    return Kernel(
        name=f"mat_mul_amx_rows_{dtype}_{_dim(t.rows)}x{depth}",
        inputs=(TensorSpec((t.rows, depth), dtype),),
        outputs=(split if t.terms > 1 else TensorSpec((t.rows, depth), dtype),),
        axes=("T_", f"_{t.row_axis}_" if t.terms > 1 else f"{t.row_axis}_"),
        workgroups=(1, 1),
        write=write,
    )


def product_kernel(contract: MatMul, p: Plan, t: Tiling) -> Kernel:
    """The kernel of the product."""
    dtype, columns = contract.a.dtype, contract.columns

    def write(k: KernelText, batch: Index, count: Index, memrefs: Sequence[str]) -> None:
        del batch
        AmxBody(k, replace(p, tile=1), t, count, memrefs).write()

    return Kernel(
        name=f"mat_mul_fused_amx_{dtype}_{_dim(t.rows)}x{columns}x{contract.depth}",
        inputs=(
            rows_kernel(contract, t).outputs[0] if t.arranged else TensorSpec((t.rows, contract.depth), dtype),
            TensorSpec((p.layout.panels(columns), p.depth, _COLUMNS), "i32" if p.pairs else dtype),
        ),
        outputs=(TensorSpec((t.rows, columns), dtype),),
        axes=(rows_kernel(contract, t).axes[1] if t.arranged else "T_", "___", "T_"),
        workgroups=(-(-p.panels // t.group), 1),
        write=write,
        share=t.chunk * 2 * ROWS,
    )


class AmxBody:
    """Writes the body.

    Args:
        k: Where to.
        p: How columns are cut into panels, a row at a time.
        t: Sizes of the kernel.
        rows: M.
        memrefs: The rows [M, K], or their terms [2, M, K / 2]; the weights; and y [M, N].
    """

    def __init__(self, k: KernelText, p: Plan, t: Tiling, rows: Index, memrefs: Sequence[str]) -> None:
        self.k, self.p, self.t, self.rows = k, p, t, rows if t.rows is None else t.rows
        self.a, self.b, self.y = memrefs
        self.tiles = AmxTiles(k)
        waiting = t.chunk if t.block < t.words else 1
        self.sums = k.alloca([waiting * 2 * ROWS, _COLUMNS])
        self.parts = [k.alloca([t.block, _COLUMNS], "i32") for _ in range(t.terms)] if t.terms > 1 else []

    def write(self) -> None:
        """The whole body."""
        k, t = self.k, self.t
        panel, panels = workgroup_range(self.k, "0", t.group, self.p.panels)
        blocks = k.div(k.add(self.rows, 2 * ROWS - 1), 2 * ROWS)
        step, steps = workgroup_range(self.k, "1", t.chunk, blocks)
        whole = t.words // t.block * t.block

        def one(index: Index) -> None:
            at = k.add(panel, index)
            each(self.k, whole, t.block, lambda start: self._block(at, step, steps, start, t.block))
            if t.words > whole:
                self._block(at, step, steps, whole, t.words - whole)

        each(self.k, panels, 1, one)
        self.tiles.release()

    def _block(self, panel: Index, first: Index, steps: Index, start: Index, size: int) -> None:
        """All rows by one block of one panel."""
        k, t = self.k, self.t
        if self.parts:
            write_split_weights(k, self.p, panel, start, size, self.b, self.parts)

        def rows(index: Index) -> None:
            row = k.mul(k.add(first, index), 2 * ROWS)
            places = [k.add(row, half * ROWS) for half in range(2)]
            if t.rows is not None:
                places = [k.minimum(place, t.rows - ROWS) for place in places]
            waiting = k.mul(index, 2 * ROWS) if t.block < t.words else 0
            self._begin(start, waiting)
            self._products(panel, places, start, size)
            self._end(panel, places, k.add(start, size), waiting)

        each(self.k, steps, 1, rows)

    def _begin(self, start: Index, waiting: Index) -> None:
        k = self.k

        def zeros() -> list[str]:
            for register in SUMS:
                self.tiles.zero(register)
            return []

        def again() -> list[str]:
            for register in SUMS:
                self.tiles.load(register, self.sums, self._place(register, waiting))
            return []

        if isinstance(start, int):
            (zeros if start == 0 else again)()
        else:
            k.when(k.less(0, start), [], again, zeros)

    def _products(self, panel: Index, places: Sequence[Index], start: Index, size: int) -> None:
        k, tiles = self.k, self.tiles

        def load_rows(term: int, word: Index) -> None:
            for register, row in zip(A, places, strict=True):
                place = [term, row, word] if self.parts else [row, k.mul(word, 2)]
                tiles.load(register, self.a, place)

        def load_columns(term: int, word: Index, at: Index) -> None:
            for half, register in enumerate(B):
                if self.parts:
                    tiles.load(register, self.parts[term], [at, half * ROWS])
                else:
                    tiles.load(register, self.b, [panel, word, half * ROWS])

        def step(at: Index, _: list[str]) -> list[str]:
            word, last = k.add(start, at), (-1, -1)
            for terms in PRODUCTS if self.parts else PRODUCTS[:1]:
                if terms[0] != last[0]:
                    load_rows(terms[0], word)
                if terms[1] != last[1]:
                    load_columns(terms[1], word, at)
                for register in SUMS:
                    tiles.multiply_bf16(register, A[register // 2], B[register % 2])
                last = terms
            return []

        k.loop(size, [], step, step=_WORDS)

    def _end(self, panel: Index, places: Sequence[Index], stop: Index, waiting: Index) -> None:
        """The sums of two registers' rows: to y, or to the stack for the next block."""
        k, p, t = self.k, self.p, self.t
        for register in SUMS:
            self.tiles.store(register, self.sums, self._place(register, waiting))

        def finish() -> list[str]:
            for half, place in enumerate(places):

                def row(i: Index, half: int = half, place: Index = place) -> None:
                    at = k.add(k.add(waiting, half * ROWS), i)
                    sums = [k.load(self.sums, [at, v * p.lanes], p.lanes) for v in range(p.vectors)]
                    store_rows(k, p, self.y, self.rows, k.add(place, i), panel, sums)

                each(self.k, ROWS, 1, row)
            return []

        if isinstance(stop, int):
            if stop == t.words:
                finish()
        elif t.words % t.block == 0:
            k.when(k.less(stop, t.words), [], lambda: [], finish)

    def _place(self, register: int, waiting: Index) -> list[Index]:
        """Where the stack has a register of sums."""
        return [self.k.add(waiting, register // 2 * ROWS), register % 2 * ROWS]


def _dim(size: Dim) -> str:
    return "x" if size is None else str(size)
