"""Inverses of unit lower triangular matrices, as matrix products over blocks.

The chunk-parallel delta rule needs (I + A)^-1 for a strictly lower A of C x C. Blocks of 4 x 4 are inverted by forward
substitution, then pairs are merged until one block is left:

    [[P, 0], [A21, Q]]^-1 = [[P^-1, 0], [-Q^-1 A21 P^-1, Q^-1]]

All in f32. A Neumann product over the whole chunk would be fewer steps, but its powers hold binomials up to 1e17 that
must cancel: it is wrong on real keys from C = 32 on (NUMERICS section 2).
"""

from __future__ import annotations

from iree.compiler import ir

from ..emit.builder import LETTERS, Builder, spec_of
from ..emit.scalar import Scalar

_BASE = 4


def inverse(b: Builder, a: ir.Value) -> ir.Value:
    """(I + A)^-1.

    Args:
        b: The builder.
        a: [M, C, C] in f32; only what is strictly below the diagonal is read. C is a power of two, 4 or more.

    Returns:
        [M, C, C], lower triangular.
    """
    chunk = spec_of(a).shape[1]
    assert chunk is not None
    assert chunk >= _BASE
    blocks = _substitute(b, a, chunk)
    width = _BASE
    while width < chunk:
        count = chunk // (2 * width)
        pairs = b.expand(blocks, 1, [count, 2])
        first, second = (_half(b, pairs, half) for half in (0, 1))
        corner = b.collapse(_corner(b, a, width, count), 0, 1)
        corner = b.contract("mik,mkj->mij", second, b.contract("mik,mkj->mij", corner, first))
        corner = b.expand(corner, 0, [b.dim(a, 0), count])
        blocks = join_blocks(b, pairs, b.map("mnij->mnij", lambda x: -x, corner))
        width *= 2
    return b.collapse(blocks, 1, 2)


def join_blocks(b: Builder, diagonal: ir.Value, corner: ir.Value) -> ir.Value:
    """[[first, 0], [corner, second]] for every pair of blocks.

    Args:
        b: The builder.
        diagonal: [..., n, 2, w, w], the two blocks of each pair.
        corner: [..., n, w, w].

    Returns:
        [..., n, 2w, 2w].
    """
    rank = spec_of(corner).rank
    lead = LETTERS[: rank - 2]
    row = rank - 2  # loop dimension that tells the half of the rows; the one of the columns is two further

    def element(block: Scalar, below: Scalar) -> Scalar:
        rows, columns = b.loop_index(row), b.loop_index(row + 2)
        zero = b.constant(0.0, "f32")
        return rows.equals(columns).select(block, (rows > columns).select(below, zero))

    joined = b.map(f"{lead}pij,{lead}ij->{lead}piqj", element, diagonal, corner, sizes={"q": 2})
    return b.collapse(b.collapse(joined, row + 2, row + 3), row, row + 1)


def _half(b: Builder, pairs: ir.Value, half: int) -> ir.Value:
    """The first or second block of each pair of [M, n, 2, w, w], as [M * n, w, w]."""
    sizes = b.shape(pairs)
    sizes[2] = 1
    return b.collapse(b.slice(pairs, [0, 0, half, 0, 0], sizes), 0, 2)


def _corner(b: Builder, a: ir.Value, width: int, count: int) -> ir.Value:
    """The block below the diagonal inside each diagonal block of 2w: [M, n, w, w] of [M, C, C]."""

    def element() -> Scalar:
        m, n, i, j = (b.loop_index(axis) for axis in range(4))
        start = n * (2 * width)
        return b.load(a, m, start + width + i, start + j)

    sizes = {"m": b.dim(a, 0), "n": count, "i": width, "j": width}
    return b.map("->mnij", element, dtype="f32", sizes=sizes)


def _substitute(b: Builder, a: ir.Value, chunk: int) -> ir.Value:
    """Inverses of the diagonal blocks of 4 x 4: [M, C / 4, 4, 4]."""

    def element() -> Scalar:
        m, n, i, j = (b.loop_index(axis) for axis in range(4))
        start = n * _BASE
        zero, one = b.constant(0.0, "f32"), b.constant(1.0, "f32")
        column: list[Scalar] = []  # column j of the inverse, x_r = e_r - sum_c A_rc x_c
        result = zero
        for r in range(_BASE):
            x = j.equals(r).select(one, zero)
            for c, known in enumerate(column):
                x = x - b.load(a, m, start + r, start + c) * known
            column.append(x)
            result = i.equals(r).select(x, result)
        return result

    sizes = {"m": b.dim(a, 0), "n": chunk // _BASE, "i": _BASE, "j": _BASE}
    return b.map("->mnij", element, dtype="f32", sizes=sizes)
