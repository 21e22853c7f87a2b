"""CPUs through LLVM: the machine at hand, any x86-64 or AArch64, or named features."""

from __future__ import annotations

import platform
import re
from pathlib import Path

from linattn.dialect_patterns.target import Target
from linattn.runtime.errors import TargetError

from .base import CompileTarget, TargetOptions

_DEVICE_FLAGS = ("--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu")


def resolve(options: TargetOptions) -> CompileTarget:
    """Flags for a CPU; ``--cpu-features`` defaults to ``host``.

    Raises:
        TargetError: if a GPU option is given or the features are not of a known form.
    """
    if options.gpu_target is not None:
        raise TargetError("a GPU option for a CPU target", where="--gpu-target", hint="use --cpu-features")
    features = options.cpu_features or "host"
    if features == "host":
        flags, bits = ("--iree-llvmcpu-target-cpu=host",), _host_vector_bits()
    elif features == "generic":
        flags, bits = ("--iree-llvmcpu-target-cpu=generic",), 128
    elif re.fullmatch(r"[+-][\w.]+(,[+-][\w.]+)*", features):
        bits = 512 if "+avx512f" in features else 256 if "+avx2" in features else 128
        flags = (f"--iree-llvmcpu-target-cpu-features={features}", "--iree-llvmcpu-target-cpu=generic")
    elif re.fullmatch(r"[a-z][\w.-]*", features):
        flags, bits = (f"--iree-llvmcpu-target-cpu={features}",), 128
    else:
        raise TargetError(
            "not understood",
            where="--cpu-features",
            got=repr(features),
            expected="host | generic | a CPU name such as znver4 | features such as +avx2,+fma",
        )
    return CompileTarget(
        name="cpu",
        device="local-task",
        description=f"{platform.machine()} {features}",
        flags=_DEVICE_FLAGS + flags,
        capabilities=Target("cpu", vector_bits=bits),
    )


def _host_vector_bits() -> int:
    """Width of this machine's SIMD registers; 128 where it cannot be told."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    return 512 if " avx512f" in text else 256 if " avx2" in text else 128
