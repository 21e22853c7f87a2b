"""What a Vulkan profile says of a device, and what the compiler is told then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from iree.compiler import ir
from linattn.frontend.targets import vulkan
from linattn.frontend.targets.base import CompileTarget, TargetOptions
from linattn.frontend.targets.vulkan_device import DEVICES
from linattn.frontend.targets.vulkan_profile import host_profile
from linattn.runtime.errors import TargetError

SUBGROUP = {
    "subgroupSize": 32,
    "supportedStages": ["VK_SHADER_STAGE_COMPUTE_BIT"],
    "supportedOperations": ["VK_SUBGROUP_FEATURE_ARITHMETIC_BIT", "VK_SUBGROUP_FEATURE_SHUFFLE_BIT"],
}
CONTROL = {"minSubgroupSize": 32, "maxSubgroupSize": 32, "requiredSubgroupSizeStages": ["VK_SHADER_STAGE_COMPUTE_BIT"]}


def profile(
    vendor: int = 0x10DE,
    version: int = 4206847,
    subgroup: dict[str, Any] | None = None,
    control: dict[str, Any] | None = None,
    features: dict[str, bool] | None = None,
    extensions: tuple[str, ...] = ("VK_KHR_cooperative_matrix",),
    limits: dict[str, Any] | None = None,
) -> dict[str, Any]:
    usual = {
        "maxComputeSharedMemorySize": 49152,
        "maxComputeWorkGroupInvocations": 1024,
        "maxComputeWorkGroupSize": [1024, 1024, 64],
        "maxComputeWorkGroupCount": [2147483647, 65535, 65535],
        "maxPerStageDescriptorStorageBuffers": 1 << 20,
        "maxDescriptorSetStorageBuffers": 1 << 20,
        "maxPushConstantsSize": 256,
    }
    offered = {
        "shaderInt64": True,
        "storageBuffer16BitAccess": True,
        "shaderFloat16": True,
        "storageBuffer8BitAccess": True,
        "shaderInt8": True,
        "subgroupSizeControl": True,
    }
    return {
        "capabilities": {
            "device": {
                "extensions": dict.fromkeys(extensions, 1),
                "features": {"VkPhysicalDeviceFeatures": offered | (features or {})},
                "properties": {
                    "VkPhysicalDeviceProperties": {
                        "apiVersion": version,
                        "vendorID": vendor,
                        "deviceName": "A GPU",
                        "limits": usual | (limits or {}),
                    },
                    "VkPhysicalDeviceSubgroupProperties": SUBGROUP | (subgroup or {}),
                    "VkPhysicalDeviceSubgroupSizeControlProperties": CONTROL | (control or {}),
                },
            }
        }
    }


def resolve(folder: Path, content: Any) -> CompileTarget:
    path = folder / "device.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return vulkan.resolve(TargetOptions(gpu_target=str(path)))


def test_a_large_gpu_is_what_our_table_says(tmp_path: Path) -> None:
    found, table = resolve(tmp_path, profile()), vulkan.resolve(TargetOptions(gpu_target="ada"))
    assert found.capabilities == table.capabilities
    assert found.device_attribute == (table.device_attribute or "").replace('"ada"', '"profile"')
    assert found.description == "A GPU"
    assert found.notes == ()


@pytest.mark.parametrize(
    ("given", "size", "note"),
    [
        ({"control": {"minSubgroupSize": 16, "maxSubgroupSize": 64}}, 32, ""),
        ({"control": {"minSubgroupSize": 64, "maxSubgroupSize": 128}}, 64, ""),
        ({"control": {"minSubgroupSize": 8, "maxSubgroupSize": 16}}, 16, ""),
        ({"control": {"minSubgroupSize": 8}, "features": {"subgroupSizeControl": False}}, 0, "no subgroup operations"),
        ({"control": {"minSubgroupSize": 8, "requiredSubgroupSizeStages": []}}, 0, "no subgroup operations"),
        ({"control": {"requiredSubgroupSizeStages": []}}, 0, "no subgroup operations"),
        ({"subgroup": {"supportedOperations": ["VK_SUBGROUP_FEATURE_BASIC_BIT"]}}, 0, "no subgroup operations"),
        ({"subgroup": {"supportedStages": ["VK_SHADER_STAGE_FRAGMENT_BIT"]}}, 0, "no subgroup operations"),
        ({"features": {"storageBuffer16BitAccess": False}}, 32, "f16 models will not run"),
    ],
)
def test_subgroups_and_notes(given: dict[str, Any], size: int, note: str, tmp_path: Path) -> None:
    found = resolve(tmp_path, profile(**given))
    assert found.capabilities.subgroup_size == size
    assert found.subgroup_size == (size or None)
    assert note in " ".join(found.notes)
    assert bool(note) == bool(found.notes)


def test_limits_of_a_dispatch(tmp_path: Path) -> None:
    limits = {
        "maxPerStageDescriptorStorageBuffers": 31,
        "maxDescriptorSetStorageBuffers": 24,
        "maxPushConstantsSize": 128,
    }
    found = resolve(tmp_path, profile(limits=limits)).capabilities.limits
    assert (found.bindings, found.constants) == (24, 32)
    assert found.counts == (2147483647, 65535, 65535)
    assert (found.memory, found.threads, found.sizes) == (49152, 1024, (1024, 1024, 64))


def test_subgroups_of_a_workgroup_are_counted(tmp_path: Path) -> None:
    control = {"minSubgroupSize": 8, "maxSubgroupSize": 8, "maxComputeWorkgroupSubgroups": 32}
    assert resolve(tmp_path, profile(control=control)).capabilities.max_threads == 256


@pytest.mark.parametrize("name", DEVICES)
def test_a_known_device(name: str) -> None:
    """What is told to our kernels, to the check of the finished module and to IREE is the same."""
    found, device = vulkan.resolve(TargetOptions(gpu_target=name)), DEVICES[name]
    limits = found.capabilities.limits
    assert found.subgroup_size == (device.subgroup_size or None)
    assert found.capabilities.workgroup_memory == limits.memory == limits.declared == device.workgroup_memory
    assert found.capabilities.max_threads == limits.threads == device.max_threads
    with ir.Context() as context:
        context.load_all_available_dialects()
        text = str(ir.Attribute.parse(found.device_attribute or ""))
    assert f"max_workgroup_memory_bytes = {limits.memory}" in text
    assert ("int64" in text, "int8" in text, "arithmetic" in text) == (
        device.int64,
        device.int8,
        device.subgroup_size > 0,
    )


@pytest.mark.parametrize("family", ["adreno", "valhall", "xe", "arc", "rdna3", "apple", "hopper"])
def test_families_are_known(family: str) -> None:
    """Table 2 #32: at least one of each vendor; no kernel may count on subgroups of 32."""
    assert family in DEVICES
    assert {16, 32, 64, 0} <= {device.subgroup_size for device in DEVICES.values()}


