"""What GroupQueryAttention does with queries and keys itself, before attention: unpack, normalise each head, rotate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..emit.builder import Builder, Size, spec_of
from ..emit.scalar import Scalar
from ..norms.rms_normalization import emit_inverse_rms, emit_scaled
from ..rotary.rotary_embedding import Rotation, clamp_position, emit_rotation
from .core import Heads


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding inside the op.

    Attributes:
        size: Leading elements of each head that are rotated.
        interleaved: Whether pairs are neighbours.
    """

    size: int
    interleaved: bool


def split_packed(b: Builder, heads: Heads, x: ir.Value) -> list[ir.Value]:
    """Query, key and value out of [B, T, (Hq + 2 Hkv) * d]."""
    start, parts = 0, list[ir.Value]()
    for count in (heads.q, heads.kv, heads.kv):
        parts.append(b.slice(x, [0, 0, start], [b.dim(x, 0), b.dim(x, 1), count * heads.dk]))
        start += count * heads.dk
    return parts


def normed(b: Builder, x: ir.Value, heads: int, weight: ir.Value, epsilon: float) -> ir.Value:
    """Queries or keys [B, T, H*d] with every head normalised."""
    spec = spec_of(x)
    by_head = b.expand(x, 2, [heads, (spec.shape[2] or 0) // heads])
    inverse = emit_inverse_rms(b, by_head, 3, epsilon)
    return b.collapse(emit_scaled(b, by_head, inverse, weight, spec.dtype), 2, 3)


def rotated(
    b: Builder, rotary: Rotary, x: ir.Value, heads: int, first: Size, caches: Sequence[ir.Value | None],
    position_ids: ir.Value | None,
) -> ir.Value:  # fmt: skip
    """Queries or keys [B, T, H*d] rotated for their positions.

    Args:
        b: The builder.
        rotary: How.
        x: What is rotated.
        heads: H.
        first: Position of the call's first token: one for all rows of the batch, or a tensor [B] of integers.
        caches: Cosines and sines [positions, R/2].
        position_ids: [B, T], or None to count from ``first`` on.
    """
    cos, sin = caches
    assert cos is not None
    assert sin is not None

    def lookup(cache: ir.Value, batch: Scalar, token: Scalar, column: Scalar) -> Scalar:
        if position_ids is not None:
            position = b.load(position_ids, batch, token)
        elif isinstance(first, int):
            position = token + first
        elif isinstance(first.type, ir.IndexType):
            position = token + Scalar(first)
        else:
            position = token + b.load(first, batch).to("index")
        return b.load(cache, clamp_position(b, position, cache), column)

    spec = spec_of(x)
    rotation = Rotation(spec, heads, (spec.shape[2] or 0) // heads, rotary.size, rotary.interleaved)
    return emit_rotation(b, rotation, x, cos, sin, lookup)
