"""How strategy ``fused_simd`` cuts a LinearAttention into workgroups, chunks of tokens and vectors."""

from __future__ import annotations

from dataclasses import dataclass

from .contract import LinearAttention

_TOKENS = 4  # of a chunk: 3.25 multiply-adds a state element and token instead of 4, and 8 rows to read the state with
_STACK_BYTES = 32 * 1024  # IREE refuses kernels with more
_MIN_LANES = 4


@dataclass(frozen=True)
class Tiling:
    """Sizes of one kernel.

    Attributes:
        lanes: Lanes of a vector along dv.
        row_lanes: Lanes of a vector along dk, for the products of keys and queries.
        vectors: Vectors side by side in the columns of a workgroup.
        tokens: Tokens of a chunk.
        unroll: Rows of the state in one iteration.
        direct: Whether the call is one chunk, which reads the past state and writes the present one in place of an
            array on the stack.
    """

    lanes: int
    row_lanes: int
    vectors: int
    tokens: int
    unroll: int
    direct: bool

    @property
    def columns(self) -> int:
        """Columns of a workgroup."""
        return self.lanes * self.vectors


def copies_rows(c: LinearAttention) -> bool:
    """Whether keys and queries are copied to the stack: as f32, and times their decays where those are per key."""
    return c.dtype != "f32" or c.decay == "key"


def tiling(c: LinearAttention, vector_bits: int) -> Tiling | str:
    """The sizes for a contract and a vector width, or why there are none."""
    most = max(vector_bits // 32, _MIN_LANES)
    lanes, row_lanes = _divisor(c.dv, most), _divisor(c.dk, most)
    for name, size, found in (("dv", c.dv, lanes), ("dk", c.dk, row_lanes)):
        if found < _MIN_LANES:
            return f"{name}={size} is not a multiple of {_MIN_LANES}"
    direct = c.tokens is not None and 0 < c.tokens <= _TOKENS
    tokens = c.tokens if direct and c.tokens is not None else _TOKENS
    registers = 32 if most >= 16 else 16
    rows = tokens * (2 if c.has_delta and c.rows == 1 else 1)
    unroll = 2 if c.dk % 2 == 0 else 1
    free = _STACK_BYTES - _row_bytes(c, tokens)
    while True:
        vectors = min(8, c.dv // lanes, max(1, registers // 2 // rows))
        while (c.dv // lanes) % vectors:
            vectors -= 1
        size = 4 * c.dk * lanes * vectors
        while vectors > 1 and not direct and size > free:
            vectors -= 1
            if (c.dv // lanes) % vectors == 0:
                size = 4 * c.dk * lanes * vectors
        if direct and free >= 0:
            return Tiling(lanes, row_lanes, vectors, tokens, unroll, direct)
        if not direct and size <= free:
            return Tiling(lanes, row_lanes, vectors, tokens, unroll, direct)
        if lanes == _MIN_LANES:
            return f"dk={c.dk} rows of the state do not fit on the stack of {_STACK_BYTES} bytes"
        lanes //= 2


def _divisor(size: int, most: int) -> int:
    """The largest power of two up to ``most`` that divides ``size``."""
    return min(size & -size, most)


def _row_bytes(c: LinearAttention, tokens: int) -> int:
    """Bytes of the stack that everything but the state takes."""
    arrays = (3 if c.decay == "key" else 1) + (1 if c.has_delta and c.decay == "key" else 0) + 1
    rows = 4 * c.dk * tokens * arrays + (4 * c.dk if c.decay == "key" else 0) if copies_rows(c) else 0
    return rows + (4 * c.dv * tokens if c.rows > 1 else 0)
