"""CPUs through LLVM: the machine at hand, any x86-64 or AArch64, or named features.

IREE's own settings stay as they are: products with weights are hand-made kernels over weights packed at compile time
(``dialect_patterns.mat_mul``), one copy for decode and prefill, nothing packed when loading. Measured in one run on 2
cores of Zen 2 (fp32, 149 M parameters; prompt of 64 and one decode step, medians in ms, resident MiB): these kernels 80
and 17.1, 639 MiB; ``--iree-opt-data-tiling`` 90 and 16.6, 1080 MiB; IREE's defaults 264 and 50, 639 MiB; ONNX Runtime
109 and 17.5. Worker threads that spin before they sleep (``--task_worker_spin_us``) made no difference.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from linattn.dialect_patterns.target import Limits, Target
from linattn.runtime.cpu import machine_architecture, machine_features
from linattn.runtime.errors import TargetError
from linattn.runtime.manifest_target import CpuLevel

from .base import CompileTarget, TargetOptions
from .cpu_levels import LEVELS, device_attribute, portable_target
from .cpu_names import CPUS, FEATURES

# IREE 3.13's loader of CPU code (executable_library.h), of bindings its VM (modules/hal/module.c: 64 load, but no call
# of more than 32 goes through); a workgroup is one thread with a stack.
_ANY = 2**32 - 1
_COUNTS = (_ANY, _ANY, 65_535)
LIMITS = Limits(32, 64, memory=_ANY, declared=_ANY, threads=_ANY, sizes=_COUNTS, counts=_COUNTS)

HOST, GENERIC, PORTABLE = "host", "generic", "portable"
_SPELLINGS = {"x86_64": "x86_64", "amd64": "x86_64", "x64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
_TRIPLE = re.compile(r"(\w+)(-(\w+-)?(linux|darwin|macos|windows|android)[\w.]*(-\w+)?)?")
_TRIPLES = "x86_64 or aarch64: x86_64-linux-gnu, aarch64-linux-gnu, arm64-apple-macos, x86_64-pc-windows-msvc, ..."
_WHERE = "--cpu-features"
# What code cannot do without: where it is left out, LLVM dies, or prints errors and goes on.
_IN_EVERY = {"x86_64": ("64bit", "sse", "sse2", "x87", "cmov", "cx8"), "aarch64": ("fp-armv8", "neon")}


def resolve(options: TargetOptions) -> CompileTarget:
    """Flags for a CPU; ``--cpu-features`` defaults to ``host``, for a target triple to ``generic``.

    Raises:
        TargetError: if a GPU option is given, or a name is not known for the architecture.
    """
    from .cpu_query import query  # the targets can be listed where there is no compiler

    if options.gpu_target is not None:
        raise TargetError("a GPU option for a CPU target", where="--gpu-target", hint="use --cpu-features")
    architecture = _architecture(options.target_triple)
    default = HOST if options.target_triple is None else GENERIC
    asked = default if options.cpu_features is None else options.cpu_features
    if asked == PORTABLE:
        return _portable(architecture)
    notes: list[str] = []
    if asked == HOST:
        if architecture != machine_architecture():
            expected = "a CPU's name, such as cortex-a76, or generic"
            raise TargetError(f"this machine is no {architecture}", where=_WHERE, got=asked, expected=expected)
        cpu = query(architecture, HOST, usable=machine_features())
    elif asked.startswith(("+", "-")):
        changes = asked.split(",")
        _check_features(architecture, changes)
        cpu = query(architecture, GENERIC, asked)
        if "avx2" in cpu.instruction_sets and "f16c" not in cpu.instruction_sets:
            notes.append("without f16c, f16 models are slow: add +f16c, which every CPU with avx2 has")
    else:
        _check_name(architecture, asked)
        cpu = query(architecture, asked)
    if cpu.left_out:
        notes.append(f"not used, since not every system tells of them: {', '.join(cpu.left_out)}")
    return CompileTarget(
        name="cpu",
        device="local-task",
        description=f"{architecture} {asked}" + (f" ({cpu.name})" if asked == HOST else ""),
        flags=cpu.flags,
        capabilities=Target("cpu", vector_bits=cpu.vector_bits, features=cpu.instruction_sets, limits=LIMITS),
        architecture=architecture,
        instruction_sets=tuple(sorted(cpu.instruction_sets)),
        notes=tuple(notes),
    )


def _portable(architecture: str) -> CompileTarget:
    """All levels of x86-64."""
    from .cpu_query import DEVICE_FLAGS

    if architecture != "x86_64":
        hint = "name a CPU, or generic, which runs on all of them"
        raise TargetError(f"one module for many CPUs of {architecture}", where=_WHERE, got=PORTABLE, hint=hint)
    return CompileTarget(
        name="cpu",
        device="local-task",
        description=f"x86_64 {PORTABLE}: {', '.join(level.name for level in LEVELS)}",
        flags=DEVICE_FLAGS,
        capabilities=portable_target(LIMITS),
        architecture=architecture,
        instruction_sets=LEVELS[-1].instruction_sets,
        levels=tuple(CpuLevel(level.name, level.instruction_sets) for level in LEVELS),
        device_attribute=device_attribute(),
    )


def _architecture(triple: str | None) -> str:
    """The architecture of a triple; the module is the same for every system."""
    match = _TRIPLE.fullmatch(machine_architecture() if triple is None else triple)
    architecture = _SPELLINGS.get(match[1]) if match else None
    if architecture is None:
        where, got = ("this machine", machine_architecture()) if triple is None else ("--target-triple", repr(triple))
        raise TargetError("not a CPU to compile for", where=where, got=got, expected=_TRIPLES)
    return architecture


def _check_name(architecture: str, name: str) -> None:
    if name in CPUS[architecture]:
        return
    others = [other for other, names in CPUS.items() if name in names]
    if others:
        hint = f"add --target-triple {others[0]}-linux-gnu"
        raise TargetError(
            f"a CPU of {others[0]}", where=_WHERE, got=repr(name), expected=f"one of {architecture}", hint=hint
        )
    near = _near(name, [HOST, PORTABLE, *CPUS[architecture]])
    names = "a CPU's name such as znver4 or cortex-a76"
    expected = near or f"host | portable | generic | {names} | features such as +avx2,+fma,+f16c"
    raise TargetError(
        f"no CPU of {architecture} that the compiler knows", where=_WHERE, got=repr(name), expected=expected
    )


def _check_features(architecture: str, changes: Sequence[str]) -> None:
    from .cpu_query import UNCHECKED

    for change in changes:
        name = change[1:]
        if change[:1] not in ("+", "-") or not name:
            expected = "features that each begin with + or -, such as +avx2,+fma,+f16c"
            raise TargetError("not understood", where=_WHERE, got=repr(change), expected=expected)
        if name not in FEATURES[architecture]:
            expected = _near(name, FEATURES[architecture]) or f"features of {architecture}, as LLVM calls them"
            message = f"no feature of {architecture} that the compiler knows"
            raise TargetError(message, where=_WHERE, got=repr(change), expected=expected)
        if change[0] == "-" and name in _IN_EVERY[architecture]:
            raise TargetError(f"every {architecture} has it", where=_WHERE, got=repr(change), hint="leave it out")
        if change[0] == "+" and name in UNCHECKED[architecture]:
            hint = "leave it out"
            raise TargetError("no system tells whether a CPU has it", where=_WHERE, got=repr(change), hint=hint)


def _near(name: str, names: Sequence[str]) -> str:
    return " | ".join(difflib.get_close_matches(name.lower(), names, 3))
