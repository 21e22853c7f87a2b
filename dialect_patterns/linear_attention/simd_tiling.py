"""How strategy ``fused_simd`` cuts a LinearAttention into workgroups, chunks of tokens and vectors.

One chunk of few tokens reads the past state and writes the present one (:class:`Direct`, kernel ``simd_direct``).
Longer calls keep the state in scratch memory, cut into panels of two vectors' width, and go over it in chunks of up to
16 tokens (:class:`Blocks`, kernel ``simd_blocks``).
"""

from __future__ import annotations

from dataclasses import dataclass

from .contract import LinearAttention

PAIR_TOKENS = 4
"""Tokens of the largest chunk whose scores are computed pair by pair, and of the longest call that is one chunk."""

_BLOCK_TOKENS = 16  # of a chunk: the state is read from the second-level cache once, scores are 8 % of the operations
_STACK_BYTES = 30 * 1024  # IREE refuses kernels with more than 32 KiB
_MIN_LANES = 4
_ENOUGH_WORKGROUPS = 16  # that keep the cores of most machines busy; more of a head means its scores more often
_PANEL_VECTORS = 2


@dataclass(frozen=True)
class Direct:
    """Sizes of a kernel for one chunk, without scratch memory.

    Attributes:
        lanes: Lanes of a vector along dv.
        row_lanes: Lanes of a vector along dk, for the products of keys and queries.
        vectors: Vectors side by side in the columns of a workgroup.
        tokens: Tokens of the call.
        unroll: Rows of the state in one iteration.
    """

    lanes: int
    row_lanes: int
    vectors: int
    tokens: int
    unroll: int

    @property
    def columns(self) -> int:
        """Columns of a workgroup."""
        return self.lanes * self.vectors


@dataclass(frozen=True)
class Blocks:
    """Sizes of a kernel that goes over the state in chunks of tokens.

    Attributes:
        lanes: Lanes of a vector along dv.
        row_lanes: Lanes of a vector along dk.
        vectors: Vectors of a panel.
        panels: Panels of a workgroup.
        tokens: Tokens of a chunk.
        rows: Rows of a product in registers at once.
    """

    lanes: int
    row_lanes: int
    vectors: int
    panels: int
    tokens: int
    rows: int

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return self.lanes * self.vectors

    @property
    def columns(self) -> int:
        """Columns of a workgroup."""
        return self.width * self.panels

    def scratch_rows(self, c: LinearAttention) -> int:
        """Rows of a panel's width that a workgroup needs in scratch memory: the state, keys, updates."""
        return (self.panels + 1) * c.dk + self.tokens * self.update_panels(c)

    def update_panels(self, c: LinearAttention) -> int:
        """Panels whose updates are kept at once: all where several query heads read them, one after the other."""
        return self.panels if c.rows > 1 else 1


def copies_rows(c: LinearAttention) -> bool:
    """Whether one chunk copies keys and queries to the stack, as f32 and times their decays where those are per key."""
    return c.dtype != "f32" or c.decay == "key"


def tiling(c: LinearAttention, vector_bits: int) -> Direct | Blocks | str:
    """The sizes for a contract and a vector width, or why there are none."""
    most = max(vector_bits // 32, _MIN_LANES)
    lanes, row_lanes = _divisor(c.dv, most), _divisor(c.dk, most)
    for name, size, found in (("dv", c.dv, lanes), ("dk", c.dk, row_lanes)):
        if found < _MIN_LANES:
            return f"{name}={size} is not a multiple of {_MIN_LANES}"
    registers = 32 if most >= 16 else 16
    if c.tokens is not None and 0 < c.tokens <= PAIR_TOKENS:
        if copies_rows(c) and _row_bytes(c, c.tokens) > _STACK_BYTES:
            return _too_many_rows(c)
        return _direct(c, lanes, row_lanes, registers)
    return _blocks(c, lanes, row_lanes, registers)


def _direct(c: LinearAttention, lanes: int, row_lanes: int, registers: int) -> Direct:
    tokens = c.tokens or 1
    rows = tokens * (2 if c.has_delta and c.rows == 1 else 1)
    vectors = min(8, c.dv // lanes, max(1, registers // 2 // rows))
    while (c.dv // lanes) % vectors:
        vectors -= 1
    return Direct(lanes, row_lanes, vectors, tokens, 2 if c.dk % 2 == 0 else 1)


def _blocks(c: LinearAttention, lanes: int, row_lanes: int, registers: int) -> Blocks | str:
    count = c.dv // lanes
    vectors = _PANEL_VECTORS if count % _PANEL_VECTORS == 0 else 1
    panels = count // vectors
    groups = next((g for g in range(1, panels + 1) if panels % g == 0 and g * c.kv_heads >= _ENOUGH_WORKGROUPS), panels)
    tokens = min(_BLOCK_TOKENS, lanes * vectors)
    if c.decay == "key":
        tokens = PAIR_TOKENS
    while tokens > 1 and _row_bytes(c, tokens) > _STACK_BYTES:
        tokens //= 2
    if _row_bytes(c, tokens) > _STACK_BYTES:
        return _too_many_rows(c)
    return Blocks(lanes, row_lanes, vectors, panels // groups, tokens, registers * 3 // 4 // vectors)


def _too_many_rows(c: LinearAttention) -> str:
    return f"dk={c.dk} elements of keys and queries do not fit on the stack of {_STACK_BYTES} bytes"


def _divisor(size: int, most: int) -> int:
    """The largest power of two up to ``most`` that divides ``size``."""
    return min(size & -size, most)


def _row_bytes(c: LinearAttention, tokens: int) -> int:
    """Bytes of the stack that copies of keys and queries and their scores take."""
    arrays = 4 if c.decay == "key" else 2
    return 4 * c.dk * (tokens * arrays + (c.decay == "key")) + 8 * tokens * max(tokens, 16)
