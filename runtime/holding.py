"""What a session holds: its states, those that it goes back to, a step that is ahead of it, memory for later ones."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

import numpy as np

from .ahead import Ahead, Series
from .device import DeviceArray, HostArray, numpy_dtype
from .engine import Engine
from .errors import StateError, TargetError, require
from .finite import check_finite
from .held import Held, nothing, zeros
from .lane import Lane
from .manifest import Manifest, OutputSpec, StateSpec
from .owned import Owned
from .rows import Row, gather
from .snapshot import Snapshot, parts_of
from .step import Step

_COMPACT_BYTES = 16 << 20
_SPARE_STATES = 2


class Holding(Owned):
    """The part of a `Session` that holds states; `Session` says how each attribute comes to be."""

    _engine: Engine
    _manifest: Manifest
    _fixed_batch: int | None
    _window: int
    _guard: Literal["nan"] | None
    _takes_results: bool
    _line: list[Held]
    _spare: list[list[DeviceArray]]
    _ahead: Ahead | None
    _series: Series | None
    _lane: Lane | None
    _free: list[None]

    @property
    def position(self) -> int:
        """Number of tokens committed."""
        now, series, lane = self._line[-1], self._series, self._lane
        if lane is not None and lane.is_open:
            return lane.position
        return now.position + (series.taken if series is not None and series.base is now else 0)

    @property
    def batch(self) -> int | None:
        """Number of rows; None where the first call decides."""
        return self._line[-1].batch

    def _release(self) -> None:
        """Frees the states; the program calls it when it closes, after which a session has no use of them."""
        self._line = [nothing(self._engine.pool, self.position)]
        self._spare = []
        self._ahead = self._series = self._lane = None

    def _open_lane(self, now: Held, into: list[DeviceArray]) -> bool:
        """Whether there is an open lane from now on, of states that nobody else holds."""
        packed, lane = self._engine.packed_step(), self._lane
        if packed is None or not now.lease.caches.can_claim(now.lease):
            return False
        if lane is None or not lane.fits(now, into):
            self._lane = None  # its memory may be what the new one takes
            with self._engine.exclusive():
                lane = Lane(packed, self._free, now, into)
        self._lane = lane
        return lane.open()

    def _all_arrays(self) -> list[DeviceArray]:
        coming = [one.held.moving for one in (self._ahead, self._series) if one is not None and one.held is not None]
        return [a for one in (*(now.all_arrays for now in self._line), *list(self._spare), *coming) for a in one]

    def _chooser(self, now: Held, draw: bytes | None) -> Step | None:
        can = now.batch is not None and now.mask is None and self._guard is None  # who looks before it goes on
        return self._engine.take_chooser(now.batch or 1, draws=draw is not None) if can else None

    def _submit(self, base: Held, ids: HostArray | Step, draw: bytes | None) -> Ahead:
        """Puts a step that chooses tokens into the device's queue."""
        step = self._chooser(base, draw)
        assert step is not None
        step.draw_by(draw)
        lease = base.lease.caches.extend(base.lease, base.position + 1)
        try:
            now = Held(base.moving, lease, base.position, base.batch)
            with self._engine.exclusive():
                moving = self._next_memory(base)
                assert moving is not None, "only modules that take memory for their results choose tokens"
                wait = step.submit(ids, now, moving)
        except BaseException:
            lease.release()
            raise
        after = Held(moving, lease, base.position + 1, base.batch)
        source = ids if isinstance(ids, Step) else None
        return Ahead(base, after, step, source, None if isinstance(ids, Step) else ids, draw, wait)

    def _settle(self) -> None:
        """Waits for a step that was submitted ahead, and forgets it: only what is committed counts."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and not self._engine.module.is_foreign:
            self._abandon(ahead)

    def _abandon(self, *steps: Ahead) -> None:
        """Waits for steps that nobody wants, and has their memory used again."""
        try:
            for one in steps:
                with suppress(TargetError):
                    one.wait()
            for one in steps:
                self._keep_memory(one.held.moving)
            used = {id(step): step for one in steps for step in (one.step, one.source) if step is not None}
            for step in used.values():
                self._engine.give_back(steps[0].held.batch or 1, step)
        finally:
            for one in steps:
                one.held.lease.release()

    def _commit(self, new: Held) -> None:
        """Holds something more; what was there is kept for `rollback` as far as the window goes.

        Raises:
            StateError: The guard found a state that is not finite: nothing has changed.
        """
        if self._guard is not None:
            try:
                check_finite(self._engine, new, self.position)
            except BaseException:
                new.lease.release()
                raise
        self._replace([*self._line, new][-1 - self._window :])

    def _gather(self, rows: Sequence[Row]) -> None:
        self._replace([gather(self._manifest, self._engine.pool, rows, self.position)])

    def _put(self, now: Held, spec: StateSpec, array: DeviceArray) -> None:
        self._replace([*self._line[:-1], now.with_array(self._manifest, spec, array)])

    def _replace(self, line: list[Held]) -> None:
        """What is held from now on, in one assignment; the memory of what is not is there to be used again."""
        old, self._line, self._lane = self._line, line, None
        for one in old:
            if not any(one is other for other in line) and not one.shared:
                self._keep_memory(one.moving)

    def _held_by(self, snapshot: Snapshot) -> Held:
        require(snapshot, Snapshot, "snapshot", "session.snapshot()")
        engine, now = parts_of(snapshot)
        if engine is not self._engine:
            hint = "session.save() and Session.load() take states from one to the other"
            got = f"{engine.manifest.model_name} on {engine.device.uri}"
            raise StateError("a snapshot of another program", got=got, hint=hint)
        if now.batch is None:
            return self._empty()
        if self._fixed_batch not in (None, now.batch):
            hint = "use program.session(snapshot)"
            raise StateError("a snapshot of another batch", got=now.batch, expected=self._fixed_batch, hint=hint)
        return now.again()

    def _moving(self, states: list[DeviceArray]) -> list[DeviceArray]:
        return [state for spec, state in zip(self._manifest.states, states, strict=True) if not spec.in_place]

    def _next_memory(self, now: Held) -> list[DeviceArray] | None:
        """Memory for the next moving states; None: the module brings it."""
        if not self._takes_results:
            return None
        return self._spare.pop() if self._spare else self._engine.pool.take_like(now.moving)[0]

    def _in_order(self, moving: list[DeviceArray]) -> list[DeviceArray | None]:
        """Moving states at the places of all states."""
        memory = iter(moving)
        return [None if spec.in_place else next(memory) for spec in self._manifest.states]

    def _keep_memory(self, moving: list[DeviceArray]) -> None:
        """Keeps the memory of states for later ones; two sets are enough, whatever the number of blocks."""
        if moving and self._takes_results and len(self._spare) < _SPARE_STATES:
            self._spare.append(moving)

    def _compact(self, moving: list[DeviceArray], outputs: list[DeviceArray]) -> list[DeviceArray]:
        """Copies states out of an allocation that they share with large outputs, which they would keep alive."""
        if self._takes_results or sum(output.nbytes for output in outputs) < _COMPACT_BYTES:
            return moving
        return self._engine.device.copy(moving)

    def _no_tokens(self, spec: OutputSpec, batch: int) -> HostArray:
        sizes = {"batch": batch}
        shape = [dim if isinstance(dim, int) else sizes.get(self._manifest.dims[dim], 0) for dim in spec.shape]
        if spec.token_axis is not None:
            shape[spec.token_axis] = 0
        return np.zeros(shape, numpy_dtype(spec.dtype))

    def _empty(self) -> Held:
        """The states of no tokens."""
        if self._fixed_batch is None:
            return nothing(self._engine.pool)
        return zeros(self._manifest, self._engine.pool, self._fixed_batch)

    def _started(self) -> Held:
        if self.batch is None:
            raise StateError("the batch is open until the first call", hint="use program.session(batch=B)")
        return self._line[-1]
