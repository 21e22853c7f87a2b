"""GPUs through SPIR-V and Vulkan 1.3; the default runs on every driver that IREE's runtime accepts.

The devices are described by our own data, since IREE's tables are wrong: its baseline has 32-bit storage only and then
reads f16 wrongly without a word, its NVIDIA entries describe CUDA (99 KB of shared memory where Vulkan has 48, and
mma.sync, which SPIR-V does not have), and its AMD entries 64 KB, of which Windows has half.
"""

from __future__ import annotations

from pathlib import Path

from linattn.dialect_patterns.target import Limits, Target
from linattn.runtime.errors import TargetError

from .base import CompileTarget, TargetOptions
from .vulkan_device import BASELINE, DEVICES, Device
from .vulkan_profile import describe_device, host_profile, load_profile

HOST = "host"
# One token, 32 heads of 128 on an H100: 5.86 us with 32 values a thread, 6.24 with 64, which CUDA likes better.
_THREAD_VALUES = 32


def resolve(options: TargetOptions) -> CompileTarget:
    """Flags for a Vulkan GPU; ``--gpu-target`` defaults to ``baseline``; ``host`` and profiles describe one device.

    Raises:
        TargetError: if a CPU option is given, the architecture is not known or a profile cannot be used.
    """
    if options.cpu_features is not None:
        raise TargetError("a CPU option for a GPU target", where="--cpu-features", hint="use --gpu-target")
    if options.target_triple is not None:
        raise TargetError("a CPU option for a GPU target", where="--target-triple", hint="use --gpu-target")
    given = options.gpu_target or BASELINE
    asked = given.lower()
    if asked in DEVICES:
        return _by_data(asked, "baseline (Vulkan 1.3)" if asked == BASELINE else asked, DEVICES[asked])
    if asked == HOST or asked.endswith(".json"):
        profile = host_profile() if asked == HOST else load_profile(Path(given))
        name, device, notes = describe_device(profile, f"--gpu-target {Path(given).name}")
        return _by_data(HOST if asked == HOST else "profile", name, device, notes)
    expected = ", ".join((*DEVICES, HOST, "a file of vulkaninfo --json"))
    raise TargetError("unknown GPU", where="--gpu-target", got=repr(asked), expected=expected)


def _by_data(arch: str, description: str, device: Device, notes: tuple[str, ...] = ()) -> CompileTarget:
    """The target for a device that our own data or its profile describes."""
    return CompileTarget(
        name="vulkan",
        device="vulkan",
        description=description,
        flags=(),
        capabilities=Target(
            "vulkan",
            is_gpu=True,
            subgroup_size=device.subgroup_size,
            max_threads=device.max_threads,
            workgroup_memory=device.workgroup_memory,
            matrix_stride="chunks" if device.matrices else None,
            thread_values=_THREAD_VALUES,
            cold_code=True,
            limits=Limits(
                bindings=device.storage_buffers,
                constants=device.push_constants // 4,
                memory=device.workgroup_memory,
                declared=device.workgroup_memory,
                threads=device.max_threads,
                sizes=(device.max_threads, device.max_threads, 64),
                counts=device.counts,
            ),
        ),
        device_attribute=device_attribute(arch, device),
        subgroup_size=device.subgroup_size or None,
        prefill_blocks=(512, 64, 8) if device.subgroup_size else (64, 8),
        notes=notes,
    )


def device_attribute(name: str, device: Device) -> str:
    """MLIR text of the ``hal.device.targets`` attribute that describes a device."""
    compute = "fp32|fp16|" + ("int64|" if device.int64 else "") + "int32|int16" + ("|int8" if device.int8 else "")
    storage = ("b64|" if device.int64 else "") + "b32|b16" + ("|b8" if device.int8 else "")
    subgroup = "shuffle|arithmetic" if device.subgroup_size else "none"
    # Lets our kernels use them; IREE's own pipelines look for the architectures they know and do not.
    matrices = "mma = [<NV_WMMA_F32_16x16x16_F16>], " if device.matrices else ""
    sizes = f"[{device.max_threads}, {device.max_threads}, 64]"
    return f"""[#hal.device.target<"vulkan", [#hal.executable.target<"vulkan-spirv", "vulkan-spirv-fb", {{
        iree_codegen.target_info = #iree_gpu.target<arch = "{name}",
          features = "spirv:{device.spirv},cap:Shader", wgp = <
          compute = {compute}, storage = {storage}, subgroup = {subgroup},
          {matrices}subgroup_size_choices = [{device.subgroup_size or 64}], max_workgroup_sizes = {sizes},
          max_thread_count_per_workgroup = {device.max_threads}, max_workgroup_memory_bytes = {device.workgroup_memory},
          max_workgroup_counts = {[min(count, 65_535) for count in device.counts]}>>}}>]> : !hal.device]"""
