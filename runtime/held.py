"""What a session or a snapshot holds on the device, and who may write to it.

The states at one position are a `Held`. Recurrent and conv states come out of a call as new arrays, so those of a
`Held` are never written again; their memory is used again only where nobody else was given it (`shared`). KV caches of
fixed capacity are written in place: several `Held` lie in the same `Caches`, each in the first rows of them, as many as
its `Lease` says. Who stands at the end of the rows in use goes on there; who writes elsewhere gets a copy of its rows.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .binding import axis_of, first_of
from .device import DeviceArray, HostArray, Move, row_regions, rows_regions
from .manifest import Manifest, StateSpec
from .pool import Memory, Pool
from .state import state_shape

_ALL = 1 << 40
"""Rows of a lease that all behind it belong to."""


class Lease:
    """That the first rows of some caches are in use; gone with the last reference to it.

    Attributes:
        caches: Which.
        rows: How many, in tokens.
    """

    __slots__ = ("caches", "rows")

    def __init__(self, caches: Caches, rows: int) -> None:
        self.caches = caches
        self.rows = rows
        caches.in_use[id(self)] = rows

    def __del__(self) -> None:
        self.release()

    def release(self) -> None:
        """Ends it, though something may still hold it, such as an exception's traceback."""
        self.caches.in_use.pop(id(self), None)


class Caches:
    """The KV caches that are written in place, of one memory each; all threads may use it.

    Args:
        specs: The state that each is.
        arrays: They, with zeros from row `arrays.filled` on.
    """

    def __init__(self, specs: Sequence[StateSpec], arrays: Memory) -> None:
        self.specs = tuple(specs)
        self.arrays = arrays
        self.in_use: dict[int, int] = {}  # rows of each lease; a step pays for it, so it is no set of weak references
        self._lock = threading.Lock()

    def is_of_one(self, lease: Lease) -> bool:
        """Whether nobody but the holder of this lease uses the caches."""
        return list(self.in_use) == [id(lease)]

    def extend(self, held: Lease, rows: int) -> Lease:
        """A lease of as many rows, of which those from the end of the held ones on may be written.

        Costs nothing where nobody else has rows there, else a copy of the held rows into new caches. Rows that somebody
        wrote there and gave up are cleared: nothing reads them, but a zero weight does not hide a NaN.

        Raises:
            TargetError: The device failed; nothing has changed.
        """
        if not self.arrays:
            return Lease(self, rows)
        with self._lock:
            filled = self.arrays.filled
            # None is in use where the collector ended the held one before what still holds it: a generator it closes.
            lease = None if max(list(self.in_use.values()), default=0) > held.rows else Lease(self, rows)
            if lease is not None:
                self.arrays.filled = max(filled, rows)
        if lease is None:
            return Lease(self.copy(held.rows, rows), rows)
        try:
            if filled > held.rows:
                self.arrays.pool.device.move(
                    [
                        Move(None, array, row_regions(array, spec.length_axis or 0, held.rows, filled))
                        for spec, array in zip(self.specs, self.arrays, strict=True)
                    ]
                )
        except BaseException:
            lease.release()
            raise
        return lease

    def grow(self, held: Lease, position: int) -> bool:
        """Makes a lease a row longer than `position`, in place, where nobody else has one and nothing is to be cleared.

        `extend` takes care of everything else; should a call then fail, `shrink` goes back.
        """
        in_use, key = self.in_use, id(held)
        arrays = self.arrays
        if (arrays.filled > position and arrays) or len(in_use) != 1 or key not in in_use:
            return False
        arrays.filled = held.rows = in_use[key] = position + 1
        return True

    def claim(self, held: Lease) -> bool:
        """Makes all rows behind a lease its own until `stand`, where nobody has some and nothing is to be cleared."""
        with self._lock:
            can = self.can_claim(held)
            if can:
                self.in_use[id(held)] = _ALL
                sizes = [
                    array.shape[spec.length_axis or 0] for spec, array in zip(self.specs, self.arrays, strict=True)
                ]
                self.arrays.filled = max(sizes, default=0)  # as long as it is not said how many are written
            return can

    def can_claim(self, held: Lease) -> bool:
        """Whether `claim` does it."""
        in_use, key = list(self.in_use.items()), id(held)
        most = max((rows for other, rows in in_use if other != key), default=0)
        return (key, held.rows) in in_use and (not self.arrays or max(self.arrays.filled, most) <= held.rows)

    def shrink(self, held: Lease, position: int) -> None:
        """Takes `grow` back; the row may hold anything."""
        held.rows = self.in_use[id(held)] = position

    def stand(self, held: Lease, position: int, filled: int) -> None:
        """Says how many rows a lease has behind a `claim`, and how many of the caches' were written."""
        self.arrays.filled, held.rows = filled, position
        if id(held) in self.in_use:
            self.in_use[id(held)] = position

    def with_array(self, held: Lease, spec: StateSpec, array: DeviceArray) -> Caches:
        """The same caches but for one, for whoever held them; copies of the others where somebody else does too."""
        caches = self if self.is_of_one(held) else self.copy(held.rows, held.rows)
        old = caches.arrays
        arrays = [array if other is spec else same for other, same in zip(self.specs, old, strict=True)]
        return Caches(self.specs, Memory(old.pool, arrays, old.filled))

    def copy(self, rows: int, filled: int) -> Caches:
        """New caches with the same first rows, and zeros behind them; `filled` of them may be written at once."""
        pool = self.arrays.pool
        copies, unknown = pool.take_like(self.arrays)
        moves: list[Move] = []
        for spec, old, new in zip(self.specs, self.arrays, copies, strict=True):
            axis = spec.length_axis or 0
            moves.append(Move(old, new, row_regions(old, axis, 0, rows)))
            moves += _clearing(spec, new, rows, unknown)
        pool.device.move(moves)
        copies.filled = filled
        return Caches(self.specs, copies)


