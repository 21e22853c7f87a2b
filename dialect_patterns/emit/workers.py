"""How IREE's workers share the workgroups of a dispatch, for kernels that choose how many they have."""

from __future__ import annotations

_WORKERS = (2, 4, 8, 16)  # threads to be good for
_BATCH = 8  # workgroups that a worker takes at once, where there are as many for each (IREE 3.13)


def slowest_share(workgroups: int, cost: float) -> float:
    """What all workers would do together if each did as much as the slowest; a mean over numbers of workers.

    Args:
        workgroups: How many, all alike.
        cost: Of one.
    """
    return sum(_most(workgroups, workers) * workers for workers in _WORKERS) * cost / len(_WORKERS)


def _most(workgroups: int, workers: int) -> int:
    """Workgroups of one worker."""
    batch = _BATCH if workgroups >= _BATCH * workers else 1
    batches, rest = divmod(workgroups, batch)
    each, more = divmod(batches, workers)
    return (each + 1) * batch if more else each * batch + rest