def test_a_small_device(tmp_path: Path) -> None:
    limits = {"maxComputeSharedMemorySize": 16384, "maxComputeWorkGroupInvocations": 256}
    found = resolve(tmp_path, profile(vendor=0x13B5, limits=limits, features={"shaderInt64": False}))
    assert found.capabilities.max_threads == 256
    assert found.capabilities.workgroup_memory == 16384
    assert found.capabilities.matrix_stride is None  # only NVIDIA's have been tried
    assert "int64" not in (found.device_attribute or "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a Vulkan profile, got no JSON"),
        ("[" * 200_000, "not a Vulkan profile"),
        ("[]", "expected the file that vulkaninfo --json writes"),
        ({"capabilities": []}, "no usable apiVersion"),
        ({"capabilities": {"device": {"properties": {"VkPhysicalDeviceProperties": 3}}}}, "no usable apiVersion"),
        (profile(version=4202496), "too old, got 1.2, expected 1.3 or newer"),
        (profile(limits={"maxComputeSharedMemorySize": "many"}), "no usable maxComputeSharedMemorySize, got 'many'"),
        (profile(limits={"maxComputeWorkGroupSize": [0, 1, 1]}), "no usable maxComputeWorkGroupSize, got 0"),
        (profile(limits={"maxComputeWorkGroupSize": 8}), "no usable maxComputeWorkGroupSize"),
    ],
)
def test_what_is_no_profile(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=message) as error:
        resolve(tmp_path, content)
    assert "device.json" in str(error.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="cannot be read, got No such file"):
        vulkan.resolve(TargetOptions(gpu_target=str(tmp_path / "none.json")))


def test_without_vulkaninfo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(TargetError, match="install vulkan-tools"):
        host_profile()


@pytest.mark.vulkan
@pytest.mark.skipif(shutil.which("vulkaninfo") is None, reason="vulkaninfo (Debian: vulkan-tools) is not installed")
def test_the_device_of_this_machine() -> None:
    found = vulkan.resolve(TargetOptions(gpu_target="host"))
    assert found.capabilities.max_threads >= 128
    assert found.capabilities.workgroup_memory >= 16_384
