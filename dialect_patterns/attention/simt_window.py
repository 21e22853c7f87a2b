"""Which keys the rows of a workgroup see, in the GPU kernels that go over keys tile by tile."""

from __future__ import annotations

from ..emit.scalar import Scalar
from .simt_call import Call, Sizes


class Window:
    """Of some rows of a key head (its query heads and their tokens), causal at one position.

    Args:
        c: What is computed.
        n: Its sizes.
        first: Position of the call's first query.
        start: The workgroup's first row.
        queries: Rows of a workgroup.
        keys: Of a tile.

    Attributes:
        begin: The first key that a row may see, at the start of a tile.
        last: The last one.
    """

    def __init__(self, c: Call, n: Sizes, first: Scalar, start: Scalar, queries: int, keys: int) -> None:
        self._c, self._n, self._first, self._start, self._keys = c, n, first, start, keys
        token = n.token(start)
        inside = token + queries <= n.tokens  # else rows are those of several heads
        lowest = first + inside.select(token, Scalar.constant(0, "index"))
        self._lowest = lowest
        self._end = first + (token + queries).minimum(n.tokens)
        self.last = self._end - 1
        self.begin = Scalar.constant(0, "index")
        if c.left is not None:
            self.begin = (lowest - c.left).maximum(0).divide_unsigned(keys)[0] * keys

    def all(self) -> tuple[Scalar, Scalar]:
        """The first key, and the end."""
        return self.begin, self._end

    def part(self, part: Scalar) -> tuple[Scalar, Scalar]:
        """The first key of a part of the tiles, and the end of it."""
        tiles = (self._end - self.begin + (self._keys - 1)).divide_unsigned(self._keys)[0]
        each = (tiles + (self._n.parts - 1)).divide_unsigned(self._n.parts)[0] * self._keys
        place = self.begin + part * each
        return place, (place + each).minimum(self._end)

    def sees(self, line: Scalar, key: Scalar) -> Scalar:
        """Whether a row of the workgroup sees a key."""
        query = self._first + self._n.token(self._start + line)
        seen = (key <= query) & (key <= self.last)
        return seen if self._c.left is None else seen & (query <= key + self._c.left)

    def all_seen(self, place: Scalar) -> Scalar:
        """Whether all rows of the workgroup see all keys of the tile that starts there."""
        seen = place + (self._keys - 1) <= self._lowest
        return seen if self._c.left is None else seen & (self.last <= place + self._c.left)
