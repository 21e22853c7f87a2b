"""Strategy ``fused_amx``: many rows by a matrix of weights on the CPU's matrix unit, which multiplies bf16.

    %tiles = flow.dispatch @mat_mul_amx_rows_...(%a)              the registers' contents, one after the other in memory
    %y = flow.dispatch @mat_mul_fused_amx_...(%tiles, %packed)    bf16: in the pairs that ``fused_simd`` reads too

f16, and f32 with --math fast, are sums of two bf16: rows are taken apart as they are arranged, weights block by block
on the stack. With --math fast the rows of an f16 product are rounded to bf16, its weights stay as they are.

    for each panel of 32 columns:  for each block of K:  for each 32 rows:
      sums [2 x 2 registers of 16 x 16] += a [2 registers of 16 rows x 32] * b [2 of 32 x 16 columns]

Four products for four loads. A chunk of rows stays in the second-level cache for all panels and K is one block, so that
no sums wait; where weights are taken apart there are several, and sums wait on the stack for the next one. Results are
written beside the next products (``amx_overlap``), rows asked for ahead: loads of the unit may take long. Where rows
lie, a register's would be kilobytes apart and share a few lines of the first-level cache.

Rows are arranged in whole blocks of 32; what is beyond the last one is computed, not written. Where 32 does not divide
K, what is left of it is a block of its own, whose weights are on the stack with zeros below them.

Legal: on CPUs with AMX, from 16 rows on, K of 32 or more. Cost: a once for each group of
panels, b once for each chunk of rows; with two terms of both three products for one, with two of one two. Sums in f32;
subnormal bf16 count as zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from iree.compiler import ir

from ..emit.amx_tiles import ROWS, SUMS, A, AmxTiles, B, multiply_terms
from ..emit.builder import spec_of
from ..emit.dispatch import Kernel, dispatch
from ..emit.kernel_text import Index, KernelText, vector_type
from ..emit.workers import slowest_share
from ..node import Dim, TensorSpec
from ..op import LoweringContext, weight_symbol
from ..select import Legality, No, OtherMachine, Yes, rows_text
from ..target import Target
from . import fused_simd
from .amx_overlap import overlapped
from .amx_rows import AXES, Rows, arrange, asked_rows, blocks_of
from .amx_rows import WORDS as _WORDS
from .bf16_terms import PRODUCTS, terms_of, write_split_weights
from .contract import MatMul
from .simd_edges import each, store_rows, workgroup_range
from .simd_plan import LINE, UNIT_FEATURES, Plan, weight_layout

FEATURES = UNIT_FEATURES
_COLUMNS = 32  # of a panel
# By terms of the weights: words of K in a block at most, of two terms 32 KiB on the stack; blocks of 32 rows of a chunk
# at most, and at least however long they are: two terms of weights are made anew for each chunk.
_BLOCK, _CHUNK, _LEAST_CHUNK = {1: 2048, 2: 128}, {1: 16, 2: 16}, {1: 4, 2: 8}
_CACHE_BYTES = 1 << 20  # of a chunk's rows: half of a second-level cache
_MOST_PANELS = 16
_START = 8.0  # products of 32 x 32 x 32 that would take as long as the start of a workgroup


@dataclass(frozen=True)
class Tiling:
    """Sizes of one kernel.

    Attributes:
        rows: M, None where open.
        words: Pairs of K, filled up to whole registers.
        rest: Of these those of the last register, where K does not fill that; else 0.
        block: Words of a block.
        chunk: Blocks of 32 rows of a workgroup.
        group: Panels of a workgroup.
        terms: Of each number of a row and of the weights, see ``bf16_terms``.
    """

    rows: Dim
    words: int
    rest: int
    block: int
    chunk: int
    group: int
    terms: tuple[int, int]


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
    if contract.depth < 2 * _WORDS:
        return No(f"K={contract.depth} does not fill a register of {2 * _WORDS}")
    return Yes()


def tiling(contract: MatMul, target: Target) -> Tiling:
    """The sizes for a product that is legal."""
    terms = terms_of(contract.a.dtype, target.fast_math)
    most, fits = _BLOCK[terms[1]], _CACHE_BYTES // (4 * ROWS * terms[0] * contract.depth)
    most_rows = min(_CHUNK[terms[1]], max(_LEAST_CHUNK[terms[1]], fits))
    whole, rest = contract.depth // (2 * _WORDS) * _WORDS, _WORDS if contract.depth % (2 * _WORDS) else 0
    words = whole + rest
    block = -(-whole // (-(-whole // most) * _WORDS)) * _WORDS
    steps = most_rows if contract.rows is None else -(-contract.rows // (2 * ROWS))
    panels = -(-contract.columns // _COLUMNS)
    cost = words / _WORDS * len(PRODUCTS[terms])

    def slowest(option: tuple[int, int]) -> float:
        chunk, group = option
        return slowest_share(-(-steps // chunk) * -(-panels // group), _START + group * chunk * cost)

    chunks = sorted({-(-steps // count) for count in range(-(-steps // most_rows), steps + 1)}, reverse=True)
    options = [(chunk, group) for chunk in chunks[:4] for group in range(1, min(panels, _MOST_PANELS) + 1)]
    if contract.rows is None:  # as many at a time as there may be
        options = [option for option in options if option[0] == most_rows]
    chunk, group = min(options, key=slowest)
    return Tiling(contract.rows, words, rest, block, chunk, group, terms)


def emit_mat_mul_fused_amx(context: LoweringContext, contract: MatMul, a: ir.Value, b: ir.Value) -> ir.Value:
    """Emit the product of ``a`` [..., K] and the weight ``b`` [K, N]."""
    build, symbol = context.builder, weight_symbol(b)
    assert symbol is not None
    assert context.weights is not None
    packed_as = weight_layout(context.target, contract.a.dtype)
    t = tiling(contract, context.target)
    packed = context.weights.repacked(
        symbol, packed_as.name, packed_as.pack, "i32" if contract.a.dtype == "bf16" else None
    )
    leading = build.shape(a)[:-1]
    a = build.refine(a, TensorSpec((*spec_of(a).shape[:-1], contract.depth), contract.a.dtype))
    rows = build.collapse(a, 0, len(leading) - 1)
    count = build.dim(rows, 0)
    tiles = arrange(build, rows_of(contract, t), rows)
    kernel = product_kernel(contract, fused_simd.plan_for(contract, context.target), t)
    (y,) = dispatch(build, kernel, [tiles, packed], count, count, blocks_of(build, count))
    return build.expand(y, 0, leading) if len(leading) > 1 else y


def rows_of(contract: MatMul, t: Tiling) -> Rows:
    """The rows, as they are arranged."""
    return Rows(t.rows, contract.depth, contract.a.dtype, t.terms[0])


def product_kernel(contract: MatMul, p: Plan, t: Tiling) -> Kernel:
    """The kernel of the product."""
    dtype, columns = contract.a.dtype, contract.columns

    def write(k: KernelText, batch: Index, count: Index, memrefs: Sequence[str]) -> None:
        del batch
        AmxBody(k, replace(p, tile=1), t, count, memrefs).write()

    return Kernel(
        name=f"mat_mul_fused_amx_{dtype}{_rounded(dtype, t)}_{_dim(t.rows)}x{columns}x{contract.depth}",
        inputs=(
            rows_of(contract, t).arranged,
            TensorSpec((p.layout.panels(columns), p.depth, _COLUMNS), "i32" if p.pairs else dtype),
        ),
        outputs=(TensorSpec((t.rows, columns), dtype),),
        axes=(AXES, "___", "T_"),
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
        memrefs: The arranged rows, the weights, and y [M, N].
    """

    def __init__(self, k: KernelText, p: Plan, t: Tiling, rows: Index, memrefs: Sequence[str]) -> None:
        known = rows if t.rows is None else t.rows
        self.k, self.p, self.t = k, p, t
        # Where all blocks of rows are whole, nothing is asked at the end.
        self.rows: Index = known if isinstance(known, int) and known % (2 * ROWS) == 0 else k.index(known)
        self.a, self.b, self.y = memrefs
        self.tiles = AmxTiles(k)
        waiting = t.chunk if t.block < t.words else 1
        self.sums = k.alloca([waiting * 2 * ROWS, _COLUMNS])
        self.parts = [k.alloca([t.block, _COLUMNS], "i32") for _ in range(0 if p.pairs else t.terms[1])]
        self.last = [k.alloca([_WORDS, _COLUMNS], "i32") for _ in range(t.terms[1] if t.rest else 0)]

    def write(self) -> None:
        """The whole body."""
        k, t = self.k, self.t
        panel, panels = workgroup_range(self.k, "0", t.group, self.p.panels)
        blocks = k.div(k.add(self.rows, 2 * ROWS - 1), 2 * ROWS)
        step, steps = workgroup_range(self.k, "1", t.chunk, blocks)
        known = t.words - t.rest
        whole, left = divmod(known, t.block)
        ends = [*([(whole * t.block, left)] if left else []), *([(known, t.rest)] if t.rest else [])]
        if not ends:
            whole -= 1
            ends = [(whole * t.block, t.block)]
        for part in self.last:
            each(k, _WORDS, 1, lambda word, part=part: self._clear(part, word))

        def one(index: Index) -> None:
            at = k.add(panel, index)
            if whole:
                each(self.k, whole * t.block, t.block, lambda start: self._block(at, step, steps, start, t.block))
            for start, size in ends:
                self._block(at, step, steps, start, size)

        each(self.k, panels, 1, one)
        self.tiles.release()

    def _block(self, panel: Index, first: Index, steps: Index, start: Index, size: int) -> None:
        """All rows by one block of one panel."""
        k, t = self.k, self.t
        parts = self.parts
        if t.rest and isinstance(start, int) and start == t.words - t.rest:
            parts = self.last
            self._end_weights(panel, start)
        elif parts:
            write_split_weights(k, self.p, panel, start, size, self.b, parts)

        def waiting(index: Index) -> Index:
            return k.mul(index, 2 * ROWS) if t.block < t.words else 0

        def row(index: Index, i: Index = 0) -> Index:
            return k.add(k.mul(k.add(first, index), 2 * ROWS), i)

        def begin(index: Index) -> None:
            self._begin(start, waiting(index))

        def step(index: Index, number: Index) -> None:
            self._step(panel, k.add(first, index), start, size, index, k.mul(number, _WORDS), parts)

        def end(index: Index) -> None:
            for register in SUMS:
                self.tiles.store(register, self.sums, self._place(register, waiting(index)))

        if isinstance(start, int) and start + size == t.words:

            def last_step(index: Index, number: Index) -> None:
                step(index, number)
                share = -(-2 * ROWS * _WORDS // size)
                for i in range(share):
                    place = [row(index, k.add(k.mul(number, share), i)), k.mul(panel, _COLUMNS)]
                    k.prefetch(self.y, place, write=True)

            def finish(index: Index, i: Index) -> None:
                at = k.add(waiting(index), i)
                sums = [k.load(self.sums, [at, v * self.p.lanes], self.p.lanes) for v in range(self.p.vectors)]
                store_rows(k, self.p, self.y, self.rows, row(index, i), panel, sums)

            overlapped(k, steps, size // _WORDS, begin, last_step, end, finish)
            return

        def whole(index: Index) -> None:
            begin(index)
            each(k, size // _WORDS, 1, lambda number: step(index, number))
            end(index)

        each(self.k, steps, 1, whole)

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

    def _clear(self, part: str, word: Index) -> None:
        """Zeros to a word's row of a part."""
        zeros = self.k.constant(0, vector_type(self.p.lanes, "i32"))
        for column in range(0, _COLUMNS, self.p.lanes):
            self.k.store(zeros, part, [word, column])

    def _end_weights(self, panel: Index, start: int) -> None:
        """What is left of K to the stack, above zeros."""
        k, p = self.k, self.p
        if not p.pairs:
            write_split_weights(k, p, panel, start, p.depth // 2 - start, self.b, self.last, half=p.depth % 2 == 1)
            return
        for word in range(p.depth - start):
            for column in range(0, _COLUMNS, p.lanes):
                words = k.load(self.b, [panel, start + word, column], p.lanes)
                k.store(words, self.last[0], [word, column])

    def _step(
        self, panel: Index, block: Index, start: Index, size: int, index: Index, at: Index, parts: Sequence[str]
    ) -> None:
        """A register's words of K of 32 rows, from word ``at`` of a block of K on."""
        k, tiles, t = self.k, self.tiles, self.t
        word = k.add(start, at)

        def load_rows(term: int, half: int) -> None:
            tiles.load(A[half], self.a, [block, term, k.div(word, _WORDS), half, 0, 0])

        def load_columns(term: int, half: int) -> None:
            if parts:
                tiles.load(B[half], parts[term], [at, half * ROWS])
            else:
                tiles.load(B[half], self.b, [panel, word, half * ROWS])

        self._ask_next(panel, k.add(k.add(k.add(start, size), at), k.mul(index, -(-_WORDS // t.chunk))))
        number = k.div(word, _WORDS)
        asks = [ask for term in range(t.terms[0]) for ask in asked_rows(k, self.a, [block, term, number])]
        multiply_terms(tiles, PRODUCTS[t.terms], load_rows, load_columns, asks)

    def _ask_next(self, panel: Index, word: Index) -> None:
        """A share of the weights of the next block, which follow in memory: for the second-level cache."""
        k, share = self.k, -(-_WORDS // self.t.chunk)
        rows, line = (1 if self.p.pairs else 2), LINE // k.element_bytes(self.b)
        for row in range(share * rows):
            for column in range(0, _COLUMNS, line):
                k.prefetch(self.b, [panel, k.add(k.mul(word, rows), row), column], level=2)

    def _place(self, register: int, waiting: Index) -> list[Index]:
        """Where the stack has a register of sums."""
        return [self.k.add(waiting, register // 2 * ROWS), register % 2 * ROWS]


def _rounded(dtype: str, t: Tiling) -> str:
    """What the kernel's name says of rows that are rounded."""
    return "_by_bf16" if t.terms[0] == 1 and dtype != "bf16" else ""


def _dim(size: Dim) -> str:
    return "x" if size is None else str(size)
