"""Where strategy ``fused_warp_chunks`` has the keys, queries and factors of a chunk of tokens: twice, to copy ahead.

Rows lie in the workgroup's memory in chunks of 16 bytes, each at its number xor the row's, so that the eight rows of a
matrix are in eight banks: keys, queries (:class:`WarpPlan`), then the factors as ``mma_chunk_operands`` has them.
"""

from __future__ import annotations

from dataclasses import dataclass

from iree.compiler import ir

from ..emit.chunk_words import NUMBERS
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer
from ..emit.warp import LANES, Warp
from .mma_chunk_operands import ACROSS, CHUNK, MATRIX, SIDE, VECTORS, WORDS, MmaOperands, record

_BYTES = 16  # of a chunk
_ALIGNMENT = 512  # of what is addressed by xor
_STEP = SIDE // NUMBERS * _BYTES  # from matrix to matrix along a row
STRIPS = CHUNK // SIDE
"""Matrices of 16 tokens in a chunk."""
BLOCKS = CHUNK // NUMBERS
"""Times eight tokens in a chunk."""
TOLD = 2 * STRIPS
"""Chunks of a lane's sums: of keys and the state, and of queries and the state."""
SHOWN = 5 * BLOCKS
"""Words of a lane's right factors: two terms of r and of rest u, and one of u."""


@dataclass(frozen=True)
class WarpPlan:
    """How a workgroup of the second kernel is made.

    Attributes:
        dk: Rows of the state.
        groups: How many times eight columns it has.
        parts: How many warps share those, each with as many of the rows: 2 or 4.
        delta: Whether there is ``solve``.
    """

    dk: int
    groups: int
    parts: int
    delta: bool

    @property
    def threads(self) -> int:
        """Threads of a workgroup."""
        return self.groups * self.parts * LANES

    @property
    def tiles(self) -> int:
        """Matrices of 16 rows that a warp has of the state."""
        return self.dk // SIDE // self.parts

    @property
    def vectors(self) -> int:
        """Chunks of a key."""
        return self.dk // NUMBERS

    @property
    def row(self) -> int:
        """Bytes of a key."""
        return self.vectors * _BYTES

    @property
    def queries(self) -> int:
        """Where the queries of a chunk of tokens lie; keys are first."""
        return CHUNK * self.row

    @property
    def matrices(self) -> int:
        """Where the matrices of factors lie."""
        return 2 * self.queries

    @property
    def factors(self) -> int:
        """Chunks of the matrices of factors."""
        return (3 if self.delta else 1) * MATRIX

    @property
    def numbers(self) -> int:
        """Where the vectors of factors lie."""
        return self.matrices + self.factors * _BYTES

    @property
    def stage(self) -> int:
        """Bytes of all that a chunk of tokens is computed from."""
        size = self.numbers + VECTORS * WORDS
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    @property
    def memory(self) -> int:
        """Bytes of the workgroup's memory: two stages."""
        return 2 * self.stage + _ALIGNMENT

    @property
    def slots(self) -> int:
        """Chunks that warps tell each other their sums in, those of a chunk of tokens or of one."""
        return self.groups * self.parts * LANES * TOLD

    @property
    def blocks(self) -> int:
        """Of the four times eight tokens of a chunk, how many a warp solves for and writes the outputs of."""
        return BLOCKS // self.parts

    @property
    def words(self) -> int:
        """Words that warps tell each other factors in."""
        return self.groups * (SHOWN + self.parts) * LANES if self.delta else 0

    @property
    def all_memory(self) -> int:
        """Bytes of all."""
        return self.memory + self.slots * _BYTES + self.words * WORDS

    def __str__(self) -> str:
        return f"c{CHUNK}g{self.groups}p{self.parts}"


