"""NVIDIA GPUs through PTX, and native code beside it where that is asked for and ptxas is there.

IREE 3.13 knows architectures up to sm_89; newer GPUs run that PTX, compiled by their driver or, ahead, by ptxas. Native
code is for the GPUs that ``--gpu-target`` names; without it a module is PTX alone, as it always was: so far native code
has run on no GPU but for one kernel (H100: load 92 ms to 1 ms, the call 14 % faster).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from linattn.dialect_patterns.target import Limits, Target
from linattn.install import install_hint
from linattn.runtime.errors import TargetError

from .base import CompileTarget, NativeCuda, TargetOptions
from .ptxas import Assembler, find_assembler

NEWEST = 89
KNOWN = {
    **dict.fromkeys((60, 61, 62), 49_152),
    **dict.fromkeys((70, 72, 75), 65_536),
    **dict.fromkeys((80, 86, 87, 89), 101_376),
}
"""Architecture -> bytes of shared memory that a launch can have on it and on each newer one, which runs its code.

Source: CUDA C++ programming guide, technical specifications per compute capability (65,536 are those of 7.5, 101,376
those of 8.6, 8.9 and 12.0).
"""
NEWER = (88, 90, 100, 101, 103, 110, 120, 121)
"""Architectures that NVIDIA makes and IREE 3.13 does not know."""
_DECLARED = 49_152
_COPY_MEMORY = 98_304  # of the 101,376: what is under way matters more than a second workgroup on an SM
DEFAULT = "sm_80"
_NAMES = {
    "volta": 70, "turing": 75, "ampere": 80, "a100": 80, "ada": 89, "l4": 89, "hopper": 90, "h100": 90, "h200": 90,
    "blackwell": 100, "b200": 100,
}  # fmt: skip


def resolve(options: TargetOptions) -> CompileTarget:
    """Flags for NVIDIA GPUs; ``--gpu-target`` defaults to sm_80, whose PTX runs on everything since the A100.

    Of several the oldest one decides what the PTX is for, and with it the kernels.

    Raises:
        TargetError: if a CPU option is given or the architecture is not known.
    """
    if options.cpu_features is not None:
        raise TargetError("a CPU option for a GPU target", where="--cpu-features", hint="use --gpu-target")
    if options.target_triple is not None:
        raise TargetError("a CPU option for a GPU target", where="--target-triple", hint="use --gpu-target")
    asked = (options.gpu_target or DEFAULT).lower().split(",")
    wanted = sorted({_architecture(name) for name in asked})
    number = max(known for known in KNOWN if known <= wanted[0])
    assembler = find_assembler() if options.gpu_target is not None else None
    native = tuple(gpu for gpu in wanted if assembler is not None and gpu in assembler.architectures)
    notes = _notes(wanted, number, native, assembler, is_asked=options.gpu_target is not None)
    memory = KNOWN[number]
    return CompileTarget(
        name="cuda",
        device="cuda",
        description=f"sm_{number}",
        flags=("--iree-hal-target-device=cuda", f"--iree-cuda-target=sm_{number}"),
        capabilities=Target(
            "cuda",
            is_gpu=True,
            subgroup_size=32,
            max_threads=1024,
            workgroup_memory=min(_DECLARED, memory // 2),  # two workgroups on an SM
            matrix_units=number >= 70,
            matrix_stride="elements" if number >= 70 else None,
            copy_memory=_COPY_MEMORY if number >= 80 else 0,
            # Bindings and constants: IREE 3.13's driver, native_executable.h.
            limits=Limits(
                bindings=16,
                constants=64,
                memory=memory,
                declared=_DECLARED,
                threads=1024,
                sizes=(1024, 1024, 64),
                counts=(2**31 - 1, 65_535, 65_535),
            ),
        ),
        subgroup_size=32,
        native=NativeCuda(assembler, native, number) if assembler is not None and native else None,
        notes=notes,
    )


def _architecture(name: str) -> int:
    match = re.fullmatch(r"sm_(\d{2,3})[af]?", name)
    number = _NAMES.get(name, int(match[1]) if match else 0)
    if number not in KNOWN and number not in NEWER:
        numbers = ", ".join(f"sm_{n}" for n in sorted({*KNOWN, *NEWER}))
        expected = f"{numbers}, or by name {', '.join(_NAMES)}, or several: sm_80,sm_90"
        hint = "nvidia-smi --query-gpu=compute_cap --format=csv says 8.9 of an sm_89"
        raise TargetError("unknown GPU", where="--gpu-target", got=repr(name), expected=expected, hint=hint)
    return number


def _notes(
    wanted: Sequence[int], number: int, native: Sequence[int], assembler: Assembler | None, is_asked: bool
) -> tuple[str, ...]:
    """Which GPUs get what, and what more there could be."""
    notes: list[str] = []
    if native and assembler is not None:
        by = f"by ptxas {assembler.version}"
        notes.append(f"native code for {_list(native)}, {by}; other GPUs compile PTX for sm_{number}")
    missing = [gpu for gpu in wanted if gpu not in native]
    newer = [gpu for gpu in missing if gpu not in KNOWN]
    if newer:
        how = f"compiled for sm_{number}, whose PTX the driver of a newer GPU runs"
        notes.append(f"IREE 3.13 has no target {_list(newer)}: {how}")
    if missing and assembler is not None:
        notes.append(f"no native code for {_list(missing)}, which ptxas {assembler.version} does not know")
    elif missing:
        naming = "" if is_asked else "name GPUs, --gpu-target sm_80,sm_90, and "
        how = f"for native code {naming}{install_hint('cuda')}"
        notes.append(f"PTX only, which the driver compiles when it first loads it; {how}")
    return tuple(notes)


def _list(architectures: Sequence[int]) -> str:
    return ", ".join(f"sm_{gpu}" for gpu in architectures)
