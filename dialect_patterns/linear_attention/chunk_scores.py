"""What the tokens of one chunk see of each other: decayed scores, and the decays to and from the chunk's ends.

For tokens i >= j of a chunk, D_ij is the product of the decays a after j up to i. It is built from sums (or products)
over the segment itself, never as a difference of running sums, so that it stays exact after a decay of exp(-1000) and
takes exp(-inf), a reset. Factors are capped at e^80, which only positive log decays reach (NUMERICS section 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from iree.compiler import ir

from ..emit.builder import Builder, spec_of
from ..emit.scalar import Scalar
from .triangular import join_blocks

LOG_CAP = 80.0


@dataclass(frozen=True)
class Scores:
    """Scores inside the chunks; M counts all chunks of all heads, r query heads read one state.

    Attributes:
        qk: [M, r, C, C], query against key with decay, 0 above the diagonal.
        kk: [M, C, C], key against key with decay, only meaningful below the diagonal; None without a delta rule.
        query: [M, r, C, dk], the query times the decay from the chunk's start.
        key: [M, C, dk], the key times the decay from the chunk's start; None without a delta rule.
        key_end: [M, C, dk], the key times the decay to the chunk's end.
        total: Decay over the chunk, [M, dk] or [M, 1]; None without decay.
    """

    qk: ir.Value
    kk: ir.Value | None
    query: ir.Value
    key: ir.Value | None
    key_end: ir.Value
    total: ir.Value | None


def plain_scores(b: Builder, q: ir.Value, k: ir.Value, delta: bool) -> Scores:
    """Without decay. ``q`` is [M, r, C, dk], ``k`` [M, C, dk], both in f32."""
    rows = b.dim(q, 1)
    qk = b.contract("mid,mjd->mij", b.collapse(q, 1, 2), k)
    qk = b.map("mrij->mrij", lambda s: _lower(b, 2, s), b.expand(qk, 1, [rows, b.dim(k, 1)]))
    kk = b.contract("mid,mjd->mij", k, k) if delta else None
    return Scores(qk, kk, q, k if delta else None, k, None)


def head_scores(b: Builder, q: ir.Value, k: ir.Value, g: ir.Value, delta: bool) -> Scores:
    """One decay a head. ``g`` is [M, C], the log decay."""
    chunk, rows = b.dim(k, 1), b.dim(q, 1)

    def factor(s: Scalar) -> Scalar:
        return s.minimum(LOG_CAP).exp()

    sums, start, end = _segment_sums(b, g)
    d = b.map("mij->mij", lambda s: _lower(b, 1, factor(s)), sums)
    start, end = (b.map("mi->mi", factor, value) for value in (start, end))

    qk = b.expand(b.contract("mid,mjd->mij", b.collapse(q, 1, 2), k), 1, [rows, chunk])
    qk = b.map("mrij,mij->mrij", lambda s, f: s * f, qk, d)
    kk = None
    if delta:
        kk = b.map("mij,mij->mij", lambda s, f: s * f, b.contract("mid,mjd->mij", k, k), d)
    return Scores(
        qk=qk,
        kk=kk,
        query=b.map("mrcd,mc->mrcd", lambda x, f: x * f, q, start),
        key=b.map("mcd,mc->mcd", lambda x, f: x * f, k, start) if delta else None,
        key_end=b.map("mcd,mc->mcd", lambda x, f: x * f, k, end),
        total=b.slice(start, [0, b.sub(chunk, 1)], [b.dim(k, 0), 1]),
    )


def _segment_sums(b: Builder, g: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Sums of ``g`` [M, C] over all segments of a chunk, by halving as in :func:`key_scores`.

    Returns:
        [M, C, C], the sum after j up to i; [M, C], from the chunk's start up to i; [M, C], after j to the end.
    """
    chunk = b.dim(g, 1)
    assert isinstance(chunk, int)
    start, end, total = g, b.full(0.0, b.shape(g), "f32"), g
    sums = b.full(0.0, [*b.shape(g), 1, 1], "f32")
    width = 1
    while width < chunk:
        split = [chunk // (2 * width), 2]
        starts, ends = (b.expand(value, 1, [*split, width]) for value in (start, end))
        corner = b.map("mni,mnj->mnij", lambda e, f: e + f, _half(b, starts, 2, 1), _half(b, ends, 2, 0))
        sums = join_blocks(b, b.expand(sums, 1, split), corner)
        totals = b.expand(total, 1, split)
        first, second = _half(b, totals, 2, 0), _half(b, totals, 2, 1)
        start, end = (
            b.collapse(b.map("mnpw,mn->mnpw", partial(_add_in_half, b, half), value, other), 1, 3)
            for half, value, other in ((1, starts, first), (0, ends, second))
        )
        total = b.map("mn,mn->mn", lambda e, f: e + f, first, second)
        width *= 2
    return b.collapse(sums, 1, 2), start, end


def _add_in_half(b: Builder, half: int, value: Scalar, other: Scalar) -> Scalar:
    """``value``, plus ``other`` where loop dimension 2 is ``half``."""
    return b.loop_index(2).equals(half).select(value + other, value)


def key_scores(b: Builder, q: ir.Value, k: ir.Value, g: ir.Value, delta: bool) -> Scores:
    """One decay a key dimension, by halving. ``g`` is [M, C, dk], the log decay.

    Level w couples the second half of each block of 2w tokens (rows) to its first half (columns). Both are normalised
    at the boundary: rows get the product of the decays from there, columns the product up to there, so that no factor
    exceeds 1 where g <= 0. Longer products come from shorter ones.
    """
    m, rows, chunk = b.dim(k, 0), b.dim(q, 1), b.dim(k, 1)
    assert isinstance(chunk, int)
    assert isinstance(rows, int)
    x = b.concat([q, b.unsqueeze(k, 1)], 1) if delta else q  # [M, r or r + 1, C, dk]
    scores = b.reduce("mrcd,mcd->mrc", lambda acc, e, p: acc + e * p, x, k, initial=0.0)
    scores = b.expand(scores, 2, [chunk, 1, 1])
    start = b.map("mcd->mcd", lambda s: s.minimum(LOG_CAP).exp(), g)
    end = b.full(1.0, b.shape(k), "f32")
    total = start
    width = 1
    while width < chunk:
        count = chunk // (2 * width)
        split = [count, 2, width]
        starts, ends = (b.expand(value, 1, split) for value in (start, end))
        row = b.map(
            "mrnid,mnid->mnrid", lambda e, f: e * f,
            _half(b, b.expand(x, 2, split), 3, 1), _half(b, starts, 2, 1),
        )  # fmt: skip
        column = b.map(
            "mnjd,mnjd->mnjd", lambda e, f: e * f, _half(b, b.expand(k, 1, split), 2, 0), _half(b, ends, 2, 0)
        )
        corner = b.contract("nid,njd->nij", b.collapse(b.collapse(row, 2, 3), 0, 1), b.collapse(column, 0, 1))
        corner = b.expand(b.expand(corner, 1, [b.dim(x, 1), width]), 0, [m, count])
        corner = b.map("mnrij->mrnij", lambda e: e, corner)
        scores = join_blocks(b, b.expand(scores, 2, [count, 2]), corner)
        totals = b.expand(total, 1, [count, 2])
        first, second = _half(b, totals, 2, 0), _half(b, totals, 2, 1)
        start = b.collapse(_extend(b, starts, first, 1), 1, 3)
        end = b.collapse(_extend(b, ends, second, 0), 1, 3)
        total = b.map("mnd,mnd->mnd", lambda e, f: (e * f).minimum(math.exp(LOG_CAP)), first, second)
        width *= 2
    scores = b.collapse(scores, 2, 3)
    kk = None
    if delta:
        kk = b.collapse(b.slice(scores, [0, rows, 0, 0], [m, 1, chunk, chunk]), 0, 1)
        scores = b.slice(scores, [0, 0, 0, 0], [m, rows, chunk, chunk])
    return Scores(
        qk=scores,
        kk=kk,
        query=b.map("mrcd,mcd->mrcd", lambda e, f: e * f, q, start),
        key=b.map("mcd,mcd->mcd", lambda e, f: e * f, k, start) if delta else None,
        key_end=b.map("mcd,mcd->mcd", lambda e, f: e * f, k, end),
        total=b.collapse(total, 1, 2),
    )


def _lower(b: Builder, row: int, value: Scalar) -> Scalar:
    """``value`` on and below the diagonal of the last two of the loop's dimensions, of which ``row`` is the first."""
    return (b.loop_index(row) >= b.loop_index(row + 1)).select(value, b.constant(0.0, "f32"))


def _half(b: Builder, value: ir.Value, axis: int, half: int) -> ir.Value:
    """Index ``half`` of dimension ``axis``, which has size two, without that dimension."""
    sizes = b.shape(value)
    sizes[axis] = 1
    offsets = [half if i == axis else 0 for i in range(spec_of(value).rank)]
    return b.collapse(b.slice(value, offsets, sizes), axis - 1, axis)


def _extend(b: Builder, products: ir.Value, other: ir.Value, half: int) -> ir.Value:
    """Products [M, n, 2, w, dk] inside halves of a block as products inside the block.

    Those of one half go on over the whole other half, whose product is ``other`` [M, n, dk].
    """

    def element(product: Scalar, factor: Scalar) -> Scalar:
        longer = (product * factor).minimum(math.exp(LOG_CAP))
        return b.loop_index(2).equals(half).select(longer, product)

    return b.map("mnpwd,mnd->mnpwd", element, products, other)
