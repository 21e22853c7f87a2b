"""What the GPU kernels of softmax attention are for: sizes of a call, and which calls they take."""

from __future__ import annotations

from dataclasses import dataclass

from iree.compiler import ir

from ..emit.builder import spec_of
from ..emit.scalar import Scalar
from ..target import Target
from .core import AttentionShape, bias_dims

WIDTH = 4
"""Elements of a load."""
_KEYS = 16  # of the capacity, for each part
_MAX_PARTS = 192


@dataclass(frozen=True)
class Call:
    """What is to be computed.

    Attributes:
        batch: B.
        kv_heads: Hkv.
        group: Query heads of a key head.
        tokens: T.
        keys: Rows of the cache.
        dk: Size of a query or key head.
        dv: Size of a value head.
        dtype: Element type of queries and keys.
        value_dtype: Element type of values.
        scale: Factor on q . k.
        softcap: c in c * tanh(s / c), 0 for none.
        left: How many keys before its own position a query sees, None for all.
        bias_dims: For batch, query head and token whether the bias has that dimension; None without a bias.
    """

    batch: int
    kv_heads: int
    group: int
    tokens: int
    keys: int
    dk: int
    dv: int
    dtype: str
    value_dtype: str
    scale: float
    softcap: float
    left: int | None
    bias_dims: tuple[bool, bool, bool] | None

    @staticmethod
    def of(
        q: ir.Value, k: ir.Value, v: ir.Value, scale: float, softcap: float, left: int | None, bias: ir.Value | None,
        heads: int | None = None,
    ) -> Call:  # fmt: skip
        """The call for q [B, Hq, T, dk], the cache k, v [B, Hkv, S, d] and a bias as aligned, all sizes static.

        Args:
            q: Queries; [B, T, Hq * dk] where ``heads`` is given.
            k: Keys.
            v: Values.
            scale: See :class:`Call`.
            softcap: See :class:`Call`.
            left: See :class:`Call`.
            bias: What a mask adds to scores, or None.
            heads: Hq, where the queries' shape does not tell.
        """
        sizes = [size or 0 for size in spec_of(q).shape]
        batch, q_heads, tokens, dk = sizes if heads is None else (sizes[0], heads, sizes[1], sizes[2] // heads)
        kv_heads, keys, dv = (size or 0 for size in spec_of(v).shape[1:])
        types = spec_of(k).dtype, spec_of(v).dtype
        dims = None if bias is None else bias_dims(bias)
        return Call(batch, kv_heads, q_heads // kv_heads, tokens, keys, dk, dv, *types, scale, softcap, left, dims)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the outputs, [B, Hq, T, dv]."""
        return (self.batch, self.kv_heads * self.group, self.tokens, self.dv)

    @property
    def rows(self) -> int:
        """R, the queries of a key head."""
        return self.group * self.tokens

    @property
    def parts(self) -> int:
        """P, workgroups of a key head."""
        return max(1, min(_MAX_PARTS, self.keys // _KEYS))

    def lanes(self, target: Target) -> int:
        """L, threads that hold a key."""
        lanes = target.subgroup_size
        while lanes > 1 and (self.dk % (lanes * WIDTH) or self.dv % (lanes * WIDTH)):
            lanes //= 2
        return lanes

    def __str__(self) -> str:
        return self.named(str(self.tokens))

    def named(self, tokens: str) -> str:
        """All that it depends on, with this word for T."""
        window = "" if self.left is None else f"_w{self.left}"
        factors = f"{self.scale.hex()}_{self.softcap.hex()}" if self.softcap else self.scale.hex()
        factors = factors.replace(".", "p").replace("-", "m").replace("+", "")
        types = self.dtype if self.dtype == self.value_dtype else f"{self.dtype}_{self.value_dtype}"
        sizes = f"{self.batch}x{self.kv_heads}x{self.group}x{tokens}_s{self.keys}_d{self.dk}x{self.dv}"
        bias = "" if self.bias_dims is None else "_bias" + "".join(str(int(has)) for has in self.bias_dims)
        return f"{types}_{sizes}{window}{bias}_{factors}"


@dataclass(frozen=True)
class Sizes:
    """What a kernel is given of a call, so that calls of several sizes share it.

    Attributes:
        tokens: T.
        rows: R.
        parts: P, of the keys.
    """

    tokens: Scalar
    rows: Scalar
    parts: Scalar

    def token(self, row: Scalar) -> Scalar:
        """The token of a row of a key head."""
        return self.member(row)[1]

    def member(self, row: Scalar) -> tuple[Scalar, Scalar]:
        """The query head of a row of a key head, among those, and its token; in 32 bits, which GPUs divide better."""
        head, token = row.to("i32").divide_unsigned(self.tokens.to("i32"))
        return head.to("index", unsigned=True), token.to("index", unsigned=True)


def why_not_by_position(shape: AttentionShape) -> str:
    """Why the position alone does not tell which rows of a cache are seen, or how many there are; empty if it does."""
    if None in (shape.length, shape.heads.batch, shape.keys):
        return "open sizes"
    if not shape.causal:
        return "it is not causal at one position for all rows of the batch, or has fewer keys than queries"
    return ""
