"""Sizes of a kernel of strategy ``fused_simd`` of softmax attention."""

from __future__ import annotations

from dataclasses import dataclass

KEYS = 64
"""Keys of a pass."""


@dataclass(frozen=True)
class Plan:
    """Sizes of one kernel.

    Attributes:
        tokens: T.
        group: G, query heads of a key head.
        kv_heads: Hkv.
        dk: Size of a query or key head.
        dv: Size of a value head.
        rows: Query rows of a workgroup.
        lanes: Lanes of a vector, a divisor of dk and dv.
        scale: Factor on q . k.
        softcap: c in c * tanh(s / c), 0 for none.
        left: How many keys before its own position a query sees, None for all.
        right: How many after it, None for all.
        first: Position of the first query where it is known, None if it comes in memory.
        has_limit: Whether a limit on the keys comes in memory.
        has_sink: Whether the softmax of each query head sees something beside its keys.
        bias_dims: For batch, query head and token whether the bias has that dimension; None without a bias.
    """

    tokens: int
    group: int
    kv_heads: int
    dk: int
    dv: int
    rows: int
    lanes: int
    scale: float
    softcap: float
    left: int | None
    right: int | None
    first: int | None
    has_limit: bool
    has_sink: bool
    bias_dims: tuple[bool, bool, bool] | None

    @property
    def needs_first(self) -> bool:
        """Whether the position of the first query is read."""
        return self.first is None and (self.left is not None or self.right is not None)

    @property
    def row_tiles(self) -> list[range]:
        """Rows whose sums registers hold: four at a time."""
        return [range(i, min(i + 4, self.rows)) for i in range(0, self.rows, 4)]

    @property
    def sees_alike(self) -> bool:
        """Whether the rows of a workgroup see the same keys: those of one token, with nothing that hides more."""
        return self.bias_dims is None and (self.tokens == 1 or self.group % self.rows == 0)

    @property
    def tiles(self) -> int:
        """Workgroups of a key head."""
        return -(-self.tokens * self.group // self.rows)
