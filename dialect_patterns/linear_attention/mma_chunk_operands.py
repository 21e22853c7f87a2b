"""What both kernels of strategy ``fused_mma_chunks`` share: sizes, buffers, and where the factors of a chunk lie.

A stream is what one head of the output sees: a state of its own, even where several query heads read the same one. The
factors of a chunk of 32 tokens of a stream, in chunks of 16 bytes, are matrices [32, 32] of f16,

    solve = (I + A)^-1 diag(beta) in two terms,  A_ij = beta_i D_ij (k_i . k_j), j < i      delta rules only
    mix_ij = D_ij (q_i . k_j), j <= i                                                      D_ij = a_{j+1} ... a_i

then vectors of 32 in f32: pre_i = a_0 ... a_i, rest_j = D_31,j, decays a_i and rates beta_i; then total = pre_31, and 1
if all of that, keys and queries are numbers that f16 can hold. Tokens after the last one have a = 1, beta = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..emit.chunk_words import NUMBERS, pack, unpack
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer, Kernel
from ..select import No, OtherMachine
from ..target import Target
from .contract import LinearAttention

CHUNK = 32
"""Tokens of a chunk."""
SIDE = 16
"""Rows and columns of a matrix that a subgroup holds."""
WORDS = 4
"""f32 in a chunk of 16 bytes."""
SUBGROUP = 32
"""Threads of a subgroup."""
LARGEST = 30_000.0
"""What f16 holds, and twice as much."""
PRE, REST, DECAY, RATE, TOTAL, ORDINARY = 0, 32, 64, 96, 128, 129
"""Where the vectors of factors start, after the matrices."""
VECTORS = 132
"""Numbers of the vectors of factors."""
MATRIX = CHUNK * CHUNK // NUMBERS
"""Chunks of a matrix of factors."""
ACROSS = CHUNK // NUMBERS
"""Chunks of one of its rows."""


def why_no_matrices(target: Target) -> No | None:
    """Why subgroups of a target do not multiply matrices, if they do not."""
    if not target.is_gpu:
        return OtherMachine(f"{target.name} is not a GPU")
    if target.matrix_stride is None or target.subgroup_size != SUBGROUP:
        return No(f"{target.name} is compiled for without products of 16x16 matrices by {SUBGROUP} threads")
    return None


def why_not_as_they_are(c: LinearAttention) -> No | None:
    """Why keys and queries cannot be factors as they are, with decays applied to sums, if they cannot."""
    if c.dtype not in ("f16", "bf16"):
        return No(f"{c.dtype}: terms of 16 bits would lose some of it")
    if c.decay == "key":
        return No("decays per key cannot be applied to sums")
    return None


def stride_unit(target: Target) -> tuple[int, int]:
    """``MmaPlan.unit`` of a target."""
    return (1, 1) if target.matrix_stride == "elements" else (NUMBERS, WORDS)


def matrices(c: LinearAttention) -> int:
    """How many matrices of factors there are; ``mix`` is the last one."""
    return 3 if c.has_delta else 1


def record(c: LinearAttention) -> int:
    """Chunks of the factors of a chunk of tokens."""
    return matrices(c) * MATRIX + VECTORS // WORDS


@dataclass(frozen=True)
class MmaPlan:
    """How a workgroup of the second kernel holds its part of a state.

    Strides are chunks from row to row in the workgroup's memory, an odd number against bank conflicts.

    Attributes:
        dk: Rows of the state.
        columns: Of the state.
        unit: f16 elements of one unit of a matrix's stride in memory of chunks, and f32 ones.
    """

    dk: int
    columns: int
    unit: tuple[int, int]

    @property
    def subgroups(self) -> int:
        """One for each matrix of the products of 32 keys and 32 queries with the state."""
        return 2 * (CHUNK // SIDE) * self.across

    @property
    def threads(self) -> int:
        """Threads of a workgroup."""
        return self.subgroups * SUBGROUP

    @property
    def across(self) -> int:
        """Matrices beside each other."""
        return self.columns // SIDE

    @property
    def vectors(self) -> int:
        """Groups of eight columns."""
        return self.columns // NUMBERS

    @property
    def items(self) -> int:
        """Such groups of a chunk of tokens: half the threads."""
        return CHUNK * self.vectors

    @property
    def stride_k(self) -> int:
        """Of keys and queries."""
        return self.dk // NUMBERS + 1

    @property
    def stride_s(self) -> int:
        """Of the state and the updates in f16."""
        return self.columns // NUMBERS + 1

    @property
    def stride_f(self) -> int:
        """Of sums in f32."""
        return self.columns // WORDS + 1

    @property
    def rows(self) -> int:
        """Chunks for keys and queries, then for the state's sums."""
        return max(2 * CHUNK * self.stride_k, self.dk * self.stride_f)

    @property
    def work(self) -> int:
        """Chunks for both terms of the state, then for two sums and twice two terms of updates."""
        return max(2 * self.dk * self.stride_s, CHUNK * (2 * self.stride_f + 4 * self.stride_s))

    def memory(self, c: LinearAttention) -> int:
        """Bytes of the workgroup's memory."""
        return 16 * (self.rows + self.work + matrices(c) * CHUNK * (ACROSS + 1)) + 4 * (VECTORS + 4)

    def half_stride(self, chunks: int) -> int:
        """A stride of f16 in the target's unit."""
        return chunks * NUMBERS // self.unit[0]

    def sum_stride(self, chunks: int) -> int:
        """A stride of f32 in the target's unit."""
        return chunks * WORDS // self.unit[1]

    def __str__(self) -> str:
        return f"c{CHUNK}n{self.columns}u{self.unit[0]}"


