"""What a target is to the compiler."""

from __future__ import annotations

from dataclasses import dataclass

from linattn.dialect_patterns.target import Target
from linattn.runtime.manifest_target import CpuLevel

from .ptxas import Assembler


@dataclass(frozen=True)
class TargetOptions:
    """What the user may say about the machine.

    Attributes:
        cpu_features: ``host``, ``portable``, ``generic``, a CPU name such as ``znver4``, or features such as
            ``+avx2,+fma,+f16c``.
        gpu_target: A GPU architecture: ``sm_89`` for CUDA, or several, ``sm_80,sm_90``; ``ada`` or ``rdna3`` for
            Vulkan, or ``host`` or the path of a device's profile.
        target_triple: The machine's architecture and system, such as ``aarch64-linux-gnu``; None: this one's.
    """

    cpu_features: str | None = None
    gpu_target: str | None = None
    target_triple: str | None = None


@dataclass(frozen=True)
class NativeCuda:
    """Native code that a CUDA module is to hold beside its PTX.

    Attributes:
        assembler: Makes it.
        architectures: The GPUs that it is for, such as 90.
        ptx_architecture: The least GPU that takes the PTX.
    """

    assembler: Assembler
    architectures: tuple[int, ...]
    ptx_architecture: int

    @property
    def names(self) -> tuple[str, ...]:
        """The architectures as ``--gpu-target`` takes them."""
        return tuple(f"sm_{gpu}" for gpu in self.architectures)


@dataclass(frozen=True)
class CompileTarget:
    """A resolved target.

    Attributes:
        name: ``cpu``, ``cuda`` or ``vulkan``.
        device: IREE device URI that runs the module.
        description: For people: the features or architecture compiled for.
        flags: IREE compiler flags.
        architecture: Of a CPU: ``x86_64`` or ``aarch64``.
        instruction_sets: Of a CPU: what the code may contain beyond what all of the architecture have.
        levels: The machines that a portable module has code for, best first; the last needs `instruction_sets`.
        device_attribute: MLIR text of the module's ``hal.device.targets``, for devices that IREE's own tables describe
            wrongly or not at all; None to let the flags decide.
        capabilities: What the strategies may ask about.
        subgroup_size: Threads of a subgroup that the compiled kernels need, None if any will do.
        prefill_blocks: Default sizes of the prefill entry points, in tokens.
        native: Of a CUDA target: the native code that is wanted beside the PTX.
        notes: What the user should be told, such as a target that was mapped to another.
    """

    name: str
    device: str
    description: str
    flags: tuple[str, ...]
    capabilities: Target
    architecture: str | None = None
    instruction_sets: tuple[str, ...] = ()
    levels: tuple[CpuLevel, ...] = ()
    device_attribute: str | None = None
    subgroup_size: int | None = None
    prefill_blocks: tuple[int, ...] = (512, 64, 8)
    native: NativeCuda | None = None
    notes: tuple[str, ...] = ()
