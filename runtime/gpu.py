"""What a Vulkan device offers to kernels, by its driver's own word, against what a module's kernels use.

IREE 3.13 loads a module whose kernels have more threads or shared memory than the device, or integers that it lacks:
Vulkan says nothing about what then comes out. IREE tells only some of it, so the system's Vulkan library is asked, as
IREE asks it. Where there is none to ask, only what IREE tells is compared.

Source: ``vulkan_core.h`` of Vulkan 1.3; the positions below count from the start of a structure.
"""

from __future__ import annotations

import ctypes
import re
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from .drivers import list_devices, subgroup_sizes
from .errors import TargetError
from .manifest_target import Target

_LIBRARIES = {"win32": ("vulkan-1.dll",), "darwin": ("libvulkan.dylib", "libvulkan.1.dylib", "libMoltenVK.dylib")}
_OTHER_LIBRARIES = ("libvulkan.so.1", "libvulkan.so")
_VERSION_1_3 = (1 << 22) | (3 << 12)
_INSTANCE = 1
_APPLICATION = 0
_PROPERTIES, _FEATURES = 1000059001, 1000059000
_HEAD = 16  # sType, pNext
_LIMITS = _HEAD + 296  # after the names of the device
_UUID = re.compile(r"GPU-([0-9a-f]{32})")
_UUID_BYTES = 16
_POINTER = 8  # bytes, in the layouts below

