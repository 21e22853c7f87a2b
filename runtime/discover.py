"""Which devices this machine has, best first, and why each other one is not taken; no device is opened for it."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from .cpu import describe_features
from .drivers import DEVICE_URIS, DRIVER_ERRORS, INSTALL_HINTS, Listed, find_devices, one_line, vulkan_facts

RANK = ("cuda", "vulkan", "cpu")
"""Targets, best first."""
_KINDS = ("discrete-gpu", "integrated-gpu", "virtual-gpu", "other", "unknown", "cpu")
SOFTWARE = 'it computes on the CPU: taken only if asked for (device="vulkan")'


@dataclass(frozen=True)
class FoundDevice:
    """A device that was found, or a target of which none was.

    Attributes:
        target: `cpu`, `cuda` or `vulkan`: what a module must be compiled for to run here.
        uri: What to give as `device=`; None: there is no such device.
        name: For people.
        kind: `discrete-gpu` | `integrated-gpu` | `virtual-gpu` | `cpu` | `other` | `unknown`; a Vulkan device of kind
            `cpu` is software.
        why_not: Why it is not the one that is taken where nobody names a device; None: it is.
        details: For people: a CPU's threads and instruction sets; what kind of a GPU, its subgroups.
    """

    target: str
    uri: str | None
    name: str
    kind: str
    why_not: str | None = None
    details: str = ""

    @property
    def is_software(self) -> bool:
        """Whether it is a GPU's driver that computes on the CPU."""
        return self.target == "vulkan" and self.kind == "cpu"


def devices() -> list[FoundDevice]:
    """The devices of this machine, best first: the first is what a model takes that is compiled for all of them.

    No driver has to be there, and none that is missing is an error: its row says what to install.
    """
    found = [device for target in RANK for device in look_for(target)]
    best = next(device for device in found if device.why_not is None)  # there is always a CPU
    rows = [
        dataclasses.replace(device, why_not=f"{best.uri} comes first")
        if device.why_not is None and device is not best
        else device
        for device in found
    ]
    return sorted(rows, key=lambda row: (row is not best, row.uri is None))


def look_for(target: str) -> list[FoundDevice]:
    """The devices of one target, best first; `why_not` is set for those that are not to be taken by themselves.

    Args:
        target: One of `RANK`.

    Returns:
        At least one row: where there is no device, one that says why.
    """
    if target == "cpu":
        details = f"{os.cpu_count()} threads, {describe_features()}"
        return [FoundDevice("cpu", DEVICE_URIS["cpu"], _cpu_name(), "cpu", details=details)]
    try:
        found = find_devices(target)
    except DRIVER_ERRORS as error:
        reason = re.sub(r"^Error [\w ]+: ([A-Z_]+; )?", "", one_line(error))
        return [FoundDevice(target, None, "", "unknown", f"no device ({reason}); {INSTALL_HINTS[target]}")]
    if not found:
        return [FoundDevice(target, None, "", "unknown", f"no device; {INSTALL_HINTS[target]}")]
    if target == "cuda":
        return [FoundDevice("cuda", device.uri, device.name, "discrete-gpu") for device in found]
    return sorted(map(_vulkan, found), key=lambda device: _KINDS.index(device.kind))


def _vulkan(device: Listed) -> FoundDevice:
    facts = vulkan_facts(device)
    kind = facts.kind if facts.kind in _KINDS else "unknown"
    why_not = f"IREE cannot use it, it lacks {', '.join(facts.missing)}" if facts.missing else None
    why_not = why_not or (SOFTWARE if kind == "cpu" else None)
    details = "software" if kind == "cpu" else kind
    if facts.subgroup_sizes:
        details += ", subgroups of " + " to ".join(map(str, dict.fromkeys(facts.subgroup_sizes)))
    return FoundDevice("vulkan", device.uri, device.name, kind, why_not, details)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return match[1] if match else platform.processor() or platform.machine()
