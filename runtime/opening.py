"""Opens devices, each once for a process.

Facts about IREE 3.13.0 that shape this file (each has a test):

* A forked child has the devices but not their threads: a call would wait for ever, and so would freeing a device, at
  the interpreter's end too. `_forget_in_child` leaves them alone for good.
* Vulkan devices are named by UUID, not by number; `vulkan://1` is the second device listed, resolved here.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
from pathlib import Path
from typing import Any, cast

import iree.runtime.flags as _untyped_flags  # pyright: ignore[reportMissingTypeStubs]

from .cuda_context import ThreadContext
from .device import Device
from .drivers import (
    CPU_DRIVERS,
    DEVICE_URIS,
    DRIVER_ERRORS,
    DRIVERS,
    INSTALL_HINTS,
    default_uri,
    get_driver,
    has_worker_threads,
    is_of_parent,
    list_devices,
    one_line,
)
from .errors import InputError, TargetError
from .owned import never_free

_flags: Any = cast(Any, _untyped_flags)

_NICE = 10
_SAMPLES, _SAMPLE_SECONDS = 3, 0.004

_open_devices: dict[str, Device] = {}
_started: set[str] = set()
_worker_threads: int | None = None
_open_lock = threading.Lock()


def _forget_in_child() -> None:
    global _open_lock, _worker_threads
    _open_lock = threading.Lock()  # another thread of the parent may have held it
    for device in _open_devices.values():
        never_free(device._semaphores)  # pyright: ignore[reportPrivateUsage]
        never_free(device._hal_device)  # pyright: ignore[reportPrivateUsage]
    _open_devices.clear()
    _started.clear()
    _worker_threads = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
atexit.register(_open_devices.clear)  # the interpreter keeps what forks call, and with it this module, beyond its end


def open_device(name: str, threads: int | None = None) -> Device:
    """Opens a device, or returns it where this process has opened it already.

    Args:
        name: `cpu`, `cuda`, `vulkan`, or an IREE device URI such as `local-sync`, `cuda://0`, `vulkan://GPU-6d65...`;
            a number after `://` counts the devices in `list_devices` order.
        threads: CPU worker threads, of `local-task` only; None: one for each physical core, or as many as there are.
            IREE starts them once for a process: the first to open the device decides.

    Raises:
        TargetError: There is no such device; the message lists those there are, or what to install.
        InputError: The device has no worker threads, or another number of them already.
    """
    global _worker_threads
    uri = DEVICE_URIS.get(name, name)
    driver, _, path = uri.partition("://")
    if driver not in DRIVERS:
        expected = f"cpu | cuda | vulkan | an IREE URI ({', '.join(DRIVERS)})"
        raise TargetError("unknown device", got=repr(name), expected=expected)
    if threads is not None and (not has_worker_threads(uri) or threads < 1):
        expected = "a positive number" if has_worker_threads(uri) else f"none: {driver} has no worker threads to set"
        raise InputError("cannot be set", where="threads", got=threads, expected=expected)
    if is_of_parent(driver):
        hint = "start this process with multiprocessing's 'spawn' method, or let the child alone open the GPU"
        raise TargetError("a GPU's driver was started before this process was forked", where=uri, hint=hint)
    with _open_lock:
        if driver == "local-task" and "local-task" not in _started:
            _worker_threads = threads
            if threads is not None:
                _flags.parse_flags(f"--task_topology_group_count={threads}")
        elif threads not in (None, _worker_threads):
            got = f"{threads}, but {_worker_threads or 'one for each core'} were started"
            hint = "IREE starts the CPU's worker threads once for a process; set them where the first model is loaded"
            raise InputError("cannot be changed", where="threads", got=got, hint=hint)
        _started.add(driver)
        if uri not in _open_devices:
            _open_devices[uri] = _open(uri, driver, path)
        return _open_devices[uri]


def _open(uri: str, driver: str, path: str) -> Device:
    found = list_devices(driver)
    if path.isdecimal():
        if int(path) >= len(found):
            raise _missing(uri, driver, found, None)
        uri = found[int(path)][0]
    default = default_uri(found)
    if uri == default:  # it has two names, and is opened once
        uri = driver
    if uri in _open_devices:
        return _open_devices[uri]
    threads = _threads()
    try:
        hal_device = get_driver(driver).create_device_by_uri(uri)
    except DRIVER_ERRORS as error:
        raise _missing(uri, driver, found, error) from error
    if driver in CPU_DRIVERS:
        return Device(uri, hal_device, f"{os.cpu_count()} CPU threads")
    listed = (default or uri) if uri == driver else uri
    name = dict(found).get(listed, uri)
    if "llvmpipe" in name:
        _make_nice(_threads() - threads)
    context = None
    if driver == "cuda":
        context = ThreadContext(next((i for i, (known, _) in enumerate(found) if known == listed), 0))
    device = _open_devices[uri] = Device(uri, hal_device, name, context)
    return device


def _threads() -> set[int]:
    """The threads of this process; empty where the system does not list them."""
    tasks = Path("/proc/self/task")
    return {int(task.name) for task in tasks.iterdir()} if tasks.is_dir() else set()


def _make_nice(threads: set[int]) -> None:
    """Lets the others go first of those threads that spin.

    IREE's queue threads wait for any of several semaphores, and Mesa's software driver waits for that by spinning: two
    cores are busy as long as the device is open, which slows down the driver's own workers most of all. They also
    submit the work, so a machine that others keep busy must still let them come to it: with the lowest priority, 19,
    calls took several times as long there as with none; 10 lies between (few calls, an uncontrolled load).
    """
    spinning = set(threads)
    for _ in range(_SAMPLES):
        time.sleep(_SAMPLE_SECONDS)
        spinning = {thread for thread in spinning if _is_runnable(thread)}
    for thread in spinning:
        with contextlib.suppress(OSError):  # it has ended, or the system does not let us
            os.setpriority(os.PRIO_PROCESS, thread, _NICE)


def _is_runnable(thread: int) -> bool:
    try:
        return Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()[0] == "R"
    except OSError:
        return False


def _missing(uri: str, driver: str, found: list[tuple[str, str]], error: BaseException | None) -> TargetError:
    if found:
        listed = ", ".join(f"{found_uri} ({name})" for found_uri, name in found)
        return TargetError("no such device", got=uri, expected=listed)
    reason = f" ({one_line(error)})" if error else ""
    hint = INSTALL_HINTS.get(driver, "name another device") + reason
    return TargetError("no such device", got=uri, hint=hint)
