"""What a Vulkan driver really offers, from its profile: the JSON that ``vulkaninfo --json`` writes, or gpuinfo.org has.

Source: the Vulkan Profiles schema of Khronos; names are those of the Vulkan 1.3 structures.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, TypeVar, cast

from linattn.runtime.errors import TargetError

from .vulkan_device import Device

T = TypeVar("T")

_MAX_BYTES = 16 << 20  # they have 0.3 MB
_TIMEOUT_S = 60.0
_NVIDIA = 0x10DE
_PREFERRED_SUBGROUP = 32
_NEEDED_OPERATIONS = {"VK_SUBGROUP_FEATURE_SHUFFLE_BIT", "VK_SUBGROUP_FEATURE_ARITHMETIC_BIT"}
_COMPUTE = "VK_SHADER_STAGE_COMPUTE_BIT"
_API = (1 << 22) | (3 << 12)  # 1.3, which IREE's runtime asks for
_API_1_3 = "1.3"
_MAX_THREADS = 1024  # more than kernels ask for


def host_profile() -> dict[str, Any]:
    """The profile of this machine's first Vulkan device.

    Raises:
        TargetError: if there is no ``vulkaninfo``, or it finds no device.
    """
    tool = shutil.which("vulkaninfo")
    if tool is None:
        raise TargetError(
            "vulkaninfo is not installed", where="--gpu-target host", hint="install vulkan-tools, or name the GPU"
        )
    with tempfile.TemporaryDirectory(prefix="linattn-vulkaninfo-") as folder:
        try:
            done = subprocess.run([tool, "--json"], cwd=folder, capture_output=True, timeout=_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise TargetError("vulkaninfo does not run", where="--gpu-target host", got=str(error)) from error
        files = sorted(Path(folder).glob("*.json"))
        if not files:
            found = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
            raise TargetError("vulkaninfo finds no Vulkan device", where="--gpu-target host", got=found[-1])
        return load_profile(files[0])


def load_profile(path: Path) -> dict[str, Any]:
    """Read a profile.

    Raises:
        TargetError: if there is no such file or it is not a profile.
    """
    where = f"--gpu-target {path.name}"
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise TargetError("not a Vulkan profile", where=where, got=f"more than {_MAX_BYTES} bytes")
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TargetError("cannot be read", where=where, got=error.strerror) from error
    except (ValueError, RecursionError) as error:
        raise TargetError("not a Vulkan profile", where=where, got="no JSON") from error
    if not isinstance(found, dict) or "capabilities" not in found:
        raise TargetError("not a Vulkan profile", where=where, expected="the file that vulkaninfo --json writes")
    return cast("dict[str, Any]", found)


def describe_device(profile: dict[str, Any], where: str) -> tuple[str, Device, tuple[str, ...]]:
    """A device by its profile.

    Args:
        profile: What `load_profile` gave.
        where: The option, for errors.

    Returns:
        The device's name, what it offers to kernels, and what the user should be told.

    Raises:
        TargetError: if something is missing, or the device is too old.
    """
    offer = _Offer(profile, where)
    version = offer.property("VkPhysicalDeviceProperties", "apiVersion", int)
    if version < _API:
        got = f"{version >> 22}.{version >> 12 & 0x3FF}"
        raise TargetError("the Vulkan version is too old", where=where, got=got, expected=f"{_API_1_3} or newer")
    notes: list[str] = []
    if not (offer.has("storageBuffer16BitAccess") and offer.has("shaderFloat16")):
        notes.append("the device does not store or compute with 16 bits: f16 models will not run on it")
    limits = _table(offer.property("VkPhysicalDeviceProperties", "limits", dict))
    subgroup, subgroups = offer.subgroup(), offer.subgroups()
    if not subgroup:
        notes.append("kernels use no subgroup operations, which the device lacks or does not fix a size for")
    matrices = (
        offer.property("VkPhysicalDeviceProperties", "vendorID", int) == _NVIDIA
        and subgroup == _PREFERRED_SUBGROUP
        and "VK_KHR_cooperative_matrix" in offer.extensions
    )
    sizes = offer.axes(limits, "maxComputeWorkGroupSize")
    threads = min(_MAX_THREADS, offer.limit(limits, "maxComputeWorkGroupInvocations"), *sizes[:2])
    buffers = ("maxPerStageDescriptorStorageBuffers", "maxDescriptorSetStorageBuffers")
    device = Device(
        subgroup_size=subgroup,
        max_threads=min(threads, subgroup * subgroups) if subgroup and subgroups else threads,
        workgroup_memory=offer.limit(limits, "maxComputeSharedMemorySize"),
        storage_buffers=min(offer.limit(limits, name) for name in buffers),
        push_constants=offer.limit(limits, "maxPushConstantsSize"),
        counts=offer.axes(limits, "maxComputeWorkGroupCount"),
        int64=offer.has("shaderInt64"),
        int8=offer.has("storageBuffer8BitAccess") and offer.has("shaderInt8"),
        matrices=matrices,
    )
    return offer.property("VkPhysicalDeviceProperties", "deviceName", str), device, tuple(notes)


class _Offer:
    """Looks things up in a profile; what is not there or of another type ends in a `TargetError`."""

    def __init__(self, profile: dict[str, Any], where: str) -> None:
        self._where = where
        blocks = _table(profile["capabilities"])
        parts = _table(blocks.get("device", next(iter(blocks.values()), None)))
        self._properties, self._features = _table(parts.get("properties")), _table(parts.get("features"))
        self.extensions = _table(parts.get("extensions"))

    def _missing(self, what: str, got: object) -> TargetError:
        return TargetError(f"the profile has no usable {what}", where=self._where, got=repr(got)[:80])

    def property(self, structure: str, name: str, kind: type[T]) -> T:
        """A member of one of the property structures."""
        value = _table(self._properties.get(structure)).get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self._missing(name, value)
        return value

    def limit(self, limits: dict[str, Any], name: str) -> int:
        """A limit that is a positive number."""
        return self._positive(name, limits.get(name))

    def axes(self, limits: dict[str, Any], name: str) -> tuple[int, int, int]:
        """A limit of three positive numbers, along x, y and z."""
        x, y, z = (self._positive(name, value) for value in (_items(limits.get(name)) + 3 * [None])[:3])
        return x, y, z

    def _positive(self, name: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._missing(name, value)
        return value

    def has(self, feature: str) -> bool:
        """Whether one of the feature structures has it."""
        return any(_table(block).get(feature) is True for block in self._features.values())

    def subgroup(self) -> int:
        """Threads of a subgroup that can be relied on, 0 if none or without the operations that kernels use."""
        size, least, most = (self._subgroup(name) for name in ("subgroupSize", "minSubgroupSize", "maxSubgroupSize"))
        usable = set(_items(self._subgroup("supportedOperations"))) >= _NEEDED_OPERATIONS
        if not usable or _COMPUTE not in _items(self._subgroup("supportedStages")) or not isinstance(size, int):
            return 0
        stages = _items(self._subgroup("requiredSubgroupSizeStages"))
        if not self.has("subgroupSizeControl") or _COMPUTE not in stages:
            return 0  # IREE's driver fixes the size that a kernel is made for, even where there is only one
        if isinstance(least, int) and isinstance(most, int):
            return min(max(least, _PREFERRED_SUBGROUP), most)
        return size

    def subgroups(self) -> int:
        """Most subgroups of a workgroup, 0 if that is not said."""
        found = self._subgroup("maxComputeWorkgroupSubgroups")
        return found if isinstance(found, int) else 0

    def _subgroup(self, name: str) -> Any:
        """A member of the subgroup structures, or of Vulkan 1.1's and 1.3's, which repeat them."""
        eleven = "subgroup" + name[0].upper() + name[1:] if name.startswith("supported") else name
        places = (("SubgroupProperties", name), ("SubgroupSizeControlProperties", name))
        repeated = (("Vulkan11Properties", eleven), ("Vulkan13Properties", name))
        for structure, member in (*places, *repeated):
            block = _table(self._properties.get(f"VkPhysicalDevice{structure}"))
            if member in block:
                return block[member]
        return None


def _table(value: Any) -> dict[str, Any]:
    """A JSON object, empty if it is none."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _items(value: Any) -> list[Any]:
    """A JSON array, empty if it is none."""
    return cast("list[Any]", value) if isinstance(value, list) else []
