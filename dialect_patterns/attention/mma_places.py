"""How strategy ``fused_mma`` of attention cuts its work, and where things lie in the workgroup's memory."""

from __future__ import annotations

from dataclasses import dataclass

from ..target import Target

SIDE = 16
CHUNK = 8
"""f16 of 16 bytes."""
WORDS = 4
"""f32 of 16 bytes."""
SUBGROUP = 32
QUERIES = 32
"""Rows of a workgroup."""
KEYS = 32
"""Of a tile."""
ACROSS = 2
"""Subgroups along keys, or columns of the outputs; as many along the rows."""
THREADS = SUBGROUP * ACROSS * QUERIES // SIDE


@dataclass(frozen=True)
class Places:
    """Where things lie in the workgroup's memory, in chunks; strides are odd numbers of them, against bank conflicts.

    Attributes:
        dk: Size of a query or key head.
        dv: Size of a value head.
        unit: f16 elements of one unit of a matrix's stride, and f32 ones.
    """

    dk: int
    dv: int
    unit: tuple[int, int]

    @property
    def stride_q(self) -> int:
        """From row to row of queries and of keys."""
        return self.dk // CHUNK + 1

    @property
    def stride_v(self) -> int:
        """Of values."""
        return self.dv // CHUNK + 1

    @property
    def stride_o(self) -> int:
        """Of outputs, which take the place of queries, keys and values in the end."""
        return self.dv // WORDS + 1

    stride_s, stride_p, stride_f = KEYS // WORDS + 1, KEYS // CHUNK + 1, SIDE // WORDS

    @property
    def tile(self) -> int:
        """Keys, then values; queries are before."""
        return QUERIES * self.stride_q

    @property
    def scores(self) -> int:
        """Scores, then weights, f32."""
        return max(self.tile + KEYS * max(self.stride_q, self.stride_v), QUERIES * self.stride_o)

    @property
    def weights(self) -> int:
        """Weights, f16."""
        return self.scores + QUERIES * self.stride_s

    @property
    def factors(self) -> int:
        """What rows of the outputs are multiplied by, 16 times."""
        return self.weights + QUERIES * self.stride_p

    @property
    def extra(self) -> int:
        """A matrix of each subgroup, f32."""
        return self.factors + QUERIES * self.stride_f

    @property
    def chunks(self) -> int:
        """All of it."""
        return self.extra + THREADS // SUBGROUP * SIDE * SIDE // WORDS

    def half(self, chunks: int) -> int:
        """A stride of f16 in the target's unit."""
        return chunks * CHUNK // self.unit[0]

    def full(self, chunks: int) -> int:
        """A stride of f32 in the target's unit."""
        return chunks * WORDS // self.unit[1]


def places_of(dk: int, dv: int, target: Target) -> Places:
    """Those for head sizes on a target."""
    return Places(dk, dv, (1, 1) if target.matrix_stride == "elements" else (CHUNK, WORDS))