@dataclass(eq=False, slots=True)
class Held:
    """The states of B rows after `position` tokens.

    Attributes:
        moving: The states that every call returns in new memory, in manifest order; nobody writes to them.
        lease: The rows of the caches that are written in place.
        position: Tokens committed.
        batch: B; None: still open, and there are no states.
        mask: Columns of the committed tokens, once a caller has masked one.
        shared: Whether somebody else was given the moving states, so that their memory may not be used again.
    """

    moving: list[DeviceArray]
    lease: Lease
    position: int = 0
    batch: int | None = None
    mask: HostArray | None = None
    shared: bool = False

    def arrays(self, manifest: Manifest) -> list[DeviceArray]:
        """All states, in manifest order."""
        caches = self.lease.caches.arrays
        if not caches:
            return list(self.moving)
        moving, cached = iter(self.moving), iter(caches)
        return [next(cached) if spec.in_place else next(moving) for spec in manifest.states]

    def again(self) -> Held:
        """The same for somebody else."""
        self.shared = True
        lease = Lease(self.lease.caches, self.position)
        return Held(self.moving, lease, self.position, self.batch, self.mask, True)

    def with_array(self, manifest: Manifest, spec: StateSpec, array: DeviceArray) -> Held:
        """The same with another array for one state, whose holder this one takes the place of."""
        self.shared = True  # most of the moving states are in both
        moving = [other for other in manifest.states if not other.in_place]
        pool = self.lease.caches.arrays.pool
        arrays = Memory(pool, [array if other is spec else old for other, old in zip(moving, self.moving, strict=True)])
        caches = self.lease.caches.with_array(self.lease, spec, array) if spec.in_place else self.lease.caches
        return Held(arrays, Lease(caches, self.position), self.position, self.batch, self.mask, True)

    def first(self, manifest: Manifest, position: int) -> Held:
        """What was held after the first tokens, where all states are caches that are written in place."""
        spec = next((spec for spec in manifest.inputs if spec.role == "attention_mask"), None)
        axis = axis_of(manifest, spec.shape, "total") if spec is not None else None
        mask = self.mask if axis is None or self.mask is None else first_of(self.mask, axis, position)
        return Held([], Lease(self.lease.caches, position), position, self.batch, mask, self.shared)

    @property
    def all_arrays(self) -> Sequence[DeviceArray]:
        """Them in any order; caches are whole, whoever else uses them."""
        return [*self.moving, *self.lease.caches.arrays]

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that it keeps; caches are whole, whoever else uses them."""
        return sum(array.nbytes for array in self.all_arrays)


def nothing(pool: Pool, position: int = 0) -> Held:
    """What is held where there are no states: before an open batch is known, and after the end."""
    return Held([], Lease(Caches((), Memory(pool, ())), position), position)


def take(manifest: Manifest, pool: Pool, batch: int, past: int) -> tuple[Memory, Caches, bool, int]:
    """Memory for new states.

    Args:
        manifest: The model.
        pool: Where it comes from.
        batch: B.
        past: Rows of the KV caches.

    Returns:
        For the moving states, for the caches, whether the former may hold anything, and how many rows of the latter.
    """
    moving, caches = ([spec for spec in manifest.states if spec.in_place == in_place] for in_place in (False, True))
    shapes = [
        tuple([(state_shape(manifest, spec, batch, past), spec.dtype) for spec in specs]) for specs in (moving, caches)
    ]
    (first, unknown), (second, filled) = (pool.take(one) for one in shapes)
    return first, Caches(caches, second), unknown > 0, filled


def zeros(manifest: Manifest, pool: Pool, batch: int) -> Held:
    """The states of an empty sequence: KV caches get their capacity, or no rows where the context is open."""
    moving, caches, unknown, filled = take(manifest, pool, batch, manifest.max_context or 0)
    moves = [Move(None, array, ((0, 0, array.nbytes),)) for array in moving] if unknown else []
    for spec, array in zip(caches.specs, caches.arrays, strict=True):
        moves += _clearing(spec, array, 0, filled)
    pool.device.move(moves)
    caches.arrays.filled = 0
    return Held(moving, Lease(caches, 0), 0, batch)


def from_host(
    manifest: Manifest, pool: Pool, arrays: Mapping[str, HostArray], batch: int, position: int, mask: HostArray | None
) -> Held:
    """States after so many tokens, by name and in ONNX form, on the device."""
    device, room = pool.device, manifest.max_context
    moving, caches, _, filled = take(manifest, pool, batch, position if room is None else room)
    states = Held(moving, Lease(caches, position), position, batch, mask)
    moves: list[Move] = []
    for spec, target in zip(manifest.states, states.arrays(manifest), strict=True):
        array, view, axis = arrays[spec.name], device.host_view(target), (spec.in_place and spec.length_axis) or 0
        if view is not None:
            view[(slice(None),) * axis + (slice(0, array.shape[axis]),)] = array
        else:
            source = device.upload(array, spec.dtype)
            moves.append(Move(source, target, rows_regions(source, target, axis, array.shape[axis], 0, 0)))
        moves += _clearing(spec, target, position, filled) if spec.in_place else []
    device.move(moves)
    caches.arrays.filled = position
    return states


def _clearing(spec: StateSpec, array: DeviceArray, first: int, last: int) -> list[Move]:
    """What clears rows of a cache, as many as there are."""
    axis = spec.length_axis or 0
    last = min(last, array.shape[axis])
    return [Move(None, array, row_regions(array, axis, first, last))] if first < last else []
