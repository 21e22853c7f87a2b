"""MemoryUse: what a program and its sessions take, in bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryUse:
    """Bytes; see `Program.memory`.

    Attributes:
        device: URI of the device.
        files: Of the module and its weights, mapped into the host's memory; a CPU reads its weights there.
        weights: Taken on the device when the model was loaded, as its allocator counts (of a device that several
            programs load onto at once, theirs too): the weights on a GPU, on the CPU those that are packed anew.
        workspace: For intermediate values, inputs and outputs of calls, shared by all sessions, taken so far.
        session: Of one new session of `batch` rows: its states, and as much again as they are written anew by a call.
            With an open context, its caches of no rows.
        batch: Rows of such a session: the module's batch, else 1.
        held: By all sessions and snapshots that there are now; what they share counts once.
        kept: By nobody: of sessions and snapshots that are gone, for the next ones; `Program.trim` frees it.
    """

    device: str
    files: int
    weights: int
    workspace: int
    session: int
    batch: int
    held: int
    kept: int
