"""Which calls are so small that the thread that calls is done with them sooner than CPU workers.

Workers share a kernel's work, but they are woken for each one, and the caller when they are done. What that takes
against what it saves was measured on 2 cores of an AMD EPYC (Zen 4, 32 MiB of third-level cache), 26 November 2026:
models of 3 to 24 layers, hidden sizes of 64 to 768, in f32, f16, bf16 and int4, `Session.run` of 1 to 64 tokens on
`local-task` and on `local-sync`. Where the rule below is wrong, the two differ by about a tenth there. More cores
save more, up to twice as much, and more of them are woken. What is more than a second-level cache is slower to read on
other machines: LinearAttention's step takes on 2 cores of a Sapphire Rapids with 16 heads (2.1 MB) 63 us by workers and
80 alone, with 32 heads 134 and 232, on the Zen 4 148 and 55 (47 when nothing else runs), 183 and 83 (115 and 81).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from linattn.runtime.device import numpy_dtype
from linattn.runtime.manifest import EntryPoint, Manifest
from linattn.runtime.state import state_shape

CALL_US, KERNEL_US = 50.0, 1.5
"""What workers take longer: for a call, and for each of its kernels."""
SAVED = 0.5
"""What they save of the kernels' time."""
RATES = {"sse4a": ((24 << 20, 50e3),), "": ((3 << 20, 50e3), (24 << 20, 35e3))}
UNCACHED = 25e3
"""Bytes that one core reads in a microsecond: of what fits into its own caches, into the shared one, and of more. By an
instruction set that tells whose machine it is (AMD's read the shared cache as fast as their own), and of all others."""
FLOP = 100e3
"""Operations of one core in a microsecond."""
CHUNK = 8
"""Tokens of which more make a kernel slower by as much, where its operations are not known."""
JOINED_BYTES = 1 << 20
"""Of a dispatch that others of such a call are not joined with: where `device=` has workers run it, they share it."""
ANY_POSITION = 1 << 31
"""`EntryPoint.alone` where no number of committed tokens makes a call slower: the largest that a manifest takes."""

Rows = Sequence[Mapping[str, Any]]
"""The dispatches of a function, as `describe_dispatches` tells them."""


def with_alone(manifest: Manifest, table: Mapping[str, Rows]) -> Manifest:
    """The manifest with `EntryPoint.alone` of each entry point.

    Args:
        manifest: Of a CPU's module whose functions take the memory of their results.
        table: Function -> its dispatches.
    """
    caches = [
        math.prod(state_shape(manifest, spec, manifest.batch or 1, manifest.max_context or 0))
        * numpy_dtype(spec.dtype).itemsize
        for spec in manifest.states
        if spec.in_place
    ]
    token_bytes = sum(caches) / (manifest.max_context or 1)
    rates = next(rates for name, rates in RATES.items() if not name or name in manifest.target.instruction_sets)

    def alone(entry: EntryPoint) -> int:
        tokens = _rows(manifest) if entry.kind == "main" else entry.tokens
        rows = [table.get(name, ()) for name in entry.symbols]
        return min(positions_alone(one, tokens, sum(caches), token_bytes, rates) for one in rows)

    entries = tuple(dataclasses.replace(entry, alone=alone(entry)) for entry in manifest.entry_points)
    return dataclasses.replace(manifest, entry_points=entries)


def joins(manifest: Manifest, table: Mapping[str, Rows]) -> Callable[[str, str], bool]:
    """Which dispatches may be joined: those of calls that one thread runs, as far as workers have no use for them.

    Args:
        manifest: With what `with_alone` says.
        table: Function -> its dispatches.
    """
    small = {name for entry in manifest.entry_points if entry.alone for name in entry.symbols}
    found = {(name, row["key"]) for name in small for row in table.get(name, ()) if (row["bytes"] or 0) <= JOINED_BYTES}
    return lambda function, key: (function, key) in found


def _rows(manifest: Manifest) -> int | None:
    """The rows of the largest input, at least as many as tokens, where a model does not tell these; None where open."""
    sizes = [size for spec in manifest.inputs for size in spec.shape[:-1]]
    if not all(isinstance(size, int) for size in sizes):
        return None
    return max((math.prod(int(size) for size in spec.shape[:-1]) for spec in manifest.inputs), default=1)


def positions_alone(
    rows: Rows,
    tokens: int | None,
    cache_bytes: float,
    token_bytes: float,
    rates: Sequence[tuple[int, float]] = RATES[""],
) -> int:
    """Committed tokens below which a function is done sooner by the thread that calls.

    Args:
        rows: Its dispatches, of which those that attend read whole caches.
        tokens: Of a call.
        cache_bytes: Of the caches.
        token_bytes: Of one committed token in them.
        rates: One of `RATES`.
    """
    if not rows or tokens is None or any(row["bytes"] is None for row in rows):
        return 0
    size = sum(row["bytes"] for row in rows)
    rate = next((rate for most, rate in rates if size <= most), UNCACHED)
    longer = max(1.0, tokens / CHUNK)
    fixed = sum(
        max(row["bytes"] / rate, row["flop"] / FLOP) if row["flop"] is not None else row["bytes"] / rate * longer
        for row in rows
        if "kernels" not in row  # joined ones are one thread's in any case
    )
    fixed = max(fixed - cache_bytes / rate * longer, 0.0)
    room = (CALL_US + KERNEL_US * len(rows)) / SAVED - fixed
    if room <= 0 or not token_bytes:
        return ANY_POSITION if room > 0 else 0
    return min(int(room / (token_bytes / rate * longer)), ANY_POSITION)


def describe_alone(manifest: Manifest) -> list[str]:
    """A line for people about each entry point that the calling thread runs."""
    lines: list[str] = []
    for entry in manifest.entry_points:
        limit = manifest.max_context
        if entry.alone:
            some = limit is not None and entry.alone < limit
            until = f" up to position {entry.alone}" if some else ""
            lines.append(f"{entry.symbol}{until}")
    return lines
