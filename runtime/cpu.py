"""The CPU at hand: its architecture and its instruction sets, in LLVM's words, against what a module needs.

Only instruction sets that compiled code may contain are named here (a compiler does not come upon AES by itself), and
only those that some system tells: the frontend compiles for no other, so that nothing runs that was not checked.
"""

from __future__ import annotations

import ctypes
import importlib
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from . import amx
from .errors import TargetError
from .manifest_target import Target

# LLVM name -> the word in the flags of /proc/cpuinfo.
_X86_64 = {
    "cx16": "cx16", "sahf": "lahf_lm", "popcnt": "popcnt", "lzcnt": "abm", "bmi": "bmi1", "bmi2": "bmi2", "tbm": "tbm",
    "movbe": "movbe", "sse3": "pni", "ssse3": "ssse3", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "sse4a": "sse4a",
    "avx": "avx", "f16c": "f16c", "fma": "fma", "fma4": "fma4", "xop": "xop", "avx2": "avx2", "gfni": "gfni",
    "avxvnni": "avx_vnni", "avx512f": "avx512f", "avx512cd": "avx512cd", "avx512bw": "avx512bw",
    "avx512dq": "avx512dq", "avx512vl": "avx512vl", "avx512ifma": "avx512ifma", "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2", "avx512vnni": "avx512_vnni", "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq", "avx512bf16": "avx512_bf16", "avx512fp16": "avx512_fp16",
    "amx-tile": "amx_tile", "amx-int8": "amx_int8", "amx-bf16": "amx_bf16",
}  # fmt: skip
# LLVM name -> the bit of Linux's HWCAP (HWCAP2 from 64 on), and what macOS calls it.
_AARCH64 = {
    "lse": (8, "LSE"), "fullfp16": (10, "FP16"), "rdm": (12, "RDM"), "jsconv": (13, "JSCVT"),
    "complxnum": (14, "FCMA"), "rcpc": (15, "LRCPC"), "sha3": (17, "SHA3"), "dotprod": (20, "DotProd"),
    "sve": (22, "SVE"), "fp16fml": (23, "FHM"), "lse2": (25, "LSE2"), "rcpc-immo": (26, "LRCPC2"),
    "flagm": (27, "FlagM"), "sve2": (65, "SVE2"), "altnzcv": (71, "FlagM2"), "fptoint": (72, "FRINTTS"),
    "f32mm": (74, "F32MM"), "f64mm": (75, "F64MM"), "i8mm": (77, "I8MM"), "bf16": (78, "BF16"), "cssc": (98, "CSSC"),
    "sve2p1": (100, "SVE2p1"), "mops": (107, "MOPS"), "sve-b16b16": (109, "SVE_B16B16"), "rcpc3": (110, "LRCPC3"),
    "lse128": (111, "LSE128"), "lut": (113, "LUT"), "faminmax": (114, "FAMINMAX"),
}  # fmt: skip
INSTRUCTION_SETS: Mapping[str, frozenset[str]] = {"x86_64": frozenset(_X86_64), "aarch64": frozenset(_AARCH64)}
"""Architecture -> its instruction sets beyond those that every CPU of it has."""

_MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
_V2 = frozenset({"cx16", "sahf", "popcnt", "sse3", "ssse3", "sse4.1", "sse4.2"})
_V3 = _V2 | {"avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe"}
_V4 = _V3 | {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}
_LEVELS = {"x86-64-v4": _V4, "x86-64-v3": _V3, "x86-64-v2": _V2}
_NUMPY = {
    "sse41": "sse4.1", "sse42": "sse4.2", "fma3": "fma", "lahf": "sahf", "asimdhp": "fullfp16", "asimddp": "dotprod",
    "asimdfhm": "fp16fml",
}  # fmt: skip
_CPUINFO = {"fp16": "fullfp16"}
_AT_HWCAP = (16, 26)


def machine_architecture() -> str:
    """What this process runs on, as LLVM calls it."""
    machine = platform.machine().lower()
    return _MACHINES.get(machine, machine)


