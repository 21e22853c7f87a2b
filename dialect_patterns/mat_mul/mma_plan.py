"""How a product on the matrix units is cut into tiles, and which products can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..select import Legality, No, OtherMachine, Yes
from ..target import Target

SIDE = 16
"""Rows and columns of a matrix."""

CHUNK = 8
"""Elements of f16 in a chunk of 16 bytes."""

VECTOR = 4
"""Elements of f32 in a chunk; columns of one store."""

_LEAST_ROWS = 9  # fewer are the business of fused_simt
_ENOUGH_TILES = 100  # workgroups that keep a large GPU busy
_MIN_DEPTH = 32
_DEEP = 64
_MULTIPROCESSORS = 132  # of an H100
_STAGES = 4  # most tiles in the workgroup's memory


@dataclass(frozen=True)
class Size:
    """Of a product.

    Attributes:
        rows: M; None where open.
        depth: K.
        columns: N.
    """

    rows: int | None
    depth: int
    columns: int


@dataclass(frozen=True)
class Plan:
    """How the product is cut.

    Attributes:
        rows: Of a workgroup's tile.
        columns: Of a workgroup's tile.
        depth: K at once.
        down: Subgroups along the rows.
        across: Subgroups along the columns.
        subgroup: Threads of a subgroup.
        unit: f16 elements of one unit of a stride, and f32 ones.
        transposed: Whether the right factor's tile lies in memory column by column.
        terms: f16 numbers of an element of a factor; with two, the second counts 2^-11 and is what the first leaves.
        along: Subgroups along K, each of which multiplies its part of every tile.
        gated: Whether half of the columns are gates, and a result silu(gate) * up.
        scaled: K of the products that count what factors of their rows and columns say; 0: all count the same.
        stages: Tiles that the workgroup's memory holds.
        copies: Whether they get there past the registers.
    """

    rows: int
    columns: int
    depth: int
    down: int
    across: int
    subgroup: int
    unit: tuple[int, int]
    transposed: bool
    terms: int = 1
    along: int = 1
    gated: bool = False
    scaled: int = 0
    stages: int = 2
    copies: bool = False

    @property
    def threads(self) -> int:
        """Threads of a workgroup."""
        return self.subgroup * self.along * self.down * self.across

    @property
    def is_shared(self) -> bool:
        """Whether there is a chunk of every tile for each thread; packed weights see to that themselves."""
        right = self.threads if self.transposed else self.depth * self.width // CHUNK
        return min(self.rows * self.depth // CHUNK, right) >= self.threads

    @property
    def width(self) -> int:
        """Columns of the result that a workgroup computes."""
        return self.columns // 2 if self.gated else self.columns

    def workgroups(self, rows: int, columns: Sequence[int]) -> int:
        """Of whole products of so many columns each: as many items, of one tile each."""
        return -(-rows // self.rows) * sum(-(-count // self.width) for count in columns)

    @property
    def memory(self) -> int:
        """Chunks of the workgroup's memory: the tiles of both factors, then at least 16 rows of sums a subgroup."""
        return max(self.stages * self.stage, self.piece)

    @property
    def stage(self) -> int:
        """Chunks of the tiles of both factors, and of what their rows and columns count."""
        return self.factors + (self.depth // self.scaled * self.group if self.scaled else 0)

    @property
    def group(self) -> int:
        """Chunks of what the rows, then the columns of a tile count for the same K."""
        return (self.rows + self.columns) // VECTOR

    @property
    def factors(self) -> int:
        """Where what rows and columns count starts."""
        return self.terms * (self.chunks_a + self.chunks_b)

    @property
    def piece(self) -> int:
        """Chunks of 16 rows of sums of every subgroup."""
        return self.along * self.down * self.across * SIDE * self.stride_y

    @property
    def pieces(self) -> int:
        """Times 16 rows that are written at once."""
        high, fit = self.rows // self.down // SIDE, self.memory // self.piece
        return next(n for n in range(min(high, fit), 0, -1) if high % n == 0)

    @property
    def chunks_a(self) -> int:
        """Chunks of the left tile, of one term."""
        return self.rows * self.stride_a

    @property
    def stride_a(self) -> int:
        """Chunks from row to row of the left tile."""
        return self.depth // CHUNK + 1

    @property
    def stride_b(self) -> int:
        """Chunks from row to row of the right tile, from column to column where it is transposed."""
        return (self.depth if self.transposed else self.columns) // CHUNK + 1

    @property
    def chunks_b(self) -> int:
        """Chunks of the right tile, of one term."""
        return (self.columns if self.transposed else self.depth) * self.stride_b

    @property
    def stride_y(self) -> int:
        """Chunks from row to row of a subgroup's sums."""
        return self.columns // self.across // VECTOR + 1

    def __str__(self) -> str:
        terms = f"_{self.terms}terms" if self.terms > 1 else ""
        stages = f"c{self.stages}" if self.copies else ""
        along = f"x{self.along}" if self.along > 1 else ""
        kind = "g" if self.gated else f"w{self.scaled}" if self.scaled else ""
        return f"{kind}t{self.rows}x{self.columns}x{self.depth}s{self.down}x{self.across}{along}{stages}{terms}"


def plan_for(
    size: Size, target: Target, transposed: bool, terms: int = 1, *, gated: bool = False, scaled: int = 0
) -> Plan:
    """The largest tiles of which there are enough, and that fit; by measurement (H100).

    Where the right factor is transposed (packed, so that its loads are small), small tiles are deep ones. Those of two
    terms are neither large nor deep. What is scaled by blocks waits for its loads, so that 64 K a step count more than
    larger tiles (us of 512 rows, K to N, by CUDA / Vulkan):

                        1024 to 6144   1024 to 3584   3584 to 1024   2048 to 1024   1024 to 2048
        64 x 64 x 32     70.6 / 86.3    46.9 / 61.6    73.0 / 78.2    40.7 / 49.5    27.0
        64 x 64 x 64     49.3           35.9 / 50.1    42.8 / 63.8    25.5           19.8
        64 x 128 x 32    52.8 / 86.8    37.3 / 50.7    81.8 / 110     45.2           24.6
        128 x 128 x 32   66.4 / 83.3    34.8 / 49.0    113 / 137      64.8           34.7

    Args:
        size: Of the product; of a gated pair the columns of both.
        target: The machine.
        transposed: See :class:`Plan`.
        terms: See :class:`Plan`.
        gated: See :class:`Plan`.
        scaled: See :class:`Plan`.
    """
    rows, columns = size.rows or 0, size.columns
    is_plain = terms == 1 and not scaled
    deep = _DEEP if size.depth % _DEEP == 0 and terms == 1 else _MIN_DEPTH
    deepest = 128 if transposed and size.depth % 128 == 0 and is_plain else deep
    shapes = [(128, 128, _MIN_DEPTH, 2, 2), (64, 64, deep, 2, 2), (64, 64, _MIN_DEPTH, 2, 2)]
    if transposed:
        shapes += [(64, 32, deepest, 2, 2), (64, 32, deep, 2, 2)]
    if rows < 128 or not is_plain or target.max_threads < 4 * target.subgroup_size:
        shapes = shapes[1:]
    small = [(32, 32, deepest, 2, 2), (32, 32, _MIN_DEPTH, 2, 2)]
    if not gated:  # which has no columns for all threads there
        shapes = small if columns <= 32 or rows <= 32 else shapes + small[1:]
    unit = (1, 1) if target.matrix_stride == "elements" else (CHUNK, VECTOR)
    plans = [
        _staged(Plan(*shape, target.subgroup_size, unit, transposed, terms, gated=gated, scaled=scaled), target)
        for shape in shapes
    ]
    fitting = [p for p in plans if fits(p, target)] or plans[-1:]
    busy = [p for p in fitting if -(-rows // p.rows) * -(-columns // p.columns) >= _ENOUGH_TILES]
    return _shared(size, (busy or fitting[-1:])[0], target)


def _shared(size: Size, plan: Plan, target: Target) -> Plan:
    """With two subgroups to a part of a deep tile where there are fewer tiles than multiprocessors.

    On an H100, a prompt of 64 and 512 tokens: on Vulkan 836 to 787 us and 1192 to 1161, on CUDA 410 to 403 and 752 to
    745; four subgroups are no faster but on Vulkan at 512. Not measured of packed weights.
    """
    count = -(-(size.rows or 0) // plan.rows) * -(-size.columns // plan.columns)
    if not count or plan.transposed or plan.depth < _DEEP or count >= _MULTIPROCESSORS:
        return plan
    shared = replace(plan, along=2)
    return shared if fits(shared, target) and shared.threads <= target.max_threads else plan


def _staged(plan: Plan, target: Target) -> Plan:
    """With as many stages as fit, where they are copied."""
    copied = [] if plan.transposed else [replace(plan, stages=n, copies=True) for n in range(_STAGES, 2, -1)]
    return next((p for p in copied if p.memory * 16 <= target.copy_memory), plan)


def fits(plan: Plan, target: Target) -> bool:
    """Whether a workgroup's memory holds its tiles, and each of its threads brings a part of them."""
    return plan.is_shared and plan.memory * 16 <= (target.copy_memory if plan.copies else target.workgroup_memory)


def is_possible(
    size: Size, target: Target, transposed: bool, step: int, terms: int = 1, *, scaled: int = 0
) -> Legality:
    """Whether a target multiplies such matrices.

    Args:
        size: Of the product.
        target: The machine.
        transposed: See :class:`Plan`.
        step: What must divide the columns.
        terms: See :class:`Plan`.
        scaled: See :class:`Plan`.
    """
    if not target.is_gpu:
        return OtherMachine(f"{target.name} is not a GPU")
    if target.matrix_stride is None or target.subgroup_size < SIDE:
        return No(f"{target.name} is compiled for without products of 16x16 matrices")
    if size.rows is None or size.rows < _LEAST_ROWS:
        return No(f"{'?' if size.rows is None else size.rows} rows, less than {_LEAST_ROWS}")
    if size.depth % _MIN_DEPTH or size.columns % step or not size.depth:
        return No(f"K={size.depth} is not a multiple of {_MIN_DEPTH} or N={size.columns} of {step}")
    if not fits(plan_for(size, target, transposed, terms, scaled=scaled), target):
        return No(f"tiles do not fit in {target.workgroup_memory} bytes of a workgroup")
    return Yes()
