"""What the CPU did while something was timed: how many threads worked, and what other processes took away."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .machine import core_count

_WORKED = 0.05
"""Of the time: what a thread must have worked to be counted."""
_SPOILED = 0.05
"""Of the cores: what others may take before a result says so."""
_LEAST_SECONDS = 0.1
"""The system counts in hundredths of a second; of shorter times it tells nothing."""


class Watch:
    """Looks at the CPU's counters before and after what is timed; several times add up."""

    def __init__(self) -> None:
        self._wall = self._own = self._busy = 0.0
        self._threads: dict[str, float] = {}

    @contextmanager
    def watching(self) -> Generator[None]:
        """Around what is timed."""
        busy, threads = _busy_seconds(), _thread_seconds()
        own, start = _own_seconds(), time.perf_counter()
        try:
            yield
        finally:
            self._wall += time.perf_counter() - start
            self._own += _own_seconds() - own
            for thread, seconds in _thread_seconds().items():
                self._threads[thread] = self._threads.get(thread, 0.0) + seconds - threads.get(thread, 0.0)
            after = _busy_seconds()
            self._busy = self._busy + after - busy if after is not None and busy is not None else -1.0

    def summary(self) -> dict[str, Any]:
        """What was seen.

        Returns:
            `threads` that worked, `cores_used` by this process and `cores_of_others` (means over the time), and whether
            that `spoiled` the result; null where the system does not tell, or the time was too short to say.
        """
        if self._wall < _LEAST_SECONDS:
            return {"threads": None, "cores_used": None, "cores_of_others": None, "spoiled": None}
        threads = sum(seconds >= _WORKED * self._wall for seconds in self._threads.values())
        others = max(self._busy - self._own, 0.0) / self._wall if self._busy >= 0 else None
        return {
            "threads": threads or None,
            "cores_used": round(self._own / self._wall, 2),
            "cores_of_others": None if others is None else round(others, 2),
            "spoiled": None if others is None else others > _SPOILED * core_count(),
        }


def _own_seconds() -> float:
    """CPU seconds of this process, and of those that it started and that have ended."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def _busy_seconds() -> float | None:
    """Seconds that the cores which this process may use have worked, for anybody."""
    stat = Path("/proc/stat")
    if not stat.exists() or not hasattr(os, "sched_getaffinity"):
        return None
    mine, ticks = {f"cpu{core}" for core in os.sched_getaffinity(0)}, 0
    for line in stat.read_text().splitlines():
        name, *counts = line.split()
        if name in mine:
            user, nice, system, _idle, _waiting, *more = map(int, counts)
            ticks += user + nice + system + sum(more[:3])  # interrupts, and what other virtual machines took
    return ticks / os.sysconf("SC_CLK_TCK")


def _thread_seconds() -> dict[str, float]:
    """CPU seconds of each thread of this process; empty where the system does not list them."""
    found: dict[str, float] = {}
    for path in Path("/proc/self/task").glob("*/stat"):
        try:
            counts = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        found[path.parent.name] = (int(counts[11]) + int(counts[12])) / os.sysconf("SC_CLK_TCK")
    return found
