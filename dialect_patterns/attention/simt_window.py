"""Which keys the rows of a workgroup see, in the GPU kernels that go over keys tile by tile."""

from __future__ import annotations

from ..emit.scalar import Scalar
from .simt_call import Call


class Window:
    """Of some rows of a key head (its query heads and their tokens), causal at one position.

    Args:
        c: What is computed.
        first: Position of the call's first query.
        start: The workgroup's first row.
        queries: Rows of a workgroup.
        keys: Of a tile.

    Attributes:
        begin: The first key that a row may see, at the start of a tile.
        last: The last one.
    """

    def __init__(self, c: Call, first: Scalar, start: Scalar, queries: int, keys: int) -> None:
        self._c, self._first, self._start, self._queries, self._keys = c, first, start, queries, keys
        token = start.divide_unsigned(c.tokens)[1]
        inside = token + queries <= Scalar.constant(c.tokens, "index")  # else rows are those of several heads
        lowest = first + inside.select(token, Scalar.constant(0, "index"))
        self._lowest = lowest
        self._end = first + (token + queries).minimum(c.tokens)
        self.last = self._end - 1
        self.begin = Scalar.constant(0, "index")
        if c.left is not None:
            self.begin = (lowest - c.left).maximum(0).divide_unsigned(keys)[0] * keys

    def part(self, part: Scalar, parts: int) -> tuple[Scalar, Scalar]:
        """The first key of a part of the tiles, and the end of it."""
        if parts == 1:
            return self.begin, self._end
        tiles = (self._end - self.begin + (self._keys - 1)).divide_unsigned(self._keys)[0]
        each = (tiles + (parts - 1)).divide_unsigned(parts)[0] * self._keys
        place = self.begin + part * each
        return place, (place + each).minimum(self._end)

    def sees(self, line: Scalar, key: Scalar) -> Scalar:
        """Whether a row of the workgroup sees a key."""
        query = self._first + (self._start + line).divide_unsigned(self._c.tokens)[1]
        seen = (key <= query) & (key <= self.last)
        return seen if self._c.left is None else seen & (query <= key + self._c.left)

    def all_seen(self, place: Scalar) -> Scalar:
        """Whether all rows of the workgroup see all keys of the tile that starts there."""
        seen = place + (self._keys - 1) <= self._lowest
        return seen if self._c.left is None else seen & (self.last <= place + self._c.left)
