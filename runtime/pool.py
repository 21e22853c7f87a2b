"""Pool: the memory of states that nobody has any more, kept for the next ones of the same shapes.

Memory that a process has not had before is slow: the system clears and maps it page by page, a GPU's driver is asked
for each array. So what sessions and snapshots leave behind goes to those that come, up to a limit. Nobody counts on
what it holds: whoever takes it is told which rows are zeros, and clears the others or writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from sys import getrefcount, maxsize
from typing import NamedTuple

from .device import Device, DeviceArray

ALL = maxsize
"""As a number of rows that may hold anything: nothing is known to be zeros."""
_MOST_BYTES = 512 << 20

Shapes = tuple[tuple[tuple[int, ...], str], ...]
"""Shape and dtype of each array."""


def _references(things: Iterable[object]) -> int:
    """How many references there are to the one that most refer to."""
    return max(map(getrefcount, things))


_ONE_HOLDER = _references([object()])
"""Of a thing in one sequence and nowhere else."""


class Memory(list[DeviceArray]):
    """Arrays that go back to a pool together, once nobody has any of them.

    Args:
        pool: Which.
        arrays: They.
        filled: Rows that may hold anything, of arrays that have rows; those behind are zeros.
    """

    __slots__ = ("filled", "pool")

    def __init__(self, pool: Pool, arrays: Iterable[DeviceArray], filled: int = ALL) -> None:
        super().__init__(arrays)
        self.pool = pool
        self.filled = filled

    def __del__(self) -> None:
        if self:
            self.pool.give(self, self.filled)


class _Kind(NamedTuple):
    """What is kept of one kind; appending to a list and taking from it are one step for all threads.

    Attributes:
        nbytes: Of one entry.
        entries: Arrays, and how many of their rows may hold anything.
    """

    nbytes: int
    entries: list[tuple[list[DeviceArray], int]]


class Pool:
    """Memory of one program's states; all threads may use it, and none waits for another.

    No lock, since the collector may give something back in the middle of whatever holds one, and close a generator that
    waits for somebody who waits for that lock.

    Args:
        device: Where it is.
        keeps: Whether anything is kept at all. Modules that bring the memory of their results may return an array that
            they were given: it is another one's then, though the one given is gone.
    """

    def __init__(self, device: Device, *, keeps: bool) -> None:
        self.device = device
        self._keeps = keeps
        self._kinds: dict[Shapes, _Kind] = {}
        self._in_order: list[_Kind] = []  # them, so that going through them bears another one
        device.reserves.add(self)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum([kind.nbytes * len(kind.entries) for kind in self._in_order])

    def take(self, shapes: Shapes) -> tuple[Memory, int]:
        """Memory for arrays of these shapes and dtypes.

        Returns:
            The arrays, and how many of their rows may hold anything: 0: all are zeros.

        Raises:
            TargetError: The device has none left.
        """
        kind = self._kinds.get(shapes)
        if kind is not None:
            with suppress(IndexError):
                arrays, filled = kind.entries.pop()
                return Memory(self, arrays), filled
        arrays = [self.device.empty(shape, dtype) for shape, dtype in shapes]
        return Memory(self, arrays), 0 if self.device.clears_new else ALL

    def take_like(self, arrays: Sequence[DeviceArray]) -> tuple[Memory, int]:
        """`take` of the shapes and dtypes of others."""
        return self.take(_shapes_of(arrays))

    def give(self, arrays: Sequence[DeviceArray], filled: int) -> None:
        """Keeps arrays that nobody else has.

        An array that anything still refers to may be read or written: other states, a step under way.
        """
        if not self._keeps or _references(arrays) != _ONE_HOLDER:
            return
        shapes = _shapes_of(arrays)
        kind = self._kinds.get(shapes)
        if kind is None:
            new = _Kind(sum([array.nbytes for array in arrays]), [])
            kind = self._kinds.setdefault(shapes, new)
            if kind is new:
                self._in_order.append(new)
        kind.entries.append((list(arrays), filled))
        while self.nbytes > _MOST_BYTES:
            fullest = max(self._in_order, key=lambda one: one.nbytes * len(one.entries))
            with suppress(IndexError):
                del fullest.entries[0]
        if not self._keeps:  # since it was asked above
            self.trim()

    def trim(self) -> bool:
        """Frees what is kept; whether that was anything."""
        had = self.nbytes > 0
        for kind in self._in_order:
            kind.entries.clear()
        return had

    def close(self) -> None:
        """Frees what is kept, and keeps nothing from now on."""
        self._keeps = False
        self.trim()


def _shapes_of(arrays: Iterable[DeviceArray]) -> Shapes:
    return tuple([(array.shape, array.dtype) for array in arrays])
