"""What both kernels of strategy ``fused_simt_chunks`` share: sizes, buffers, and where the factors of a chunk lie.

The factors of a chunk of 16 tokens are f32: two matrices [16, 16] whose rows take 20 numbers (against bank conflicts),

    solve = (I + A)^-1 diag(beta),  A_ij = beta_i D_ij (k_i . k_j), j < i      delta rules only
    mix_ij = scale D_ij (q_i . k_j), j <= i                                      D_ij = a_{j+1} ... a_i

then vectors of 16: scaled_i = scale pre_i, pre_i = a_0 ... a_i, rest_j = D_15,j, decays a_i and rates beta_i; then
total = pre_15, and 1 if the chunk's decays grow by no more than e^80. Tokens after the last one have a = 1, beta = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from iree.compiler import ir

from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer, Kernel
from .contract import LinearAttention

CHUNK = 16
"""Tokens of a chunk."""
COLUMNS = 16
"""Columns of the state that a workgroup holds."""
WIDTH = 4
"""Elements of a load."""
STRIDE = CHUNK + WIDTH
"""Numbers from row to row of a matrix of factors."""
SCALED, PRE, REST, DECAY, RATE, TOTAL, BOUNDED = 0, 16, 32, 48, 64, 80, 81
"""Where the vectors of factors start, after the matrices."""
VECTORS = 84
"""Numbers of the vectors of factors."""
MAX_GROWTH = 80.0
"""Largest sum of positive log decays in a chunk whose products stay far from overflow."""


def matrices(c: LinearAttention) -> int:
    """Numbers of the matrices of factors."""
    return CHUNK * STRIDE * (2 if c.has_delta else 1)


def mix_start(c: LinearAttention) -> int:
    """Where ``mix`` starts; ``solve`` is first."""
    return matrices(c) - CHUNK * STRIDE


@dataclass(frozen=True)
class ChunkPlan:
    """How the state of a workgroup lies over its threads.

    Attributes:
        lanes: Threads that share a column, each with every lanes-th group of 4 rows.
        columns: Neighbouring columns of a thread, which share each load of a key or query.
        subgroup: Threads of a subgroup.
    """

    lanes: int
    columns: int
    subgroup: int

    @property
    def threads(self) -> int:
        """Threads of a workgroup."""
        return COLUMNS // self.columns * self.lanes

    @property
    def own(self) -> int:
        """Tokens of a chunk whose updates and outputs a thread computes, for its columns."""
        return CHUNK // self.lanes

    @property
    def apart(self) -> int:
        """How far apart neighbouring lanes are in a subgroup; between them are neighbouring columns."""
        return self.subgroup // self.lanes


@dataclass
class ChunkOperands:
    """The operands of one state and how to load from them.

    Attributes:
        k: Emits instructions.
        c: What is computed.
        tokens: T.
        states: B * Hkv.
        whole: Whether T is known to be a number of whole chunks: nothing has to be cut short.
    """

    k: Kernel
    c: LinearAttention
    tokens: Scalar
    states: Scalar
    whole: bool

    def __post_init__(self) -> None:
        rows = self.states.divide_unsigned(self.c.kv_heads)[0] * self.tokens
        self._next, self._rows = 0, rows

    def buffer(self, elements: int, dtype: str, width: int, count: Scalar | None = None) -> Buffer:
        """The next buffer: ``elements`` for each of ``count`` (by default each token of each batch row)."""
        size = (self._rows if count is None else count) * (elements // width)
        self._next += 1
        return self.k.buffer(self._next - 1, dtype, size, width)

    def bind_rows(self) -> None:
        """Query and key, the first two buffers."""
        c = self.c
        self.query = self.buffer(c.q_heads * c.dk, c.dtype, WIDTH)
        self.key = self.buffer(c.k_heads * c.dk, c.dtype, WIDTH)

    def choose(self, state: Scalar) -> None:
        """Which state is meant from now on."""
        c = self.c
        self.batch, self.head = state.divide_unsigned(c.kv_heads)
        self._key_head = self.head.divide_unsigned(c.kv_heads // c.k_heads)[0]
        self._query_head = self.head.divide_unsigned(c.kv_heads // c.q_heads)[0]

    def row(self, t: Scalar) -> Scalar:
        """The number of a token among those of all batch rows; the last one for a token after it."""
        return self.batch * self.tokens + (t if self.whole else t.minimum(self.tokens - 1))

    def inside(self, t: Scalar) -> Scalar:
        """Whether there is such a token."""
        return Scalar.constant(True, "i1") if self.whole else t < self.tokens

    def load_key(self, t: Scalar, vector: Scalar) -> ir.Value:
        """Some elements of the key of a token, as stored."""
        return self.k.load(self.key, (self.row(t) * self.c.k_heads + self._key_head) * (self.c.dk // WIDTH) + vector)

    def load_query(self, t: Scalar, vector: Scalar) -> ir.Value:
        """Some elements of the query of a token, as stored."""
        return self.k.load(
            self.query, (self.row(t) * self.c.q_heads + self._query_head) * (self.c.dk // WIDTH) + vector
        )


def scatter(k: Kernel, values: list[ir.Value], lane: Scalar, lanes: int, apart: int) -> list[ir.Value]:
    """Sums over the lanes: lane l gets the l-th of equal shares of the values.

    Args:
        k: Emits instructions.
        values: Each lane's parts, a multiple of the lanes in number.
        lane: This thread's number among the lanes.
        lanes: How many, a power of two.
        apart: How far apart neighbouring lanes are in the subgroup.
    """
    half = lanes // 2
    while half:
        upper, middle = (lane & half) > 0, len(values) // 2
        kept = [k.select(upper, b, a) for a, b in zip(values[:middle], values[middle:], strict=True)]
        given = [k.select(upper, a, b) for a, b in zip(values[:middle], values[middle:], strict=True)]
        values = [
            k.add(mine, k.join([k.shuffle_xor(e, half * apart) for e in k.elements(theirs)]))
            for mine, theirs in zip(kept, given, strict=True)
        ]
        half //= 2
    return values
