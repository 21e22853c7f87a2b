"""Softmax attention over grouped heads and a KV cache: what Attention and GroupQueryAttention share.

    s[t, j] = softcap(scale * q[t] . k[j]) + bias[t, j]      -inf where key j is not visible to query t
    y[t]    = sum_j exp(s[t, j] - max_j s[t, :]) v[j] / sum_j exp(s[t, j] - max_j s[t, :])

With a sink the softmax sees one more score, the same for all queries of a head, whose value is zero.

The query heads of a group are rows of one product, [B*Hkv, r*T, d] against [B*Hkv, S, d], so keys and values are never
repeated in memory. Which keys are visible is computed from loop indices inside the elementwise step before the
reductions (Vulkan's code generator dislikes ``linalg.index`` inside one). Scores, maxima and sums are f32.

This is the portable form (strategy ``linalg``); ``strategies.py`` has the others and chooses.

Cost: 4 * B*Hq*T*S*d flops; two reads of the cache and the f32 scores [B*Hq, T, S] through memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..emit.builder import Builder, Size, spec_of
from ..emit.scalar import Scalar
from ..node import Dim, TensorSpec
from .checks import known

_LOWEST = -3.4028234663852886e38  # the lowest finite f32
_NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True)
class Heads:
    """Head counts and sizes.

    Attributes:
        batch: B, None where open.
        q: Query heads, a multiple of ``kv``.
        kv: Key and value heads.
        dk: Size of a query or key head.
        dv: Size of a value head.
    """

    batch: Dim
    q: int
    kv: int
    dk: int
    dv: int

    @property
    def group(self) -> int:
        """Query heads for each key head."""
        return self.q // self.kv


@dataclass(frozen=True)
class AttentionShape:
    """What decides which strategy lowers a node.

    Attributes:
        heads: Counts and sizes.
        length: T, queries of this call.
        keys: S, rows of keys: the capacity of a cache that has one.
        masked: Whether a mask or bias comes in memory.
        causal: Whether query i sees no key after ``first + i``, ``first`` the same for all rows of the batch, and there
            is a key at each such position.
        dtype: Element type of the keys.
        value_dtype: Of the values, where it is another one.
    """

    heads: Heads
    length: Dim
    keys: Dim
    masked: bool
    causal: bool
    dtype: str
    value_dtype: str = ""


@dataclass(frozen=True)
class Visibility:
    """Which keys a query may see, by position; query ``i`` of this call stands at position ``first + i``.

    Attributes:
        first: Position of the call's first query: one for all rows of the batch, or a tensor [B] of integers.
        limit: Keys at or after it are hidden: one for all rows, a tensor [B] of integers, or None for no limit.
        left: How many keys before its own position a query sees, None for all.
        right: How many keys after its own position a query sees (0 is causal), None for all.
    """

    first: Size = 0
    limit: Size | None = None
    left: int | None = None
    right: int | None = None


def split_heads(b: Builder, x: ir.Value, heads: int) -> ir.Value:
    """[B, T, H*d] as [B, H, T, d]."""
    size = spec_of(x).shape[2]
    assert size is not None
    return b.transpose(b.expand(x, 2, [heads, size // heads]), [0, 2, 1, 3])


def join_heads(b: Builder, x: ir.Value) -> ir.Value:
    """[B, H, T, d] as [B, T, H*d]."""
    return b.collapse(b.transpose(x, [0, 2, 1, 3]), 2, 3)


def refined(b: Builder, x: ir.Value, *dims: Dim) -> ir.Value:
    """``x`` with the static dimensions that the contract knows in its type."""
    spec = spec_of(x)
    return b.refine(x, TensorSpec(tuple(known(d, s) for d, s in zip(dims, spec.shape, strict=True)), spec.dtype))


def write_at(b: Builder, cache: ir.Value, rows: ir.Value, position: Size) -> ir.Value:
    """The cache [B, Hkv, M, d] with ``rows`` [B, Hkv, T, d] written at a position, one for all rows of the batch."""
    return b.insert(b.cast(rows, spec_of(cache).dtype), cache, [0, 0, position, 0])


def bounded(b: Builder, position: ir.Value, capacity: Size, count: Size) -> ir.Value:
    """The position, no larger than leaves room for ``count`` rows, and IREE told so: it computes with it in 32 bits."""
    room = b.sub(capacity, count)
    nearest = b.index(b.minimum(position, room))
    return b.assume(nearest, 0, room if isinstance(room, int) else 2**31 - 1)


def append_at(b: Builder, past: ir.Value, rows: ir.Value, lengths: ir.Value) -> ir.Value:
    """[B, Hkv, P+T, d]: the first ``lengths[b]`` rows of ``past`` and then ``rows``; zeros follow.

    Args:
        b: The builder.
        past: [B, Hkv, P, d].
        rows: [B, Hkv, T, d].
        lengths: [B] of i32, at most P.
    """
    joined = b.concat([past, rows], 2)
    past_size, last = (Scalar(b.index(n)).to("i32") for n in (b.dim(past, 2), b.sub(b.dim(joined, 2), 1)))
    dtype = spec_of(joined).dtype

    def element(length: Scalar) -> Scalar:
        batch, head, row, column = (b.loop_index(axis) for axis in range(4))
        row = row.to("i32")
        moved = row - length + past_size
        value = b.load(joined, batch, head, (row < length).select(row, moved.minimum(last)), column)
        return (moved <= last).select(value, b.constant(0.0, dtype))

    shape = dict(zip("bhsd", b.shape(joined), strict=True))
    return b.map("b->bhsd", element, lengths, dtype=dtype, sizes=shape)


def align_mask(b: Builder, mask: ir.Value, sizes: Sequence[Size], written: tuple[Size, Size] | None = None) -> ir.Value:
    """A mask or bias as [B or 1, Hq or 1, T or 1, S], with hidden keys in the columns that it lacks.

    Args:
        b: The builder.
        mask: i1 (true: visible) or a float that is added; 1 to 4 dimensions that broadcast to ``sizes``.
        sizes: [B, Hq, T, S].
        written: For a mask of M+L columns over a cache of M rows, whose last L columns belong to the rows that were
            written into the cache: their position and L. None if column j belongs to key j.
    """
    while spec_of(mask).rank < 4:
        mask = b.unsqueeze(mask, 0)
    spec = spec_of(mask)
    columns, keys = b.dim(mask, 3), sizes[3]
    if written is None and None not in spec.shape[:3] and isinstance(columns, int) and columns == keys:
        return mask
    # Whether an open dimension is 1 (broadcast), or the columns too few, shows only at run time. The loads are single
    # elements on purpose: slices and inserts of i1 do not compile for baseline Vulkan, nor for data-tiled CPUs at T=1.
    last = [Scalar(b.index(b.sub(size, 1))) for size in b.shape(mask)]
    hidden = b.constant(0 if spec.dtype == "i1" else _NEGATIVE_INFINITY, spec.dtype)
    end = Scalar(b.index(columns if written is None else keys))
    shift = None if written is None else Scalar(b.index(b.sub(keys, written[0])))
    bounds = None if written is None else [Scalar(b.index(n)) for n in (written[0], b.add(*written))]

    def element() -> Scalar:
        *indices, column = (b.loop_index(axis) for axis in range(4))
        inside = column < end
        if bounds is not None and shift is not None:
            is_new = (bounds[0] <= column) & (column < bounds[1])
            column = is_new.select(column + shift, column)
        value = b.load(mask, *[i.minimum(n) for i, n in zip([*indices, column], last, strict=True)])
        return inside.select(value, hidden)

    full = [1 if dim == 1 else size for dim, size in zip(spec.shape[:3], sizes[:3], strict=True)]
    return b.map("->bhts", element, dtype=spec.dtype, sizes=dict(zip("bhts", [*full, keys], strict=True)))


def as_bias(b: Builder, mask: ir.Value) -> ir.Value:
    """A mask (true: visible) or bias as an f32 bias."""
    if spec_of(mask).dtype != "i1":
        return b.cast(mask, "f32")

    def bias(visible: Scalar) -> Scalar:
        return visible.select(b.constant(0.0, "f32"), b.constant(_NEGATIVE_INFINITY, "f32"))

    return b.map("bhts->bhts", bias, mask, dtype="f32")


def bias_dims(bias: ir.Value) -> tuple[bool, bool, bool]:
    """For batch, query head and token whether an aligned bias has that dimension."""
    batch, head, token = (size != 1 for size in spec_of(bias).shape[:3])
    return batch, head, token


def _grouped_mask(b: Builder, mask: ir.Value, heads: Heads) -> tuple[ir.Value, str]:
    """An aligned mask with its head dimension split in two, and its letters."""
    shape = spec_of(mask).shape
    split = [1, 1] if shape[1] == 1 else [heads.kv, heads.group]
    letters = [letter if shape[axis] != 1 else "1" for axis, letter in ((0, "b"), (1, "h"), (1, "r"), (2, "t"))]
    return b.expand(mask, 1, split), "".join(letters) + "s"


def emit_attention(
    b: Builder,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    heads: Heads,
    *,
    scale: float,
    softcap: float,
    visibility: Visibility,
    mask: ir.Value | None = None,
    sink: ir.Value | None = None,
    most: int | None = None,
) -> ir.Value:
    """Attention of ``q`` over all rows of ``k`` and ``v``; a query that sees no key gives zeros.

    Args:
        b: The builder.
        q: [B, Hq, T, dk].
        k: [B, Hkv, S, dk].
        v: [B, Hkv, S, dv].
        heads: Counts and sizes.
        scale: Factor on q . k.
        softcap: c in c * tanh(s / c), 0 for none.
        visibility: Which keys are visible by position.
        mask: From :func:`align_mask`, or None.
        sink: What the softmax of each query head sees beside its keys [Hq], or None.
        most: Workgroups of a dispatch, where each result of a sum over an open number of keys takes one.

    Returns:
        [B, Hq, T, dv] of the type of ``q``.
    """
    batch, length = b.dim(q, 0), b.dim(q, 2)
    rows = b.collapse(b.collapse(b.expand(q, 1, [heads.kv, heads.group]), 2, 3), 0, 1)
    products = b.contract("gmd,gsd->gms", rows, b.collapse(k, 0, 1))
    products = b.expand(b.expand(products, 1, [heads.group, length]), 0, [batch, heads.kv])

    operands, terms = [products], ["bhrts"]
    if mask is not None:
        grouped, letters = _grouped_mask(b, mask, heads)
        operands.append(grouped)
        terms.append(letters)
    bounds = [_as_i32(b, bound) for bound in (visibility.first, visibility.limit)]
    for bound in bounds:
        if isinstance(bound, ir.Value) and isinstance(bound.type, ir.RankedTensorType):
            operands.append(bound)
            terms.append("b")

    def score(product: Scalar, *rest: Scalar) -> Scalar:
        values = list(rest)
        result = product * scale
        if softcap:
            result = (result / softcap).tanh() * softcap
        visible: Scalar | None = None
        if mask is not None:
            bias = values.pop(0)
            if bias.is_float:
                result = result + bias.to("f32")
            else:
                visible = bias
        first, limit = (_bound_of_row(b, bound, values) for bound in bounds)
        for condition in _conditions(b, visibility, first, limit):
            visible = condition if visible is None else visible & condition
        return result if visible is None else visible.select(result, b.constant(_NEGATIVE_INFINITY, "f32"))

    scores = b.map(f"{','.join(terms)}->bhrts", score, *operands)
    scores = b.collapse(b.collapse(scores, 2, 3), 0, 1)

    def by_head(x: ir.Value) -> ir.Value:
        return b.expand(b.expand(x, 1, [heads.group, length]), 0, [batch, heads.kv])

    def by_row(x: ir.Value) -> ir.Value:
        return b.collapse(b.collapse(x, 2, 3), 0, 1)

    # The floor keeps a row without any visible key at exp(-inf) = 0 instead of exp(-inf + inf) = NaN.
    highest = b.reduce("gms->gm", lambda acc, s: acc.maximum(s), scores, initial=_LOWEST)
    sinks = None if sink is None else b.expand(b.cast(sink, "f32"), 0, [heads.kv, heads.group])
    if sinks is not None:
        highest = by_row(b.map("bhrt,hr->bhrt", lambda m, s: m.maximum(s), by_head(highest), sinks))
    weights = b.map("gms,gm->gms", lambda s, m: (s - m).exp(), scores, highest, dtype=spec_of(v).dtype)
    sums = b.sum("gms->gm", weights)
    if sinks is not None:
        own = [by_head(sums), by_head(highest), sinks]
        sums = by_row(b.map("bhrt,bhrt,hr->bhrt", lambda n, m, s: n + (s - m).exp(), *own))
    mixed = _mixed(b, weights, b.collapse(v, 0, 1), most)
    # A row that sees a key has a sum of at least 1 (its maximum), so the bound only turns 0 / 0 into 0.
    result = b.map("gmd,gm->gmd", lambda o, n: o / n.maximum(0.5), mixed, sums, dtype=spec_of(q).dtype)
    result = b.expand(b.expand(result, 1, [heads.group, length]), 0, [batch, heads.kv])
    return b.collapse(result, 1, 2)


def _mixed(b: Builder, weights: ir.Value, values: ir.Value, most: int | None) -> ir.Value:
    """The values [G, S, d] weighed by [G, M, S]; where keys are open, some rows at a time if all are too many."""
    groups, rows, keys = b.shape(weights)
    width = b.dim(values, 2)
    if (
        most is None
        or isinstance(keys, int)
        or not (isinstance(groups, int) and isinstance(rows, int) and isinstance(width, int))
    ):
        return b.contract("gms,gsd->gmd", weights, values)
    count = max(1, min(rows, most // max(1, groups * width)))
    parts = [
        b.contract("gms,gsd->gmd", b.slice(weights, [0, start, 0], [groups, min(count, rows - start), keys]), values)
        for start in range(0, rows, count)
    ]
    return b.concat(parts, 1)


def _as_i32(b: Builder, bound: Size | None) -> Size | None:
    """An open size as i32: baseline Vulkan compares no vectors of 64-bit integers."""
    if isinstance(bound, ir.Value) and isinstance(bound.type, ir.IndexType):
        return Scalar(bound).to("i32").value
    return bound


def _bound_of_row(b: Builder, bound: Size | None, values: list[Scalar]) -> Scalar | None:
    """A bound inside the elementwise step; bounds that differ by row come as its operands ``values``."""
    if bound is None:
        return None
    if isinstance(bound, int):
        return b.constant(bound, "i32")
    return values.pop(0).to("i32") if isinstance(bound.type, ir.RankedTensorType) else Scalar(bound)


def _conditions(b: Builder, visibility: Visibility, first: Scalar | None, limit: Scalar | None) -> list[Scalar]:
    """What must hold for the key of this element (dimensions b, h, r, t, s) to be seen."""
    conditions: list[Scalar] = []
    key = b.loop_index(4).to("i32")
    if visibility.left is not None or visibility.right is not None:
        assert first is not None
        own = first + b.loop_index(3).to("i32")
        if visibility.right is not None:
            conditions.append(key <= own + visibility.right)
        if visibility.left is not None:
            conditions.append(own - visibility.left <= key)
    if limit is not None:
        conditions.append(key < limit)
    return conditions