@cache
def machine_features() -> frozenset[str]:
    """The `INSTRUCTION_SETS` of this machine that its system tells of and lets this process use."""
    architecture = machine_architecture()
    if architecture == "x86_64":
        found = _linux_x86_64() or _libraries()
        if found & amx.FEATURES and not amx.permitted():
            found -= amx.FEATURES
    elif architecture == "aarch64":
        found = (_linux_aarch64() if sys.platform in ("linux", "android") else _macos_aarch64()) or _libraries()
    else:
        found = set[str]()
    return INSTRUCTION_SETS.get(architecture, frozenset[str]()) & found


def missing_instruction_sets(target: Target) -> list[str]:
    """What a module's code needs and this machine lacks: instruction sets, or the architecture itself."""
    if target.architecture is None:
        return []
    if target.architecture != machine_architecture():
        return [target.architecture]
    return [name for name in target.instruction_sets if name not in machine_features()]


def chosen_level(target: Target) -> str | None:
    """Which level of a portable module this machine runs; None for code for one kind of CPU.

    The module itself asks the same questions, in the same order, when it is loaded.
    """
    fitting = (level.name for level in target.levels if machine_features() >= {*level.instruction_sets})
    return next(fitting, None)


def check_cpu(where: str, target: Target) -> None:
    """Refuses code that would end this process with an illegal instruction.

    Raises:
        TargetError: the code is for another architecture, or needs instruction sets that this machine lacks.
    """
    missing, here = missing_instruction_sets(target), machine_architecture()
    if missing == [target.architecture]:
        hint = f"compile with --target-triple {here} for this one"
        message = "compiled for another architecture"
        raise TargetError(message, where=where, got=f"a machine of {here}", expected=target.architecture, hint=hint)
    if missing:
        level = f", or {_level()} for others like it" if here == "x86_64" else ""
        hint = f"compile with --cpu-features host on this machine{level}"
        message = f"compiled for {target.description}, whose instruction sets this CPU lacks"
        got = f"a CPU without {', '.join(missing)}"
        if amx.FEATURES.issuperset(missing) and amx.FEATURES & _linux_x86_64():
            message = f"compiled for {target.description}, whose matrix unit the system keeps from this process"
            got = "arch_prctl(ARCH_REQ_XCOMP_PERM) refused"
        raise TargetError(message, where=where, got=got, hint=hint)


def describe_features() -> str:
    """This machine's instruction sets for people: its level of x86-64, and what it has beyond."""
    level = _level() if machine_architecture() == "x86_64" else machine_architecture()
    beyond = ", ".join(sorted(machine_features() - _LEVELS.get(level, frozenset())))
    return f"{level} with {beyond}" if beyond else level


def _level() -> str:
    """The best level of x86-64 that this machine has."""
    return next((name for name, needed in _LEVELS.items() if needed <= machine_features()), "generic")


def _linux_x86_64() -> set[str]:
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    words = set(match[1].split()) if match else set[str]()
    return {name for name, word in _X86_64.items() if word in words}


def _linux_aarch64() -> set[str]:
    """From the kernel's own words to the process; /proc/cpuinfo shows the host's CPU under an emulator."""
    try:
        getauxval: Any = ctypes.CDLL(None).getauxval
    except (OSError, AttributeError):
        return set()
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    words = [int(getauxval(which)) for which in _AT_HWCAP]
    return {name for name, (bit, _) in _AARCH64.items() if words[bit // 64] >> (bit % 64) & 1}


def _macos_aarch64() -> set[str]:
    told = re.findall(r"FEAT_(\w+): 1", _output("sysctl", "hw.optional.arm"))
    return {name for name, (_, feature) in _AARCH64.items() if feature in told}


def _libraries() -> set[str]:
    """What numpy and IREE's own tool find where the system has no list of its own."""
    found = {name for name, value in _numpy_features() if value}
    found = {_NUMPY.get(name, name) for name in (word.lower() for word in found)}
    libraries: Any = importlib.import_module("iree._runtime_libs")
    lines = _output(str(Path(libraries.__path__[0]) / "iree-cpuinfo")).splitlines()
    words = [line.split() for line in lines]
    return found | {_CPUINFO.get(word[0], word[0]) for word in words if len(word) == 2 and word[1] == "1"}


def _numpy_features() -> Iterable[tuple[str, bool]]:
    for name in ("numpy._core._multiarray_umath", "numpy.core._multiarray_umath"):
        try:
            features: Mapping[str, bool] = importlib.import_module(name).__cpu_features__
            return features.items()
        except (ImportError, AttributeError):
            continue
    return ()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
