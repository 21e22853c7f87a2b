"""How strategy ``fused_simd`` cuts a MatMulNBits into workgroups, tiles and vectors."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from ..emit.workers import slowest_share
from ..target import STACK_BYTES, Target
from .contract import MatMulNBits
from .simd_dot import DotInstruction, dot_instruction

MIN_LANES = 4
AMX_LANES = 16
CHUNK = 4
"""Words of a column that are loaded at once: 16 bytes."""

_STACK_BYTES = 28 * 1024  # IREE refuses kernels with more than 32 KiB
_DIRECT_ROWS = 4
_AMD = "sse4a"  # which nobody else has
_AMD_DIRECT_LANES = 8
_ROW_BLOCK = 64  # about
_AMX_STACK_BYTES = 64 * 1024
_REST_BYTES = 8 * 1024  # of a stack, for all but weights and sums
_AMX_ROW_BLOCKS = (256, 128, 64, 32, 16)
_AMX_BF16_ROW_BLOCKS = (512, 256, 128, 64, 32)
_CACHE_BYTES = 1 << 20  # of A in bf16: half of a second-level cache
_CACHED_ROWS = 128  # which a workgroup has however long they are
_MANY_ROWS = 64  # of which a register of 16 that is not needed is a small part
_AMX_COUNTED = (2, 1)  # with the products of the next ones about as many instructions as a core has under way
_SLAB_BYTES = 19 * 1024
_MAX_COLUMNS = 512  # of a workgroup
_START = 12  # columns that would take as long as the start of a workgroup


@dataclass(frozen=True)
class Field:
    """Some weights of each word, one a byte.

    Attributes:
        shift: Where in its byte each starts.
        mask: Of the byte, after the shift.
        group: Which group of four elements of A they meet.
        factor: What their products count.
    """

    shift: int
    mask: int
    group: int
    factor: int


@dataclass(frozen=True)
class Plan:
    """Sizes of one kernel.

    Attributes:
        instruction: For products of bytes; None to multiply in f32.
        lanes: Columns of a vector.
        vectors: Vectors side by side in a tile of columns.
        rows: Rows of A of a register tile.
        row_block: Rows of A of a workgroup, for which it unpacks weights once; 0 where it has all rows and multiplies
            while unpacking.
        slab: Blocks along K that are unpacked at once.
        workgroup_columns: Columns of a workgroup, a multiple of the tile.
        counted: Blocks whose sums in integers wait on the stack, twice, and are counted at once, on the matrix unit.
    """

    instruction: DotInstruction | None
    lanes: int
    vectors: int
    rows: int
    row_block: int
    slab: int
    workgroup_columns: int
    counted: int = 1

    @property
    def tile(self) -> int:
        """Columns of a tile."""
        return self.lanes * self.vectors

    @property
    def direct(self) -> bool:
        """Whether weights are multiplied as they are unpacked."""
        return self.row_block == 0


def fields(contract: MatMulNBits, instruction: DotInstruction) -> list[Field]:
    """How a word of weights becomes operands of a dot instruction."""
    bits = contract.bits
    if bits > instruction.weight_bits:
        half = bits // 2
        mask = (1 << half) - 1
        return [Field(0, mask, 0, 1), Field(half, mask, 0, 1 << half)]
    return [Field(i * bits, (1 << bits) - 1, i, 1) for i in range(8 // bits)]


def groups(contract: MatMulNBits) -> int:
    """Groups of four elements of A that meet one word of weights."""
    return 8 // contract.bits


def plan(contract: MatMulNBits, target: Target) -> Plan | str:
    """The sizes for a contract and a machine, or why there are none."""
    c = contract
    lanes = max(target.vector_bits // 32, MIN_LANES)
    if c.columns < lanes:
        return f"N={c.columns} is less than a vector of {lanes}"
    instruction = dot_instruction(target) if c.rounds_a else None
    rows = c.rows
    few = rows is not None and rows <= _DIRECT_ROWS
    if few and rows is not None and arranged_bytes(c, instruction) * rows <= _STACK_BYTES:
        if instruction and _AMD in target.features and lanes > _AMD_DIRECT_LANES:
            # Each column is a stream: 16 of them take a Zen 4 a third longer than 8, and Sapphire Rapids 7 % less.
            instruction, lanes = dot_instruction(target, 32 * _AMD_DIRECT_LANES), _AMD_DIRECT_LANES
        return Plan(instruction, lanes, 1, rows, 0, c.blocks, _workgroup_columns(c, lanes, 1))
    tile_rows, vectors = _register_tile(instruction)
    row_block = -(-_ROW_BLOCK // tile_rows) * tile_rows
    vectors = vectors if c.columns >= vectors * lanes else 1
    while True:
        block_bytes = _unpacked_bytes(c, instruction) * lanes * vectors
        slab = _slab(c.blocks, max(1, _SLAB_BYTES // block_bytes))
        sums = 4 * row_block * lanes * vectors
        if slab * block_bytes + sums <= _STACK_BYTES:
            columns = _workgroup_columns(c, lanes * vectors, -(-(rows or 1) // row_block))
            return Plan(instruction, lanes, vectors, tile_rows, row_block, slab, columns)
        if vectors == 1:
            return f"a block of {c.block_size} weights of {lanes} columns does not fit on the stack"
        vectors = 1


def amx_plan(contract: MatMulNBits, target: Target) -> Plan | str:
    """The sizes for the matrix unit, which multiplies 16 or 32 rows by 32 columns; or why there are none."""
    c, lanes, vectors, rows = contract, AMX_LANES, 2, AMX_LANES
    if c.rows is None or c.rows >= _MANY_ROWS or c.rows % (2 * rows) == 0:
        rows *= 2
    instruction = dot_instruction(target)
    if instruction is None or instruction.vector_bits != 32 * lanes or c.columns < lanes * vectors:
        return f"N={c.columns} is less than the {lanes * vectors} columns of the matrix unit"
    block_bytes = _unpacked_bytes(c, instruction) * lanes * vectors
    for row_block, counted in product(_AMX_ROW_BLOCKS, _AMX_COUNTED):
        fixed = 4 * lanes * vectors * (row_block + 2 * rows * counted)
        most = (_AMX_STACK_BYTES - fixed) // block_bytes
        slab = _slab(c.blocks, max(1, most - most % CHUNK))
        if slab * block_bytes + fixed <= _AMX_STACK_BYTES and rows <= row_block < 2 * (c.rows or row_block):
            columns = _workgroup_columns(c, lanes * vectors, -(-(c.rows or 1) // row_block))
            return Plan(instruction, lanes, vectors, rows, row_block, slab, columns, counted)
    return f"a block of {c.block_size} weights of {lanes * vectors} columns does not fit on the stack"


def amx_bf16_plan(contract: MatMulNBits) -> Plan | str:
    """The sizes for the matrix unit where it multiplies bf16; or why there are none."""
    c, tile, zeros = contract, 2 * AMX_LANES, contract.zero_points != "default"
    if c.columns < tile:
        return f"N={c.columns} is less than the {tile} columns of the matrix unit"
    block_bytes = tile * (2 * c.block_size + (8 if zeros else 4))
    room, least = STACK_BYTES - 3 * _REST_BYTES, _AMX_BF16_ROW_BLOCKS[-1]
    for row_block in _AMX_BF16_ROW_BLOCKS:
        too_many = row_block > _CACHED_ROWS and 2 * row_block * c.depth > _CACHE_BYTES
        if row_block > least and (too_many or row_block >= 2 * (c.rows or row_block)):
            continue
        slab, most = c.blocks, (room - 4 * tile * 2 * AMX_LANES) // block_bytes
        if most < slab:  # sums wait for the next one
            most = (room - 4 * tile * row_block) // block_bytes
            slab = _slab(c.blocks, max(1, most - most % CHUNK))
        if slab <= most:
            columns = _workgroup_columns(c, tile, -(-(c.rows or 1) // row_block))
            return Plan(None, AMX_LANES, 2, AMX_LANES, row_block, slab, columns)
    return f"a block of {c.block_size} weights of {tile} columns does not fit on the stack"


def _register_tile(instruction: DotInstruction | None) -> tuple[int, int]:
    """Rows and vectors of columns whose sums stay in registers.

    Of 16 registers, products of bytes want two for each sum, in 16 bits and in f32; 6 x 1 is 5 % faster than 4 x 2 on
    AVX2. One multiply-add in f32 takes as long as ten do together: 6 x 2.
    """
    if instruction is None:
        return 6, 2
    few_registers = instruction.vector_bits == 256 or "ssse3" in instruction.features
    return (6, 1) if few_registers else (4, 2)


def arranged_bytes(c: MatMulNBits, instruction: DotInstruction | None) -> int:
    """Bytes of one row of A as the products take it: see ``simd_rows``."""
    if instruction is None:
        return 4 * c.padded_depth
    return c.blocks * (c.block_size + 8)


def _unpacked_bytes(c: MatMulNBits, instruction: DotInstruction | None) -> int:
    """Bytes on the stack for a block of one column."""
    if instruction is None:
        return 4 * c.block_size
    parts = len(fields(c, instruction)) // groups(c)
    return c.block_size * parts + (4 if c.zero_points == "default" else 8)


def _slab(blocks: int, most: int) -> int:
    """Blocks of a slab, all slabs about equal: all blocks, or a multiple of what is read at once."""
    slabs = -(-blocks // most)
    return blocks if slabs == 1 else -(-blocks // (slabs * CHUNK)) * CHUNK


def _workgroup_columns(c: MatMulNBits, tile: int, row_blocks: int) -> int:
    """Columns of a workgroup: many, since each arranges A or starts anew, but so that workers end at the same time."""
    tiles = -(-c.columns // tile)
    sizes = range(1, min(tiles, _MAX_COLUMNS // tile) + 1)
    return tile * min(sizes, key=lambda size: slowest_share(-(-tiles // size) * row_blocks, size * tile + _START))