@dataclass
class MmaOperands:
    """The operands of one stream and how to load from them.

    Attributes:
        k: Emits instructions.
        c: What is computed.
        tokens: T.
        streams: B * max(Hq, Hkv).
    """

    k: Kernel
    c: LinearAttention
    tokens: Scalar
    streams: Scalar

    def __post_init__(self) -> None:
        c = self.c
        self.zero = self.tokens.to("i32").shift_right(31)
        """A zero that no compiler knows (``chunk_words.split``)."""
        self.batches = self.streams.divide_unsigned(c.out_heads)[0]
        self.all_rows = self.batches * self.tokens
        self.chunks = (self.tokens + (CHUNK - 1)).divide_unsigned(CHUNK)[0]
        self.wide = NUMBERS // WORDS if c.dtype == "f32" else 1
        """Chunks of eight numbers."""
        self._next = 0
        self.query = self.eights(c.q_heads * c.dk)
        self.key = self.eights(c.k_heads * c.dk)

    def buffer(self, size: Scalar) -> Buffer:
        """The next buffer, ``size`` chunks."""
        self._next += 1
        return self.k.chunks(self._next - 1, size)

    def eights(self, elements: int) -> Buffer:
        """The next buffer: so many numbers a token, in chunks."""
        return self.buffer(self.all_rows * (elements // NUMBERS * self.wide))

    def numbers(self, elements: int) -> Buffer:
        """The next buffer: so many single numbers a token."""
        self._next += 1
        return self.k.buffer(self._next - 1, self.c.dtype, self.all_rows * elements)

    def pairs(self, dtype: str, size: Scalar) -> Buffer:
        """The next buffer, ``size`` pairs of numbers."""
        self._next += 1
        return self.k.buffer(self._next - 1, dtype, size, 2)

    def choose(self, stream: Scalar) -> None:
        """Which stream is meant from now on."""
        c = self.c
        self.batch, self.out_head = stream.divide_unsigned(c.out_heads)
        self.head, self.reader = self.out_head.divide_unsigned(c.rows)
        self.state = self.batch * c.kv_heads + self.head
        self.key_head = self.head.divide_unsigned(c.kv_heads // c.k_heads)[0]
        self.query_head = self.out_head.divide_unsigned(c.out_heads // c.q_heads)[0]

    def row(self, t: Scalar) -> Scalar:
        """The number of a token among those of all batch rows; the last one for a token after it."""
        return self.batch * self.tokens + t.minimum(self.tokens - 1)

    def load_key(self, t: Scalar, chunk: Scalar) -> ir.Value:
        """A chunk of the key of a token, as stored."""
        place = self.row(t) * self.c.k_heads + self.key_head
        return self.k.load(self.key, place * (self.c.dk // NUMBERS) + chunk)

    def load_query(self, t: Scalar, chunk: Scalar) -> ir.Value:
        """A chunk of the query of a token, as stored."""
        place = self.row(t) * self.c.q_heads + self.query_head
        return self.k.load(self.query, place * (self.c.dk // NUMBERS) + chunk)

    def load_eight(self, buffer: Buffer, place: Scalar) -> list[ir.Value]:
        """The ``place``-th eight numbers of a buffer, as stored."""
        return [self.k.load(buffer, place * self.wide + i) for i in range(self.wide)]

    def key_eight(self, t: Scalar, part: Scalar) -> list[ir.Value]:
        """Eight numbers of the key of a token, of any type, as stored."""
        return self.load_eight(self.key, (self.row(t) * self.c.k_heads + self.key_head) * (self.c.dk // NUMBERS) + part)

    def query_eight(self, t: Scalar, part: Scalar) -> list[ir.Value]:
        """Eight numbers of the query of a token, of any type, as stored."""
        place = self.row(t) * self.c.q_heads + self.query_head
        return self.load_eight(self.query, place * (self.c.dk // NUMBERS) + part)

    def eight_of(self, stored: Sequence[ir.Value]) -> list[ir.Value]:
        """What was loaded so, in f32."""
        if self.c.dtype == "f32":
            return [element for chunk in stored for element in self.k.elements(chunk)]
        return unpack(self.k, stored[0], self.c.dtype)

    def store_eight(self, values: list[ir.Value], buffer: Buffer, place: Scalar) -> None:
        """Write eight numbers, rounded to the activations' type, as the ``place``-th eight of a buffer."""
        k = self.k
        if self.c.dtype == "f32":
            for i in range(self.wide):
                k.store_as_is(k.join(values[i * WORDS : (i + 1) * WORDS]), buffer, place * self.wide + i)
        else:
            k.store_as_is(pack(k, values, self.c.dtype), buffer, place)

    def as_f16(self, chunk: ir.Value) -> ir.Value:
        """A chunk in f16: as it is, or rounded, which loses something of numbers below 2^-14 only."""
        if self.c.dtype == "f16":
            return chunk
        return pack(self.k, unpack(self.k, chunk, self.c.dtype), "f16")


def within(k: Kernel, values: list[ir.Value]) -> Scalar:
    """Whether all values are numbers that f16 holds with some room; NaN is not."""
    bounds = Scalar(k.constant(-LARGEST)), Scalar(k.constant(LARGEST))
    checks = [check for value in values for check in (Scalar(value) >= bounds[0], Scalar(value) <= bounds[1])]
    found = checks[0]
    for check in checks[1:]:
        found = found & check
    return found


def magnitude(k: Kernel, values: list[ir.Value]) -> ir.Value:
    """The largest magnitude; NaN wins."""
    found = k.constant(0.0)
    for value in values:
        found = k.maximum(found, k.maximum(value, k.neg(value)))
    return found
