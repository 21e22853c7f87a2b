"""The part of a manifest that says what a module was compiled for; a bundle says it in the same words."""

from __future__ import annotations

from dataclasses import dataclass

from .drivers import DEVICE_URIS
from .manifest_reader import Reader, bad


@dataclass(frozen=True)
class CpuLevel:
    """One of the machines that a portable CPU module has code for.

    Attributes:
        name: For people, such as `x86-64-v3`.
        instruction_sets: What its code needs, as in `Target`.
    """

    name: str
    instruction_sets: tuple[str, ...]


@dataclass(frozen=True)
class DeviceNeeds:
    """The most that any kernel of a GPU's module uses.

    Attributes:
        threads: Of a workgroup.
        shared_memory: Bytes of a workgroup.
        storage_buffers: Of a dispatch.
        push_constants: Bytes of a dispatch.
        features: In Vulkan's words, such as `shaderInt64`; `subgroup` and an operation, such as `subgroupShuffle`.
    """

    threads: int
    shared_memory: int
    storage_buffers: int
    push_constants: int
    features: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """What the module was compiled for.

    Attributes:
        name: `cpu` | `cuda` | `vulkan`.
        device: The device URI that runs it by default.
        description: For people: CPU features, GPU architecture.
        subgroup_size: Lanes of a subgroup that the kernels count on; None: any. Optional in the JSON. Checked at load,
            since IREE 3.13.0 runs a kernel for 32 lanes on a device of 8 and returns wrong numbers.
        architecture: `x86_64` | `aarch64`; None: not a CPU. Checked at load, like what follows: the process would die.
        instruction_sets: What the code needs beyond what every CPU of the architecture has, in LLVM's names.
        levels: Best first, where the module has code for several CPUs and takes the first level that a machine has; the
            last one needs `instruction_sets`.
        native: NVIDIA GPUs that there is native code for, such as `sm_90`; any other compiles the PTX that it has too.
            Optional in the JSON. Nothing is checked by it.
        needs: What the kernels need of a GPU; None: not a GPU. Checked at load, on Vulkan, which takes kernels that
            need more without a word.
    """

    name: str
    device: str
    description: str = ""
    subgroup_size: int | None = None
    architecture: str | None = None
    instruction_sets: tuple[str, ...] = ()
    levels: tuple[CpuLevel, ...] = ()
    native: tuple[str, ...] = ()
    needs: DeviceNeeds | None = None


def read_target(target: Reader, where: str) -> Target:
    """What a module was compiled for.

    Raises:
        TargetError: a broken rule of the format.
    """
    found = Target(
        target.choice("name", tuple(DEVICE_URIS)),
        target.text("device"),
        target.text("description"),
        target.optional_whole("subgroup_size", 1, missing_ok=True),
        None if target.get("architecture") is None else target.text("architecture"),
        target.texts("instruction_sets"),
        tuple(CpuLevel(row.text("name"), row.texts("instruction_sets")) for row in target.rows("levels")),
        target.texts("native", missing_ok=True),
        None if target.get("needs") is None else _needs(target.child("needs")),
    )
    if (found.name == "cpu") != (found.architecture is not None):
        raise bad(where, "target.architecture", f"wrong for target {found.name}", found.architecture)
    if found.levels and found.levels[-1].instruction_sets != found.instruction_sets:
        raise bad(where, "target.levels", "the last one is not what the module needs", found.levels[-1].name)
    return found


def _needs(row: Reader) -> DeviceNeeds:
    return DeviceNeeds(
        row.whole("threads", 1),
        row.whole("shared_memory", 0),
        row.whole("storage_buffers", 0),
        row.whole("push_constants", 0),
        row.texts("features"),
    )
