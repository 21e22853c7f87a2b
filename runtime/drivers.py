"""What IREE's drivers find on this machine, asked without opening a device.

Facts about IREE 3.13.0 that shape this file:

* A driver whose library is missing fails when it is asked for; one without devices may fail or list none.
* Vulkan lists devices that it cannot open; ``feature_tier`` of `dump_device_info` says so, with what they miss.
* The Vulkan driver replays a command buffer that IREE keeps from call to call without looking whether the buffers that
  it copies between are still the same; keeping native command buffers is switched off.
* A forked child has its parent's drivers but not their threads: freeing one waits for ever, so the child keeps them for
  good. The CPU's can be started anew; no GPU's driver promises that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import iree.runtime as _untyped_rt  # pyright: ignore[reportMissingTypeStubs]
import iree.runtime.flags as _untyped_flags  # pyright: ignore[reportMissingTypeStubs]

from .owned import never_free

_rt: Any = cast(Any, _untyped_rt)
_flags: Any = cast(Any, _untyped_flags)

_flags.parse_flags("--vulkan_cached_bda_replay_instances=0")  # of the process, before its first Vulkan driver

DEVICE_URIS = {"cpu": "local-task", "cuda": "cuda", "vulkan": "vulkan"}
"""Target -> the device that runs it where nobody names one."""
DRIVERS = ("local-task", "local-sync", "cuda", "vulkan", "hip")
CPU_DRIVERS = ("local-task", "local-sync")
"""IREE drivers that run on the CPU."""
DRIVER_ERRORS = (RuntimeError, ValueError, NotImplementedError)
"""What IREE's functions raise where a driver or a device does not work."""
_UNUSABLE = "[below baseline]"  # at the end of a Vulkan device's name, by IREE's driver
INSTALL_HINTS = {
    "vulkan": "install a Vulkan driver (Debian and Ubuntu: apt-get install mesa-vulkan-drivers libvulkan1)",
    "cuda": "install the NVIDIA driver (libcuda.so)",
}


_started: set[str] = set()
_of_parent: set[str] = set()


def get_driver(name: str) -> Any:
    """IREE's driver of a name, started once for a process.

    Raises:
        RuntimeError: It cannot start; see `DRIVER_ERRORS` for what else IREE may raise.
    """
    if is_of_parent(name):
        raise RuntimeError("started before this process was forked")
    _started.add(name)
    return _rt.get_driver(name)


def has_worker_threads(name: str) -> bool:
    """Whether a device (see `open_device`) runs on CPU worker threads of the process."""
    return DEVICE_URIS.get(name, name).partition("://")[0] == "local-task"


def is_of_parent(name: str) -> bool:
    """Whether a driver cannot be used since the parent, of which this process was forked, had started it."""
    return name in _of_parent and name not in CPU_DRIVERS


def _forget_in_child() -> None:
    for name in _started:
        try:
            never_free(_rt.get_driver(name))
        except DRIVER_ERRORS:  # it never started
            continue
    _rt._binding.disable_leak_checker()  # which would report just these at the end
    _rt._binding.clear_hal_driver_cache()
    _of_parent.update(_started)
    _started.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


@dataclass(frozen=True)
class VulkanFacts:
    """What a Vulkan device says about itself.

    Attributes:
        kind: `discrete-gpu` | `integrated-gpu` | `virtual-gpu` | `cpu` (software) | `other` | `unknown`.
        missing: What IREE needs and the device lacks; empty if it can be opened.
        subgroup_sizes: Least and most lanes of a subgroup, None if unknown.
    """

    kind: str = "unknown"
    missing: tuple[str, ...] = ()
    subgroup_sizes: tuple[int, int] | None = None


@dataclass(frozen=True)
class Listed:
    """A device as its driver lists it.

    Attributes:
        uri: IREE device URI.
        name: For people.
        number: What the driver calls it in this process.
    """

    uri: str
    name: str
    number: int


def find_devices(driver: str) -> list[Listed]:
    """Each device that a driver finds.

    Raises:
        RuntimeError: The driver cannot start; see `DRIVER_ERRORS` for what else IREE may raise.
    """
    infos = cast(list[dict[str, Any]], get_driver(driver).query_available_devices())
    return [
        Listed(f"{driver}://{info['path']}" if info["path"] else driver, str(info["name"]), int(info["device_id"]))
        for info in infos
    ]


def list_devices(driver: str) -> list[tuple[str, str]]:
    """`(URI, description)` of each device that a driver finds; empty where the driver cannot start."""
    try:
        return [(device.uri, device.name) for device in find_devices(driver)]
    except DRIVER_ERRORS:
        return []


def default_uri(found: Iterable[tuple[str, str]]) -> str | None:
    """Which of a driver's devices IREE opens where only the driver is named: the first that it can use."""
    return next((uri for uri, name in found if _UNUSABLE not in name), None)


def vulkan_facts(device: Listed) -> VulkanFacts:
    """What a Vulkan device says about itself; nothing where the driver does not tell."""
    try:
        text = str(get_driver("vulkan").dump_device_info(device.number))
    except DRIVER_ERRORS:
        return VulkanFacts()
    kind = re.search(r"^type: (\S+)$", text, re.MULTILINE)
    missing = re.findall(r"^ +missing: (.+)$", text, re.MULTILINE)
    sizes = re.search(r"minSubgroupSize=(\d+) maxSubgroupSize=(\d+)", text)
    range_ = (int(sizes[1]), int(sizes[2])) if sizes else None
    return VulkanFacts(kind[1] if kind else "unknown", tuple(missing), range_)


def subgroup_sizes(uri: str) -> tuple[int, int] | None:
    """Least and most lanes of a subgroup on a Vulkan device (lavapipe: 8, 8); None if unknown or another driver."""
    driver, _, path = uri.partition("://")
    try:
        found = find_devices("vulkan") if driver == "vulkan" else []
    except DRIVER_ERRORS:
        return None
    wanted = uri if path else default_uri((device.uri, device.name) for device in found)
    device = next((device for device in found if device.uri == wanted), None)
    return None if device is None else vulkan_facts(device).subgroup_sizes


def one_line(error: BaseException) -> str:
    """The first line of an IREE error, without source positions and cut to 200 characters."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = re.sub(r"\S*\.(?:c|cc|h):\d+: ", "", text)
    return text if len(text) <= 200 else text[:197] + "..."
