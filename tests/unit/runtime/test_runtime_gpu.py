"""What a module's kernels need of a Vulkan device is compared with what its driver says, before they are loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from linattn.runtime import Program, TargetError, gpu
from linattn.runtime.drivers import list_devices
from linattn.runtime.gpu import Offer, missing_of_gpu
from linattn.runtime.manifest_target import DeviceNeeds, Target
from needed import need_device
from tiny_hybrid import Hybrid

NEEDS = DeviceNeeds(256, 32_768, 9, 12, ("shaderFloat16", "shaderInt64", "subgroupShuffle"))
TARGET = Target("vulkan", "vulkan", "some GPU", 32, needs=NEEDS)
ENOUGH = Offer(
    {"threads": 256, "shared_memory": 32_768, "storage_buffers": 9, "push_constants": 12},
    {"shaderFloat16": True, "shaderInt64": True, "subgroupShuffle": True, "cooperativeMatrix": False},
)


def less(**changes: Any) -> Offer:
    return Offer({**ENOUGH.numbers, **changes}, ENOUGH.features)


@pytest.mark.parametrize(
    ("offer", "subgroups", "words"),
    [
        (ENOUGH, (32, 32), []),
        (ENOUGH, (8, 64), []),
        (ENOUGH, None, []),
        (Offer(), (32, 32), []),  # nothing is known
        (ENOUGH, (64, 128), ["subgroups of 64 to 128 threads where 32 are needed"]),
        (ENOUGH, (8, 8), ["subgroups of 8 threads where 32 are needed"]),
        (less(shared_memory=32_767), (32, 32), ["32767 bytes of shared memory where 32768 are needed"]),
        (less(threads=128), (32, 32), ["128 threads of a workgroup where 256 are needed"]),
        (less(storage_buffers=8), (32, 32), ["8 buffers of a kernel where 9 are needed"]),
        (less(push_constants=8, threads=1), None, ["1 threads of", "8 bytes of push constants where 12 are needed"]),
        (Offer({}, {"shaderInt64": False, "shaderFloat16": False}), None, ["no shaderFloat16", "no shaderInt64"]),
    ],
)
def test_what_is_missing(offer: Offer, subgroups: tuple[int, int] | None, words: list[str]) -> None:
    """Table 2 #32: what a module counts on, subgroups of one size first of all, a device has or is refused."""
    found = missing_of_gpu(TARGET, subgroups, offer)
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))


def test_no_gpu_needs_nothing() -> None:
    assert missing_of_gpu(Target("cpu", "local-task"), (8, 8), Offer({"threads": 1})) == []


@pytest.mark.vulkan
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shared_memory": 1 << 24}, "bytes of shared memory where 16777216 are needed"),
        ({"threads": 1 << 20}, "threads of a workgroup where 1048576 are needed"),
        ({"storage_buffers": 1 << 30}, "buffers of a kernel where 1073741824 are needed"),
        ({"features": ("cooperativeMatrix",)}, "no cooperativeMatrix"),
    ],
)
def test_a_device_that_offers_less_is_refused(changes: dict[str, Any], words: str) -> None:
    """On the device at hand; cooperative matrices are what lacks on a software driver."""
    need_device("vulkan")
    if "features" in changes and "llvmpipe" not in list_devices("vulkan")[0][1]:
        pytest.skip("a GPU that may have them")
    hybrid = Hybrid("vulkan", blocks=(1,))
    target = Target("vulkan", "vulkan", "another GPU", needs=replace(DeviceNeeds(1, 0, 0, 0), **changes))
    data = hybrid.compile(replace(hybrid.manifest(), target=target).to_json())
    with pytest.raises(TargetError) as caught:
        Program.load(data)
    text = str(caught.value)
    assert "compiled for another GPU, more than" in text
    assert words in text
    assert "--gpu-target" in text
    assert "\n" not in text


@pytest.mark.vulkan
@pytest.mark.skipif(shutil.which("vulkaninfo") is None, reason="vulkaninfo (Debian: vulkan-tools) is not installed")
def test_the_driver_is_read_as_vulkaninfo_reads_it(tmp_path: Path) -> None:
    need_device("vulkan")
    subprocess.run(["vulkaninfo", "--json"], cwd=tmp_path, capture_output=True, check=True)
    device = json.loads(next(tmp_path.glob("*.json")).read_text())["capabilities"]["device"]
    limits = device["properties"]["VkPhysicalDeviceProperties"]["limits"]
    offer = gpu._offer(list_devices("vulkan")[0][0])
    assert offer.numbers == {
        "push_constants": limits["maxPushConstantsSize"],
        "storage_buffers": limits["maxPerStageDescriptorStorageBuffers"],
        "shared_memory": limits["maxComputeSharedMemorySize"],
        "threads": limits["maxComputeWorkGroupInvocations"],
    }
    told = {name: value for block in device["features"].values() for name, value in block.items()}
    compared = {name for name in offer.features if name in told}
    assert {"shaderInt64", "shaderFloat16", "storageBuffer16BitAccess", "storageBuffer8BitAccess"} <= compared
    assert {name: offer.features[name] for name in compared} == {name: told[name] for name in compared}


@pytest.mark.vulkan
def test_another_device_is_not_asked() -> None:
    need_device("vulkan")
    assert gpu._offer(f"vulkan://GPU-{'0' * 32}") == Offer()


def test_without_a_vulkan_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_OTHER_LIBRARIES", ("libnone.so",))
    monkeypatch.setattr(gpu, "_LIBRARIES", {})
    assert gpu._offer.__wrapped__("vulkan") == Offer()
