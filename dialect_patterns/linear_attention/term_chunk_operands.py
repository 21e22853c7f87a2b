"""What both kernels of strategy ``fused_term_chunks`` share: sizes, and where the factors of a chunk lie.

The factors of a chunk of 32 tokens of a stream, in chunks of 16 bytes, are matrices [32, 32] of f16,

    solve = (I + A)^-1 diag(beta) in two terms,  A_ij = beta_i sum_d D_ijd k_id k_jd, j < i      delta rules only
    mix_ij = sum_d D_ijd q_id k_jd, j <= i                          D_ijd = a_{j+1},d ... a_i,d; two terms for f32

then vectors as ``mma_chunk_operands`` has them, of which there are the decays a_i of a head, the rates beta_i and
whether all of that is what f16 can hold; then tiles [32, dk] of f16 with the decays d by d in them,

    from_k = k_i a_0 ... a_i in two terms (delta rules only);  from_q = q_i a_0 ... a_i, in two terms for f32;
    to_k = k_j a_{j+1} ... a_31 in two terms

and a_0 ... a_31 of each row of the state, four times. Tokens after the last one have a = 1, beta = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..emit.chunk_words import NUMBERS
from .contract import LinearAttention
from .mma_chunk_factors import THREADS
from .mma_chunk_operands import ACROSS, CHUNK, MATRIX, SIDE, VECTORS, WORDS, MmaPlan


@dataclass(frozen=True)
class TermPlan(MmaPlan):
    """How the work is cut; a workgroup of the second kernel has 16 columns of a state.

    Attributes:
        delta: Whether the rule has ``solve``.
        terms: Of queries and ``mix``: what leads to outputs only needs two for f32.
    """

    delta: bool
    terms: int

    @property
    def matrices(self) -> int:
        """How many matrices of factors there are; the last ones are ``mix``."""
        return (2 if self.delta else 0) + self.terms

    @property
    def line(self) -> int:
        """Chunks of a row of a tile."""
        return self.dk // NUMBERS

    @property
    def tile(self) -> int:
        """Chunks of a tile."""
        return CHUNK * self.line

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Where the tiles start: of ``from_k``, ``from_q`` and ``to_k``; the terms of each follow each other."""
        first = self.matrices * MATRIX + VECTORS // WORDS
        second = first + (2 * self.tile if self.delta else 0)
        return first, second, second + self.terms * self.tile

    @property
    def totals(self) -> int:
        """Where the decays over the chunk start."""
        return self.tiles[2] + 2 * self.tile

    @property
    def record(self) -> int:
        """Chunks of the factors of a chunk of tokens."""
        return self.totals + self.dk

    @property
    def factor_threads(self) -> int:
        """Threads of the first kernel's workgroup; f32 has no memory left for what more of them would tell."""
        return 2 * self.dk if self.terms == 1 else THREADS

    @property
    def tokens(self) -> int:
        """Neighbouring tokens of a thread of the first kernel, of which it has a chunk of the rows."""
        return self.tile // self.factor_threads

    @property
    def held(self) -> int:
        """Tiles that the second kernel has in the workgroup's memory at once: for f32 ``from_q`` comes later."""
        return 2 if self.terms == 2 or not self.delta else 3

    @property
    def rows(self) -> int:
        """Chunks for tiles, then for the state's sums."""
        return max(self.held * CHUNK * self.stride_k, self.dk * self.stride_f)

    @property
    def sums(self) -> int:
        """Chunks of sums [32, columns]."""
        return CHUNK * self.stride_f

    @property
    def work(self) -> int:
        """Chunks for both terms of the state, then for four sums and two terms of updates."""
        return max(2 * self.dk * self.stride_s, 4 * self.sums + 2 * CHUNK * self.stride_s)

    def memory(self, c: LinearAttention) -> int:
        """Bytes of the workgroup's memory."""
        del c
        return 16 * (self.rows + self.work + self.matrices * CHUNK * (ACROSS + 1)) + 4 * (VECTORS + 4)

    def __str__(self) -> str:
        return f"{super().__str__()}t{self.terms}"


def plan_for(c: LinearAttention, unit: tuple[int, int]) -> TermPlan:
    """The plan for a unit of the target's strides (``stride_unit``)."""
    return TermPlan(c.dk, SIDE, unit, c.has_delta, 2 if c.dtype == "f32" else 1)
