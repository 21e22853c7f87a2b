"""What our own data says of a Vulkan device, and the devices that people have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What a family of devices offers. A kernel needs of it only what it uses.

    Attributes:
        subgroup_size: Threads of a subgroup, 0 to use no subgroup operations.
        spirv: SPIR-V version.
        max_threads: Threads of a workgroup.
        workgroup_memory: Bytes of shared memory.
        storage_buffers: Buffers of a dispatch.
        push_constants: Bytes of them.
        counts: Workgroups along x, y and z.
        int64: Whether 64-bit integers can be computed with.
        int8: Whether 8-bit integers can be stored and computed with.
        matrices: Whether there are cooperative matrices of 16 x 16 x 16, f16 with sums in f32.
    """

    subgroup_size: int = 0
    spirv: str = "v1.6"
    max_threads: int = 128
    workgroup_memory: int = 16_384
    storage_buffers: int = 30  # Vulkan's roadmap of 2022, which began with Vulkan 1.3; the core asks for 4
    push_constants: int = 128
    counts: tuple[int, int, int] = (65_535, 65_535, 65_535)
    int64: bool = False
    int8: bool = True
    matrices: bool = False


BASELINE = "baseline"

_NVIDIA = Device(
    32,
    max_threads=1024,
    workgroup_memory=49_152,
    storage_buffers=1 << 20,
    push_constants=256,
    counts=(2**31 - 1, 65_535, 65_535),
    int64=True,
    matrices=True,
)
# Subgroups of 32 to 64 lanes; 65,536 bytes with Mesa's driver, 32,768 with AMD's on Windows.
_AMD = Device(32, max_threads=1024, workgroup_memory=32_768, int64=True)
# Subgroups of 8 to 32 lanes, Xe2's of 16 to 32, at most 64 of them in a workgroup (56 on some): 32 lanes leave a thread
# too few registers. 32,768 bytes with older drivers, 49,152 with newer ones.
_INTEL = Device(16, max_threads=512, workgroup_memory=32_768, int64=True)
# Subgroups of 64 to 128 lanes, 16 of them in a workgroup; some store no 8 bits. Older drivers, of Mali too, have no
# 64-bit integers (Android 17 asks for them), and are refused when they load a module that uses some.
_ADRENO = Device(64, max_threads=1024, workgroup_memory=32_768, int64=True, int8=False)
_MALI = Device(16, max_threads=512, workgroup_memory=32_768, int64=True)
# Through MoltenVK (and Mesa's KosmicKrisp), which cannot fix the size of subgroups, as IREE's driver wants it.
_APPLE = Device(max_threads=1024, workgroup_memory=32_768, int64=True)

DEVICES = {
    BASELINE: Device(spirv="v1.3", int64=True),  # masks made with 64-bit integers do not compile without
    "mobile": Device(spirv="v1.3"),
    **dict.fromkeys(("turing", "ampere", "ada", "hopper", "blackwell"), _NVIDIA),
    **dict.fromkeys(("rdna1", "rdna2", "rdna3", "rdna4"), _AMD),
    **dict.fromkeys(("xe", "arc"), _INTEL),
    "adreno": _ADRENO,
    "valhall": _MALI,
    "apple": _APPLE,
}
"""Known devices by the name of their family; each what the family's drivers with Vulkan 1.3 have in common.

Sources: reports of vulkan.gpuinfo.org that Khronos' Vulkan-Profiles keeps (GeForce RTX 2060 to 5090, Radeon RX 5700 to
9070, Arc A380 to B580 and 140T, Iris Xe, Apple M1 to M5); Mesa's turnip (``tu_device.cc``) and panvk
(``panvk_vX_physical_device.c``); IREE 3.13's ``KnownTargets.cpp`` for Adreno 730 to 750 and Mali G57 to G715.
"""
