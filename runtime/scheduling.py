"""How a thread that waits for CPU workers is scheduled: being woken shall not hold up the worker that wakes it.

IREE 3.13 wakes the caller from within a worker and has it spin until that worker is out of its callback. Where the
caller is put on that worker's CPU, it spins until the scheduler's next tick: up to 4 ms, in a fourth of the calls on 2
CPUs that the call keeps busy. A thread of Linux's SCHED_BATCH waits for its turn instead, if it has become one for this
call: one that stays in SCHED_BATCH is held up as often as any.
"""

from __future__ import annotations

import os
from typing import Any

NO_PRIORITY: Any = os.sched_param(0) if hasattr(os, "SCHED_BATCH") else None
"""What Linux's ordinary scheduling policies want to be told; None on other systems."""


def is_ordinary_thread() -> bool:
    """Whether this thread's scheduling is Linux's ordinary one, which any thread may leave and come back to."""
    return NO_PRIORITY is not None and os.sched_getscheduler(0) == os.SCHED_OTHER


def set_policy(policy: int) -> None:
    """SCHED_BATCH before a wait for CPU workers, SCHED_OTHER after it."""
    try:
        os.sched_setscheduler(0, policy, NO_PRIORITY)
    except OSError:  # not allowed here; calls are only slower
        return
