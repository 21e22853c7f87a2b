"""Snapshot: the states of a session at one position, to go on from as often as one likes."""

from __future__ import annotations

from .engine import Engine
from .held import Held, nothing
from .owned import Owned


class Snapshot(Owned):
    """States, position and mask of a session as they were; nothing changes them.

    It shares the device's memory with the session it was taken from and with those that go on from it, until one of
    them writes. Threads may share it. Get it from `Session.snapshot`.
    """

    _copy_hint = "threads may share it; session.save() takes it to another process"

    def __init__(self, engine: Engine, held: Held) -> None:
        self._engine = engine
        self._held = held
        engine.adopt(self, Snapshot._release, lambda snapshot: snapshot._held.all_arrays)

    def __repr__(self) -> str:
        rows = "no rows yet" if self.batch is None else f"batch {self.batch}"
        return f"Snapshot(position {self.position}, {rows}, {self.nbytes} bytes)"

    @property
    def position(self) -> int:
        """Number of tokens committed."""
        return self._held.position

    @property
    def batch(self) -> int | None:
        """Number of rows; None where the batch is open and nothing has run."""
        return self._held.batch

    @property
    def nbytes(self) -> int:
        """Bytes on the device that it keeps from being freed, shared ones included."""
        return self._held.nbytes

    def _release(self) -> None:
        """Frees the states when the program closes, after which a snapshot is of no use."""
        self._held = nothing(self._engine.pool, self._held.position)


def parts_of(snapshot: Snapshot) -> tuple[Engine, Held]:
    """Of which program it is and what it holds, for those who go on from it."""
    return snapshot._engine, snapshot._held  # pyright: ignore[reportPrivateUsage]