# Chained structures: sType, bytes, where each thing is, counted in 32-bit words after the head.
_IDENTITY = (1000071004, 80)
_SUBGROUPS = (1000094000, 32, {"operations": 2})
_LIMIT_AT = {"push_constants": 32, "storage_buffers": 76, "shared_memory": 216, "threads": 232}
_FEATURES_AT = {"shaderFloat64": 39, "shaderInt64": 40, "shaderInt16": 41}
_CHAINED_FEATURES: tuple[tuple[int, int, dict[str, int]], ...] = (
    (
        49,
        64,
        {"storageBuffer16BitAccess": 0, "uniformAndStorageBuffer16BitAccess": 1, "storagePushConstant16": 2},
    ),
    (
        51,
        208,
        {
            "storageBuffer8BitAccess": 2,
            "uniformAndStorageBuffer8BitAccess": 3,
            "storagePushConstant8": 4,
            "shaderFloat16": 7,
            "shaderInt8": 8,
        },
    ),
    (1000506000, 24, {"cooperativeMatrix": 0}),
)
_OPERATIONS = {
    "subgroupBasic": 1, "subgroupVote": 2, "subgroupArithmetic": 4, "subgroupBallot": 8, "subgroupShuffle": 16,
    "subgroupShuffleRelative": 32, "subgroupClustered": 64, "subgroupQuad": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Offer:
    """What a device offers.

    Attributes:
        numbers: Like those of `DeviceNeeds`, by name; without what is not known.
        features: Feature -> whether the device has it; without what is not known.
    """

    numbers: Mapping[str, int] = field(default_factory=dict[str, int])
    features: Mapping[str, bool] = field(default_factory=dict[str, bool])


def check_gpu(where: str, target: Target, uri: str) -> None:
    """Refuses a module whose kernels use what the device does not offer.

    Args:
        where: The module, for the error.
        target: What its manifest says.
        uri: The device.

    Raises:
        TargetError: with all that is missing.
    """
    if not uri.startswith("vulkan"):
        return
    missing = missing_of_gpu(target, subgroup_sizes(uri), _offer(uri))
    if missing:
        hint = "compile with a --gpu-target for this device, such as host"
        message = f"compiled for {target.description}, more than {dict(list_devices('vulkan')).get(uri, uri)} offers"
        raise TargetError(message, where=where, got="; ".join(missing), hint=hint)


def missing_of_gpu(target: Target, subgroups: tuple[int, int] | None, offer: Offer) -> list[str]:
    """What a module needs and a device does not offer, as far as that is known."""
    missing: list[str] = []
    lanes = target.subgroup_size
    if lanes is not None and subgroups is not None and not subgroups[0] <= lanes <= subgroups[1]:
        here = str(subgroups[0]) if subgroups[0] == subgroups[1] else f"{subgroups[0]} to {subgroups[1]}"
        missing.append(f"subgroups of {here} threads where {lanes} are needed")
    if target.needs is None:
        return missing
    for name, unit in (
        ("shared_memory", "bytes of shared memory"),
        ("threads", "threads of a workgroup"),
        ("storage_buffers", "buffers of a kernel"),
        ("push_constants", "bytes of push constants"),
    ):
        needed, offered = getattr(target.needs, name), offer.numbers.get(name)
        if offered is not None and offered < needed:
            missing.append(f"{offered} {unit} where {needed} are needed")
    without = [name for name in target.needs.features if not offer.features.get(name, True)]
    return [*missing, *(f"no {name}" for name in without)]


@cache
def _offer(uri: str) -> Offer:
    """What a device offers; nothing where it cannot be asked."""
    library = _library()
    if library is None or ctypes.sizeof(ctypes.c_void_p) != _POINTER:
        return Offer()
    instance = _instance(library)
    if instance is None:
        return Offer()
    try:
        return _ask(library, instance, _UUID.search(uri))
    finally:
        library.vkDestroyInstance(instance, None)


def _library() -> Any:
    for name in _LIBRARIES.get(sys.platform, _OTHER_LIBRARIES):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _instance(library: Any) -> ctypes.c_void_p | None:
    about = struct.pack("=iiQQIiQII", _APPLICATION, 0, 0, 0, 0, 0, 0, 0, _VERSION_1_3)
    application = ctypes.create_string_buffer(about)
    at = ctypes.addressof(application)
    create = ctypes.create_string_buffer(struct.pack("=iiQIiQIiQIiQ", _INSTANCE, 0, 0, 0, 0, at, 0, 0, 0, 0, 0, 0))
    instance = ctypes.c_void_p()
    return instance if library.vkCreateInstance(create, None, ctypes.byref(instance)) == 0 else None


def _ask(library: Any, instance: ctypes.c_void_p, uuid: re.Match[str] | None) -> Offer:
    count = ctypes.c_uint32()
    library.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), None)
    devices = (ctypes.c_void_p * count.value)()
    if library.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), devices) != 0:
        return Offer()
    for device in devices:
        identity, subgroups = _structure(*_IDENTITY), _structure(*_SUBGROUPS[:2])
        properties = _structure(_PROPERTIES, 1024, identity, subgroups)
        library.vkGetPhysicalDeviceProperties2(ctypes.c_void_p(device), properties)
        if uuid is not None and identity.raw[_HEAD : _HEAD + _UUID_BYTES].hex() != uuid[1]:
            continue
        numbers = {name: _word(properties, _LIMITS + at) for name, at in _LIMIT_AT.items()}
        chained = [_structure(kind, size) for kind, size, _ in _CHAINED_FEATURES]
        features = _structure(_FEATURES, 256, *chained)
        library.vkGetPhysicalDeviceFeatures2(ctypes.c_void_p(device), features)
        found = {name: bool(_word(features, _HEAD + 4 * at)) for name, at in _FEATURES_AT.items()}
        for block, (_, _, places) in zip(chained, _CHAINED_FEATURES, strict=True):
            found.update({name: bool(_word(block, _HEAD + 4 * at)) for name, at in places.items()})
        operations = _word(subgroups, _HEAD + 4 * _SUBGROUPS[2]["operations"])
        found.update({name: bool(operations & bit) for name, bit in _OPERATIONS.items()})
        return Offer(numbers, found)
    return Offer()


def _structure(kind: int, size: int, *chained: Any) -> Any:
    """Memory for one of Vulkan's structures, with others chained to it."""
    memory = ctypes.create_string_buffer(size)
    struct.pack_into("=ii", memory, 0, kind, 0)
    last = memory
    for other in chained:
        struct.pack_into("=Q", last, 8, ctypes.addressof(other))
        last = other
    return memory


def _word(memory: Any, at: int) -> int:
    return struct.unpack_from("=I", memory, at)[0]
