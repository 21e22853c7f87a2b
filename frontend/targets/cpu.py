"""CPUs through LLVM: the machine at hand, any x86-64 or AArch64, or named features.

IREE's own settings stay as they are: products with weights are hand-made kernels over weights packed at compile time
(``dialect_patterns.mat_mul``), one copy for decode and prefill, nothing packed when loading. Measured in one run on 2
cores of Zen 2 (fp32, 149 M parameters; prompt of 64 and one decode step, medians in ms, resident MiB): these kernels 80
and 17.1, 639 MiB; ``--iree-opt-data-tiling`` 90 and 16.6, 1080 MiB; IREE's defaults 264 and 50, 639 MiB; ONNX Runtime
109 and 17.5. Worker threads that spin before they sleep (``--task_worker_spin_us``) made no difference.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path

from linattn.dialect_patterns.target import Limits, Target
from linattn.runtime.errors import TargetError

from .base import CompileTarget, TargetOptions

# IREE 3.13's loader of CPU code (executable_library.h); a workgroup is one thread with a stack.
_ANY = 2**32 - 1
_COUNTS = (_ANY, _ANY, 65_535)
LIMITS = Limits(64, 64, memory=_ANY, declared=_ANY, threads=_ANY, sizes=_COUNTS, counts=_COUNTS)

_DEVICE_FLAGS = ("--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu")

# Features of CPUs by LLVM name: the instruction sets that kernels use by name, and those that set the vector width.
_AVX2 = frozenset({"avx2"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw"}
_VNNI = _AVX512 | {"avx512vnni"}
NAMED = {
    **dict.fromkeys(("x86-64-v3", "haswell", "broadwell", "skylake", "znver1", "znver2", "znver3"), _AVX2),
    **dict.fromkeys(("alderlake", "raptorlake", "sierraforest"), _AVX2 | {"avxvnni"}),
    **dict.fromkeys(("x86-64-v4", "skylake-avx512"), _AVX512),
    **dict.fromkeys(("cascadelake", "icelake-server", "icelake-client", "znver4"), _VNNI),
    **dict.fromkeys(("sapphirerapids", "graniterapids", "znver5"), _VNNI | {"avxvnni"}),
    **dict.fromkeys(("neoverse-n1", "neoverse-v1", "neoverse-v2", "apple-m1", "apple-m2"), frozenset({"dotprod"})),
}
# How /proc/cpuinfo calls them.
_CPUINFO = {
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512_vnni": "avx512vnni",
    "avx_vnni": "avxvnni",
    "asimddp": "dotprod",
}


def resolve(options: TargetOptions) -> CompileTarget:
    """Flags for a CPU; ``--cpu-features`` defaults to ``host``.

    Raises:
        TargetError: if a GPU option is given or the features are not of a known form.
    """
    if options.gpu_target is not None:
        raise TargetError("a GPU option for a CPU target", where="--gpu-target", hint="use --cpu-features")
    asked = options.cpu_features or "host"
    notes: tuple[str, ...] = ()
    if asked == "host":
        flags, features = ("--iree-llvmcpu-target-cpu=host",), _host_features()
    elif asked == "generic":
        flags, features = ("--iree-llvmcpu-target-cpu=generic",), frozenset[str]()
    elif re.fullmatch(r"[+-][\w.]+(,[+-][\w.]+)*", asked):
        flags = (f"--iree-llvmcpu-target-cpu-features={asked}", "--iree-llvmcpu-target-cpu=generic")
        features = _named_features(asked.split(","))
        if "avx2" in features and "f16c" not in features:
            notes = ("without f16c, f16 models are slow: add +f16c, which every CPU with avx2 has",)
    elif re.fullmatch(r"[a-z][\w.-]*", asked):
        flags, features = (f"--iree-llvmcpu-target-cpu={asked}",), NAMED.get(asked, frozenset[str]())
        if asked not in NAMED:
            notes = (f"the features of {asked} are not known to kernels, which use 128 bits: list them as +avx2,...",)
    else:
        raise TargetError(
            "not understood",
            where="--cpu-features",
            got=repr(asked),
            expected="host | generic | a CPU name such as znver4 | features such as +avx2,+fma,+f16c",
        )
    return CompileTarget(
        name="cpu",
        device="local-task",
        description=f"{platform.machine()} {asked}",
        flags=_DEVICE_FLAGS + flags,
        capabilities=Target("cpu", vector_bits=_vector_bits(features), features=features, limits=LIMITS),
        notes=notes,
    )


def _named_features(changes: list[str]) -> frozenset[str]:
    """What a list such as +avx2,-fma adds."""
    return frozenset(change[1:] for change in changes if change[0] == "+" and f"-{change[1:]}" not in changes)


def _vector_bits(features: frozenset[str]) -> int:
    """Width of the SIMD registers."""
    return 512 if "avx512f" in features else 256 if "avx2" in features else 128


def _host_features() -> frozenset[str]:
    """What this machine has of the features that matter here; nothing where it cannot be told."""
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set[str]()
    return frozenset(name for word, name in _CPUINFO.items() if word in words)
