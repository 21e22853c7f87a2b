"""`linattn-bench model --profile`: what each dispatch of an entry point takes, in a table.

IREE's own tools measure: `iree-benchmark-module` runs the entry point on random tokens with its HAL profiling on,
`iree-profile` reads what it wrote. The module says which ONNX node a dispatch comes from, its bytes and operations.
CPU devices give the time from a dispatch's first to its last workgroup, GPUs their own timestamps. IREE 3.13 has no
such thing for CUDA: there PyTorch's profiler watches the calls of a subject.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linattn.runtime.drivers import CPU_DRIVERS
from linattn.runtime.errors import TargetError
from linattn.runtime.manifest import DISPATCHES_KEY, EntryPoint, Manifest
from linattn.runtime.module import Module
from linattn.runtime.state import state_shape

from .device_times import EVENTS, argument, memory_arguments, run_tool, zeros
from .model_runners import profiled_inputs
from .subjects import start

CALLS = 10
"""Calls of an entry point that count."""
WARMUP_SECONDS = 1.0
"""Calls before them: a GPU takes its time to raise its clocks for Vulkan, to three times as fast on an H100."""
CPU_WARMUP_SECONDS = 0.1
"""The same on CPUs; each call of it is recorded and read as well, and a small model does 20,000 in a second."""

Dispatches = list[tuple[str, float]]
"""The dispatches of one call in their order: key and seconds."""


def profile_entry(
    path: Path, manifest: Manifest, entry: EntryPoint, position: int, device: str, threads: int | None, folder: Path
) -> dict[str, Any]:
    """Profiles one entry point.

    Args:
        path: The module.
        manifest: Its manifest.
        entry: The entry point.
        position: Tokens committed, for modules whose caches have a fixed capacity.
        device: IREE device URI.
        threads: CPU worker threads; None: as IREE decides.
        folder: For the profile's file.

    Returns:
        `entry`, `tokens`, `position`, `calls` (profiled), `dispatch_s` (the sum), `count` (dispatches of a call) and
        `rows`, the slowest first: `key`, `count` (a call), `seconds` (a call), `share`, `bytes`, `flop` (a call; None
        where unknown), `dtype` (of the largest operand), `nodes` and
        `kernels` (the names of those in a joined dispatch).

    Raises:
        TargetError: The tools are missing, or the driver does not profile; one line says so.
    """
    symbol = entry.last or entry.symbol  # what a prompt runs
    position = position if manifest.max_context is not None else 0  # an open cache starts empty
    described = _described(Module(path), symbol)
    if device.partition("://")[0] == "cuda":
        calls = _watched(path, entry, position, device, described)
    else:
        calls = _recorded(path, manifest, entry, position, device, threads, folder)
    return {"entry": symbol, "tokens": entry.tokens, "position": position} | _rows(calls[-CALLS:], described)


def _watched(
    path: Path, entry: EntryPoint, position: int, device: str, described: Mapping[str, list[dict[str, Any]]]
) -> list[Dispatches]:
    """The kernels of calls in a subject's process; CUDA's names of them have no other signs than underscores."""
    keys = {re.sub(r"\W", "_", key): key for key in described}
    subject = start("profile", "model_runners:IreeModel", {"module": str(path), "device": device})
    try:
        calls: list[Dispatches] = subject.call("kernels", symbol=entry.symbol, position=position, calls=2 * CALLS)
    finally:
        subject.close()
    return [[(keys.get(name, name), seconds) for name, seconds in call] for call in calls]


def _recorded(
    path: Path, manifest: Manifest, entry: EntryPoint, position: int, device: str, threads: int | None, folder: Path
) -> list[Dispatches]:
    """The dispatches that IREE's profiler records."""
    symbol = entry.last or entry.symbol
    output = folder / f"{symbol}.ireeprof"
    driver = device.partition("://")[0]
    family = EVENTS.get(driver, "dispatch-events")  # a driver that has none says so
    command = [
        f"--module={path}",
        f"--device={device}",
        f"--function={symbol}",
        f"--benchmark_min_time={CALLS}x",
        f"--benchmark_min_warmup_time={CPU_WARMUP_SECONDS if driver in CPU_DRIVERS else WARMUP_SECONDS}",
        "--benchmark_format=json",
        f"--device_profiling_mode=queue-events,{family},executable-metadata",
        f"--device_profiling_output={output}",
        *_inputs(manifest, entry, position, folder),
        *memory_arguments(Module(path), symbol),
    ]
    if manifest.parameters is not None:
        command.append(f"--parameters={manifest.parameters.scope}={path.parent / manifest.parameters.file}")
    if threads is not None:
        command.append(f"--task_topology_group_count={threads}")
    run_tool("iree-benchmark-module", *command)
    lines = run_tool("iree-profile", "dispatch", "--dispatch_events", "--format=jsonl", str(output))
    calls: dict[int, list[dict[str, Any]]] = {}
    for line in lines.splitlines():
        event = json.loads(line)
        if event["type"].endswith("dispatch_event") and event.get("valid", True):
            calls.setdefault(event["submission_id"], []).append(event)
    if not calls:
        hint = "its driver records no dispatches in this release of IREE"
        raise TargetError("nothing was profiled", where=f"{device}: {symbol}", hint=hint)
    ordered = [sorted(calls[number], key=lambda event: event["command_index"]) for number in sorted(calls)]
    return [[(event["key"], event["duration_ns"] * 1e-9) for event in events] for events in ordered]


