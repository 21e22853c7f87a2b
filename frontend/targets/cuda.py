"""NVIDIA GPUs through PTX. IREE 3.13 knows architectures up to sm_89; newer GPUs run that PTX."""

from __future__ import annotations

import re

from linattn.dialect_patterns.target import Limits, Target
from linattn.runtime.errors import TargetError

from .base import CompileTarget, TargetOptions

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
_DECLARED = 49_152
DEFAULT = "sm_80"
_NAMES = {
    "volta": 70, "turing": 75, "ampere": 80, "a100": 80, "ada": 89, "l4": 89, "hopper": 90, "h100": 90, "h200": 90,
    "blackwell": 100, "b200": 100,
}  # fmt: skip


def resolve(options: TargetOptions) -> CompileTarget:
    """Flags for an NVIDIA GPU; ``--gpu-target`` defaults to sm_80, whose PTX runs on everything since the A100.

    Raises:
        TargetError: if a CPU option is given or the architecture is not known.
    """
    if options.cpu_features is not None:
        raise TargetError("a CPU option for a GPU target", where="--cpu-features", hint="use --gpu-target")
    if options.target_triple is not None:
        raise TargetError("a CPU option for a GPU target", where="--target-triple", hint="use --gpu-target")
    asked = (options.gpu_target or DEFAULT).lower()
    match = re.fullmatch(r"sm_(\d{2,3})[af]?", asked)
    number = _NAMES.get(asked, int(match[1]) if match else 0)
    notes: tuple[str, ...] = ()
    if number > NEWEST:
        notes = (
            f"IREE 3.13 has no target {asked}: compiled for sm_{NEWEST}, whose PTX the driver of a newer GPU runs",
        )
        number = NEWEST
    if number not in KNOWN:
        expected = ", ".join(f"sm_{n}" for n in KNOWN) + " or newer"
        raise TargetError("unknown GPU", where="--gpu-target", got=repr(asked), expected=expected)
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
            workgroup_memory=min(_DECLARED, memory // 2),  # IREE takes what the code declares once more at the launch
            matrix_units=number >= 70,
            matrix_stride="elements" if number >= 70 else None,
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
        notes=notes,
    )
