"""What our own data says of a Vulkan device."""

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
        matrices: Whether there are cooperative matrices of 16 x 16 x 16, f16 with sums in f32.
    """

    subgroup_size: int = 0
    spirv: str = "v1.3"
    max_threads: int = 128
    workgroup_memory: int = 16_384
    storage_buffers: int = 30  # Vulkan's roadmap of 2022, which began with Vulkan 1.3; the core asks for 4
    push_constants: int = 128
    counts: tuple[int, int, int] = (65_535, 65_535, 65_535)
    int64: bool = False
    matrices: bool = False
