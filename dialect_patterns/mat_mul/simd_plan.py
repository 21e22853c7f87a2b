"""How strategy ``fused_simd`` cuts a MatMul into workgroups, blocks and tiles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from ..emit.amx_tiles import ROWS
from ..emit.workers import slowest_share
from ..target import Target
from .simd_layout import Layout, PairLayout, layout
from .simd_pairs import has_fast_dot, multiplies_pairs, multiplies_squares

VECTORS = 2
"""Vectors side by side in a panel of columns, where a row does not have all registers for itself."""

LINE = 64
"""Bytes of a cache line."""

UNIT_FEATURES = frozenset({"amx-tile", "amx-bf16"})
"""Of CPUs with a unit that multiplies matrices of bf16."""

_ROWS = 6  # of a tile of two vectors each, in 16 registers
_SQUARE_ROWS = 12  # where 2 x 2 sums are a vector, in 32
_ROWS_OF_LINES = 2  # that have registers for vectors of whole lines of the shared layout
_BLOCK_BYTES = 16 << 10  # of a panel in f32: half of a first-level cache
_SUMS_BYTES = 12 << 10  # with a block, less than the 32 KiB of stack that IREE allows
_GROUP_BYTES = 1 << 19  # of weights a workgroup reads at most where the rows are few
_START_BYTES = 1 << 13  # that would take as long as its start
_MAX_GROUP = 32  # panels of a workgroup where they are many
_START = 1.0  # tiles by panels that would take as long as the start of a workgroup
_FIRST = 0.5  # and as the first touch of a block's weights
_LATENCY = 10  # multiply-adds that are under way at once
_SQUARE_LATENCY = 16  # by LLVM's models of Neoverse V1 and V2


@dataclass(frozen=True)
class Plan:
    """Sizes of one kernel.

    Attributes:
        rows: M, None where open.
        depth: K; half of it, rounded up, where pairs are multiplied.
        columns: N.
        lanes: Lanes of a vector.
        tile: Rows of a tile.
        block: Rows of the weights in a block; the depth where the rows are few.
        group: Panels of a workgroup.
        unroll: Rows of the weights in one iteration.
        chunk: Tiles of a workgroup; 0 where the rows are few, one tile, and read where they are.
        layout: How the weights lie in memory.
        vectors: Vectors side by side in a panel of columns.
        pairs: Whether pairs of bf16 are multiplied.
        half: Whether the last of these is an element alone.
        widened: Whether they are taken apart, and multiplied in f32.
        unit: Whether the CPU's matrix unit multiplies them, see ``simd_unit``.
        squares: Whether they are multiplied two by two, see ``simd_squares``.
    """

    rows: int | None
    depth: int
    columns: int
    lanes: int
    tile: int
    block: int
    group: int
    unroll: int
    chunk: int
    layout: Layout
    vectors: int = VECTORS
    pairs: bool = False
    half: bool = False
    widened: bool = False
    unit: bool = False
    squares: bool = False

    @property
    def parts(self) -> int:
        """Elements that are multiplied one by one, of each row of the weights."""
        return 2 if self.widened else 1

    @property
    def filled(self) -> int:
        """The depth, and a row of zeros where two are taken at once and one is left."""
        return self.depth + self.depth % 2 if self.squares else self.depth

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return self.lanes * self.vectors

    @property
    def panels(self) -> int:
        """Panels of columns."""
        return -(-self.columns // self.width)

    @property
    def direct(self) -> bool:
        """Whether all rows are one tile."""
        return self.chunk == 0

    @property
    def tiles(self) -> int | None:
        """Tiles of all rows, None where open."""
        return None if self.rows is None else -(-self.rows // self.tile)


def weight_layout(target: Target, dtype: str) -> Layout:
    """How the weights of all products lie for a machine, whatever their rows are."""
    width = _lanes(target) * VECTORS
    return PairLayout(width, width) if multiplies_pairs(dtype, target) else panel_layout(target)


def panel_layout(target: Target) -> Layout:
    """The same for products that take elements one by one."""
    return layout(target, _lanes(target) * VECTORS)


def _lanes(target: Target) -> int:
    return max(target.vector_bits // 32, 4)


@cache
def plan(rows: int | None, elements: int, columns: int, target: Target, packed: Layout, weight_bytes: int) -> Plan:
    """The sizes for a product.

    Args:
        rows: M, None where open.
        elements: K.
        columns: N.
        target: The machine.
        packed: How the weights lie.
        weight_bytes: Of one weight.
    """
    lanes = _lanes(target)
    pairs = isinstance(packed, PairLayout)
    depth, half = (-(-elements // 2), elements % 2 == 1) if pairs else (elements, False)
    widened = pairs and not half and not has_fast_dot(target)
    width = lanes * VECTORS
    panels = -(-columns // width)
    if rows is not None and rows < ROWS and pairs and elements % (2 * ROWS) == 0 and target.features >= UNIT_FEATURES:
        group = _group(panels, depth * width * 4)
        return Plan(rows, depth, columns, lanes, rows, depth, group, ROWS, 0, packed, VECTORS, pairs, unit=True)
    most = 12 if target.vector_bits >= 512 else _ROWS  # with two vectors each, most of 32 or 16 registers
    if rows is not None and rows <= most:
        vectors = max(VECTORS, packed.width // lanes) if rows <= _ROWS_OF_LINES else VECTORS
        panels = -(-columns // (lanes * vectors))
        group = _group(panels, depth * lanes * vectors * (2 * weight_bytes if pairs else weight_bytes))
        unroll = _unroll(depth - half, depth - half)
        return Plan(rows, depth, columns, lanes, rows, depth, group, unroll, 0, packed, vectors, pairs, half, widened)
    squares = pairs and multiplies_squares(target)
    if squares:
        tile = _SQUARE_ROWS if rows is None else _square_tile(rows)
    else:
        tile = (_ROWS if target.shares_weights else most) if rows is None else best_tile(rows, most)
    blocks = -(-depth * width * (8 if widened else 4) // _BLOCK_BYTES)
    block = -(-depth // blocks)
    block += -block % lanes if blocks > 1 else 0
    longest = longest_chunk(tile, width)
    group, chunk = _share(panels, -(-rows // tile) if rows else longest, longest)
    unroll = max(_unroll(depth, block), 2 if squares else 1)
    tiled = (tile, block, group, unroll, chunk, packed, VECTORS)
    return Plan(rows, depth, columns, lanes, *tiled, pairs, half, widened, squares=squares)


def _unroll(depth: int, block: int) -> int:
    return next(u for u in (4, 2, 1) if depth % u == 0 and block % u == 0)


def longest_chunk(tile: int, width: int) -> int:
    """Tiles of a workgroup whose sums wait on the stack."""
    return max(1, _SUMS_BYTES // (tile * width * 4))


def best_tile(rows: int, most: int) -> int:
    """Rows of a tile: few tiles, little filled up; small ones wait for their sums."""
    return min(range(2, most + 1), key=lambda tile: -(-rows // tile) * max(tile * VECTORS, _LATENCY + 1))


def _square_tile(rows: int) -> int:
    """The same of even rows, the most of those that are as good: fewer loads for a product."""
    sizes = range(_SQUARE_ROWS, 0, -2)
    return min(sizes, key=lambda tile: -(-rows // tile) * max(tile * VECTORS, _SQUARE_LATENCY))


def _group(panels: int, panel_bytes: int) -> int:
    """Panels of a workgroup of few rows."""
    most = min(panels, max(1, _GROUP_BYTES // panel_bytes))

    def slowest(group: int) -> float:
        return slowest_share(-(-panels // group), _START_BYTES + group * panel_bytes)

    return min(range(1, most + 1), key=slowest)


def _share(panels: int, tiles: int, longest: int) -> tuple[int, int]:
    """Panels and tiles of a workgroup such that workers end at the same time."""
    fewest = -(-tiles // longest)
    chunks = sorted({-(-tiles // count) for count in range(fewest, fewest + 4)}, reverse=True)
    options = [(group, chunk) for chunk in chunks for group in range(1, min(panels, _MAX_GROUP) + 1)]

    def slowest(option: tuple[int, int]) -> float:
        group, chunk = option
        return slowest_share(-(-panels // group) * -(-tiles // chunk), _START + group * (chunk + _FIRST))

    return min(options, key=slowest)