class Staged:
    """Copies chunks of tokens to the workgroup's memory, and reads them there.

    Args:
        warp: Emits instructions.
        p: How a workgroup is made.
        o: Where keys and queries are.
        factors: Where the factors are.
        item: The stream.
        part: Which of the state's rows this warp has.
    """

    def __init__(self, warp: Warp, p: WarpPlan, o: MmaOperands, factors: Buffer, item: Scalar, part: Scalar) -> None:
        self.warp, self.p, self.o, self.factors, self.item = warp, p, o, factors, item
        start = warp.shared_address()
        self.base = (start + (_ALIGNMENT - 1)) & _int(-_ALIGNMENT)
        self.stage = self.base
        """Of the chunk that is being computed."""
        row = p.row
        self._first = part.to("i32") * (p.tiles * SIDE // NUMBERS)  # chunk of this warp's rows

        def forward(lane: Scalar) -> Scalar:
            column = self._first ^ lane.shift_right(4) ^ (lane & _int(7))
            return (lane & _int(15)) * row + column * _BYTES

        def backward(lane: Scalar) -> Scalar:
            low, right = lane & _int(7), lane.shift_right(3) & _int(1)
            return (low + lane.shift_right(4) * NUMBERS) * row + ((self._first ^ right ^ low) * _BYTES)

        def factor(lane: Scalar) -> Scalar:
            inside = lane.shift_right(1) & _int(3)
            return (lane & _int(15)) * (ACROSS * _BYTES) + ((lane.shift_right(4) ^ inside) * _BYTES)

        self._forward, self._backward, self._factor = (warp.by_lane(of) for of in (forward, backward, factor))
        self.thread = warp.k.thread().to("i32")
        self.token, part = self.thread.divide_unsigned(p.vectors)
        self.part = part.to("i64") * _BYTES
        self._to_row = self.token * row + ((part ^ (self.token & _int(7))) * _BYTES)
        line, part = self.thread.divide_unsigned(ACROSS)
        self._to_factor = line * (ACROSS * _BYTES) + ((part ^ (line.shift_right(1) & _int(3))) * _BYTES) + p.matrices

    def choose(self, t: Scalar) -> Scalar:
        """The chunk from token ``t`` on is computed from now on; where the next one goes."""
        odd = t.divide_unsigned(CHUNK)[0].to("i32") & _int(1)
        self.stage = self.base + odd * self.p.stage
        return self.base + (_int(1) - odd) * self.p.stage

    # ---- copies ----------------------------------------------------------------------------------------------------
    def copy(self, t: Scalar, stage: Scalar) -> None:
        """Begin to copy what the chunk from token ``t`` on is computed from; zeros for tokens after the last one."""
        c, p, o, warp = self.o.c, self.p, self.o, self.warp
        left = (o.tokens - t).to("i32")
        row = (o.batch * o.tokens + t).to("i64") + self.token.to("i64")
        at_once = p.threads // p.vectors  # tokens
        for buffer, head, heads, start in (
            (o.key, o.key_head, c.k_heads, 0), (o.query, o.query_head, c.q_heads, p.queries),
        ):  # fmt: skip
            source = warp.source(buffer, (row * heads + head.to("i64")) * p.row + self.part)
            for offset in range(0, CHUNK, at_once):
                turned = offset & 7 if at_once < NUMBERS else 0
                to = stage + (self._to_row ^ _int(turned * _BYTES))
                warp.copy(to, start + offset * p.row, source, offset * heads * p.row, self.token + offset < left)
        chunk = (self.item * o.chunks + t.divide_unsigned(CHUNK)[0]).to("i64")
        source = warp.source(self.factors, chunk * (record(c) * _BYTES) + self.thread.to("i64") * _BYTES)
        always = left > 0

        def some(count: int, to: Scalar, to_offset: int, start: int) -> None:
            """Chunks from ``start`` on, one a thread."""
            for offset in range(0, count, p.threads):

                def copy(offset: int = offset) -> None:
                    warp.copy(to, to_offset + offset * _BYTES, source, (start + offset) * _BYTES, always)

                if offset + p.threads <= count:
                    copy()
                else:
                    warp.k.when(self.thread < _int(count - offset), copy)

        some(p.factors, stage + self._to_factor, 0, 0)
        some(VECTORS // WORDS, stage + self.thread * _BYTES, p.numbers, p.factors)

    # ---- reads -----------------------------------------------------------------------------------------------------
    def rows(self, start: int, strip: int, depth: int) -> list[ir.Value]:
        """A left factor: 16 tokens of the rows from ``start`` on (:class:`WarpPlan`), 16 of this warp's elements."""
        offset = start + strip * SIDE * self.p.row
        return self.warp.load_matrices(self.stage, self._forward, depth * _STEP, offset)

    def columns(self, tile: int, strip: int) -> list[ir.Value]:
        """A left factor: 16 of this warp's elements of the keys, of 16 tokens."""
        offset = strip * SIDE * self.p.row
        return self.warp.load_matrices(self.stage, self._backward, tile * _STEP, offset, transposed=True)

    def matrix(self, which: int, strip: int | Scalar, depth: int) -> list[ir.Value]:
        """A left factor: a quarter of a matrix of factors."""
        start, offset, size = self.stage, self.p.matrices + which * MATRIX * _BYTES, SIDE * ACROSS * _BYTES
        if isinstance(strip, Scalar):
            start = start + strip * size
        else:
            offset += strip * size
        return self.warp.load_matrices(start, self._factor, depth * _STEP, offset)

    def number(self, start: int, i: Scalar | None = None) -> ir.Value:
        """A number of the vectors of factors, the ``i``-th from ``start`` on."""
        address = self.stage if i is None else self.stage + i.to("i32") * WORDS
        return self.warp.load_number(address, self.p.numbers + start * WORDS)

    def column(self, token: Scalar, row: Scalar, start: int) -> list[ir.Value]:
        """Every eighth of this warp's elements of a row from ``start`` on, from element ``row`` on."""
        k, warp = self.warp.k, self.warp
        word, upper = row.to("i32").divide_unsigned(2)
        line, found = self.stage + token * self.p.row + word * WORDS, list[ir.Value]()
        for part in range(self.p.tiles * SIDE // NUMBERS):
            place = (token & _int(7)) ^ self._first ^ _int(part)
            low, high = warp.parts(warp.load_word(line + place * _BYTES, start))
            found.append(k.select(upper.equals(0), low, high))
        return found


def _int(value: int) -> Scalar:
    return Scalar.constant(value, "i32")
