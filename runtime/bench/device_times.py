"""Kernel times by the device's own clock: IREE's profiler around repeated calls of one function.

The tools are the ones that iree-base-runtime ships: `iree-benchmark-module` calls and records, `iree-profile` reads the
recording. Vulkan devices put timestamps around every dispatch, CPU devices note when a dispatch starts and ends. IREE
3.13 has nothing of the kind for CUDA; PyTorch's profiler, where it is installed, sees every kernel of the process.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from linattn.runtime.device import HostArray
from linattn.runtime.errors import TargetError
from linattn.runtime.module import Module

from .lazy import need
from .permission import environment

# Driver -> the kind of events that tell how long a dispatch took.
EVENTS = {"vulkan": "dispatch-events", "local-task": "host-execution", "local-sync": "host-execution"}
_ELEMENT_TYPES = {
    "float32": "f32", "float16": "f16", "bfloat16": "bf16", "int64": "i64", "int32": "i32", "bool": "i1",
    "int16": "i16", "int8": "i8", "float64": "f64", "uint64": "i64", "uint32": "i32", "uint16": "i16", "uint8": "i8",
}  # fmt: skip
_TIMEOUT = 600.0


def call_seconds(
    module: Path,
    uri: str,
    function: str,
    inputs: Sequence[tuple[HostArray, str]],
    memory: Sequence[str],
    calls: int,
    warmup: int = 0,
    threads: int | None = None,
) -> list[float]:
    """How long all dispatches of a call took, for each of several calls in a process of their own.

    Args:
        module: The `.vmfb`, its weights inside.
        uri: IREE device URI.
        function: Exported function, which takes arrays only.
        inputs: Its arguments, each with the name of its element type.
        memory: Arguments of `memory_arguments`.
        calls: How many.
        warmup: Calls before them.
        threads: CPU worker threads; None: as IREE decides.

    Returns:
        Seconds of each call, without the gaps between its dispatches.

    Raises:
        TargetError: The driver tells no times, or the tools failed.
    """
    events = EVENTS.get(_driver(uri))
    if events is None:
        raise TargetError("IREE 3.13 tells no times of single dispatches there", where=uri)
    with tempfile.TemporaryDirectory(prefix="linattn-bench-") as name:
        folder = Path(name)
        recording = folder / "calls.ireeprof"
        arguments = [argument(folder / f"{i}.bin", array, dtype) for i, (array, dtype) in enumerate(inputs)]
        command = [f"--module={module}", f"--device={uri}", f"--function={function}", *arguments, *memory]
        command += [f"--benchmark_min_time={warmup + calls}x", f"--device_profiling_mode={events}"]
        command += [f"--task_topology_group_count={threads}"] if threads is not None else []
        run_tool("iree-benchmark-module", *command, f"--device_profiling_output={recording}")
        text = run_tool("iree-profile", "dispatch", "--format=jsonl", "--dispatch_events", str(recording))
    return per_call(text, warmup + calls)[warmup:]


def memory_arguments(module: Module, function: str) -> list[str]:
    """Arguments of `iree-benchmark-module` for the memory of results and workspace, where a function takes it."""
    size = module.workspace_bytes(function)
    specs = [spec for spec in module.result_specs(function) or [] if spec is not None]
    return [] if size is None else [*(zeros(shape, dtype) for dtype, shape in specs), f"--input=&{size}xi8"]


def zeros(shape: Sequence[int], dtype: str) -> str:
    """Argument of `iree-benchmark-module` for an array of zeros."""
    return f"--input={'x'.join([*map(str, shape), _ELEMENT_TYPES[dtype]])}"


def cuda_call_seconds(call: Callable[[], object], calls: int) -> list[float]:
    """The same for CUDA: the kernels of calls in this process.

    Args:
        call: A synchronous call.
        calls: How many.

    Raises:
        TargetError: The kernels are not those of so many equal calls.
    """
    return [sum(seconds for _, seconds in kernels) for kernels in cuda_kernels(call, calls)]


def cuda_kernels(call: Callable[[], object], calls: int) -> list[list[tuple[str, float]]]:
    """The kernels of calls in this process, as PyTorch's profiler (CUPTI) sees them.

    Args:
        call: A synchronous call.
        calls: How many.

    Returns:
        For each call its kernels in the order in which they ran: name and seconds. Copies and fills are left out.

    Raises:
        TargetError: PyTorch is not installed, or the kernels are not those of so many equal calls.
    """
    profiler = need("torch.profiler", package="torch")
    with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as recorded:
        for _ in range(calls):
            call()
    on_device: list[Any] = [event for event in recorded.events() if "CUDA" in str(event.device_type)]
    kernels = [event for event in on_device if not event.name.startswith(("Memcpy", "Memset"))]
    if not kernels or len(kernels) % calls:
        raise TargetError("the recording is not complete", got=f"{len(kernels)} kernels", expected=f"of {calls} calls")
    kernels.sort(key=lambda event: event.time_range.start)
    found = [(str(event.name), float(event.time_range.elapsed_us()) * 1e-6) for event in kernels]
    size = len(found) // calls
    return [found[start : start + size] for start in range(0, len(found), size)]


def tells_times(device: str) -> bool:
    """Whether the times of single dispatches can be had on a device.

    Args:
        device: `cpu`, `cuda`, `vulkan` or an IREE device URI.
    """
    driver = _driver(device)
    return driver in EVENTS or (driver == "cuda" and importlib.util.find_spec("torch") is not None)


def _driver(device: str) -> str:
    name = device.partition("://")[0]
    return "local-task" if name == "cpu" else name


def per_call(text: str, calls: int) -> list[float]:
    """The events of a recording, summed call by call.

    Args:
        text: What `iree-profile dispatch --format=jsonl --dispatch_events` printed.
        calls: How many calls were recorded.

    Raises:
        TargetError: The events are not those of so many equal calls.
    """
    rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    events = [row for row in rows if row["type"] in ("dispatch_event", "host_dispatch_event")]
    if not events or len(events) % calls or not all(event["valid"] for event in events):
        raise TargetError("the recording is not complete", got=f"{len(events)} events", expected=f"of {calls} calls")
    events.sort(key=lambda event: event["event_id"])
    nanoseconds = np.array([event["duration_ns"] for event in events], np.float64)
    return [float(total) for total in nanoseconds.reshape(calls, -1).sum(axis=1) * 1e-9]


def argument(file: Path, array: HostArray, dtype: str) -> str:
    """Argument of `iree-benchmark-module` for an array, which goes to a file."""
    file.write_bytes(np.ascontiguousarray(array).tobytes())
    return f"{zeros(array.shape, dtype)}=@{file}"


def run_tool(tool: str, *arguments: str) -> str:
    """Runs one of the programs that iree-base-runtime brings; returns what it printed.

    Raises:
        TargetError: It is missing, fails or takes too long; with what it said.
    """
    spec = importlib.util.find_spec("iree._runtime_libs")
    places = list(spec.submodule_search_locations or []) if spec else []
    program = next((path for place in places if (path := Path(place) / tool).is_file()), None)
    if program is None:
        raise TargetError("not found", where=tool, hint="reinstall iree-base-runtime, which brings it")
    try:
        with tempfile.TemporaryDirectory(prefix="linattn-tool-") as folder:
            command, given = [program, *arguments], environment(Path(folder))
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT, check=False, env=given
            )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TargetError("cannot be run", where=tool, hint=" ".join(str(error).split())[:200]) from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
        telling = next((line for line in said if "UNIMPLEMENTED" in line or "INVALID" in line), said[-1])
        raise TargetError("failed", where=tool, hint=telling.rpartition(": ")[2][:200])
    return done.stdout
