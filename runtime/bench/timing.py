"""Timing of calls inside a subject's process, and statistics over the samples."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence

MAX_CALLS = 20_000
_QUIET_WINDOW = 0.005
_QUIET_LIMIT = 1.0


def timed(call: Callable[[], object], seconds: float, warmup: int, warmup_seconds: float = 0.02) -> list[float]:
    """Calls until the time is used up, at least once, after a warm-up.

    Args:
        call: One synchronous call: when it returns, its results are there.
        seconds: Time to spend on timed calls.
        warmup: Least number of untimed calls before.
        warmup_seconds: Least time of untimed calls, so that clocks and caches settle for short calls.

    Returns:
        Seconds of each timed call.
    """
    warm_up(call, warmup, warmup_seconds)
    samples: list[float] = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        deadline = time.perf_counter() + seconds
        while True:
            start = time.perf_counter()
            call()
            end = time.perf_counter()
            samples.append(end - start)
            if end >= deadline or len(samples) >= MAX_CALLS:
                return samples
    finally:
        if collecting:
            gc.enable()


def warm_up(call: Callable[[], object], least: int, seconds: float = 0.02) -> int:
    """Calls without timing.

    Args:
        call: One synchronous call.
        least: Number of calls at least.
        seconds: Time at least.

    Returns:
        How often it was called.
    """
    start, count = time.perf_counter(), 0
    while count < least or (time.perf_counter() - start < seconds and count < MAX_CALLS):
        call()
        count += 1
    return count


def settle() -> float:
    """Waits until this process uses no CPU: thread pools spin after a call and would slow the next subject down.

    Returns:
        Seconds waited; about a second where the threads never stop.
    """
    start = time.perf_counter()
    while time.perf_counter() - start < _QUIET_LIMIT:
        used = time.process_time()
        time.sleep(_QUIET_WINDOW)
        if time.process_time() - used < _QUIET_WINDOW / 10:
            break
    return time.perf_counter() - start


def quantile(ordered: Sequence[float], q: float) -> float:
    """The smallest sample that at least a share q of the samples does not exceed (nearest rank)."""
    return ordered[max(math.ceil(q * len(ordered)) - 1, 0)]


def median(samples: Sequence[float]) -> float:
    """The middle sample, or the mean of the two in the middle."""
    ordered = sorted(samples)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def summarize(samples: Sequence[float]) -> dict[str, float | int]:
    """n, min, mean, deviation, median, p90, p95, p99 and max of samples in seconds.

    >>> summarize([3.0, 1.0, 2.0])["median"]
    2.0
    """
    ordered = sorted(samples)
    mean = sum(ordered) / len(ordered)
    return {
        "n": len(ordered),
        "min": ordered[0],
        "mean": mean,
        "deviation": math.sqrt(sum((sample - mean) ** 2 for sample in ordered) / len(ordered)),
        "median": median(ordered),
        "p90": quantile(ordered, 0.9),
        "p95": quantile(ordered, 0.95),
        "p99": quantile(ordered, 0.99),
        "max": ordered[-1],
    }