def _inputs(manifest: Manifest, entry: EntryPoint, position: int, folder: Path) -> list[str]:
    """Arguments in the order of the ABI; the states are zeros."""
    arrays = zip(manifest.inputs, profiled_inputs(manifest, entry, position), strict=True)
    arguments = [argument(folder / f"{i}.bin", array, spec.dtype) for i, (spec, array) in enumerate(arrays)]
    for spec in manifest.states:
        shape = state_shape(manifest, spec, manifest.batch or 1, manifest.max_context or 0)
        arguments.append(zeros(shape, spec.dtype))
    return [*arguments, f"--input={position}"] if manifest.takes_position else arguments


def _rows(calls: Sequence[Dispatches], described: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The dispatches of several calls as rows of one call."""
    times: dict[tuple[str, int], list[float]] = {}
    for call in calls:
        for index, (key, seconds) in enumerate(call):
            times.setdefault((key, index), []).append(seconds)
    rows: dict[str, dict[str, Any]] = {}
    for (key, _), seconds in times.items():
        row = rows.setdefault(key, {"key": key, "count": 0, "seconds": 0.0})
        row["count"] += 1
        row["seconds"] += statistics.median(seconds)
    total = sum(row["seconds"] for row in rows.values())
    for key, row in rows.items():
        known = described.get(key, [])
        for field in ("bytes", "flop"):
            values = [item[field] for item in known]
            complete = len(values) == row["count"] and None not in values
            row[field] = sum(values) if complete else None
        row["dtype"] = known[0].get("dtype") if known else None
        row["kernels"] = [kernel["key"] for item in known[:1] for kernel in item.get("kernels", ())]
        row["nodes"] = list(dict.fromkeys(item["node"] for item in known if item["node"]))
        row["share"] = row["seconds"] / total if total else 0.0
    ordered = sorted(rows.values(), key=lambda row: -row["seconds"])
    return {"calls": len(calls), "dispatch_s": total, "count": sum(r["count"] for r in ordered), "rows": ordered}


def _described(module: Module, symbol: str) -> dict[str, list[dict[str, Any]]]:
    """What the module says about the dispatches of an entry point, by key; empty if it says nothing."""
    texts = [module.reflection(name).get(DISPATCHES_KEY) for name in module.functions]
    table = json.loads(next((text for text in texts if text), "{}"))
    found: dict[str, list[dict[str, Any]]] = {}
    for row in table.get(symbol, []):
        found.setdefault(row["key"], []).append(row)
    return found
