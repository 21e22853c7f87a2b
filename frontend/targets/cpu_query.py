"""What the compiler makes of a CPU's name: the instruction sets that its code may contain, and its vectors' width."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from iree.compiler import ir
from iree.compiler.api import Invocation, Session
from linattn.dialect_patterns.target import STACK_BYTES
from linattn.runtime.cpu import INSTRUCTION_SETS

from ..lower.iree import execute

DEVICE_FLAGS = ("--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


UNCHECKED = {
    "x86_64": _words(
        """amx-avx512 amx-complex amx-fp16 amx-fp8 amx-movrs avx10.1 avx10.1-512 avx10.2 avx10.2-512 avx10v2aux
        avx512bmm avxifma avxneconvert avxvnniint16 avxvnniint8 ccmp cf cmpccxadd egpr jmpabs movrs ndd nf ppx
        push2pop2 raoint zu"""
    ),
    "aarch64": _words(
        """cmpbr cpa f16f32dot f16f32mm f16mm f8f16mm f8f32mm fp8 fp8dot2 fp8dot4 fp8fma fprcvt lsfe lsui pauth-lr
        sve-b16mm sve-bfscale sve-f16f32mm sve2p2 sve2p3"""
    ),
}
"""Instruction sets that no system tells of by name: code goes without them, since a load could not check for them."""

# LLVM's feature -> those that it brings with it, where any of either is an instruction set that loads check.
_IMPLIED = {
    "x86_64": {
        "ssse3": "sse3", "sse4.1": "ssse3", "sse4.2": "sse4.1", "sse4a": "sse3", "avx": "sse4.2", "f16c": "avx",
        "fma": "avx", "avx2": "avx", "fma4": "avx sse4a", "xop": "fma4", "avx512f": "avx2 f16c fma", "vaes": "avx",
        "vpclmulqdq": "avx", "sha512": "avx2", "sm3": "avx", "sm4": "avx2", "avxvnni": "avx2", "avxifma": "avx2",
        "avxneconvert": "avx2", "avxvnniint8": "avx2", "avxvnniint16": "avx2", "avx512cd": "avx512f",
        "avx512bw": "avx512f", "avx512dq": "avx512f", "avx512vl": "avx512f", "avx512ifma": "avx512f",
        "avx512vnni": "avx512f", "avx512vpopcntdq": "avx512f", "avx512vp2intersect": "avx512f",
        "avx512vbmi": "avx512bw", "avx512vbmi2": "avx512bw", "avx512bitalg": "avx512bw", "avx512bf16": "avx512bw",
        "avx512fp16": "avx512bw avx512dq avx512vl", "amx-int8": "amx-tile", "amx-bf16": "amx-tile",
    },
    "aarch64": {
        "fp16fml": "fullfp16", "sve": "fullfp16", "sve2": "sve", "sve2p1": "sve2", "f32mm": "sve", "f64mm": "sve",
        "sme": "bf16 fullfp16", "sme2": "sme", "sme2p1": "sme2", "sve2-aes": "sve2", "sve2-bitperm": "sve2",
        "sve2-sha3": "sve2 sha3", "sve2-sm4": "sve2", "sve-sha3": "sha3", "altnzcv": "flagm", "rcpc-immo": "rcpc",
        "rcpc3": "rcpc-immo", "lse128": "lse", "d128": "lse128", "v8.1a": "lse rdm", "v8.2a": "v8.1a",
        "v8.3a": "v8.2a rcpc jsconv complxnum", "v8.4a": "v8.3a dotprod flagm rcpc-immo lse2",
        "v8.5a": "v8.4a altnzcv fptoint", "v8.6a": "v8.5a bf16 i8mm", "v8.7a": "v8.6a", "v8.8a": "v8.7a mops",
        "v8.9a": "v8.8a cssc", "v9a": "v8.5a", "v9.1a": "v8.6a v9a", "v9.2a": "v8.7a v9.1a", "v9.3a": "v8.8a v9.2a",
        "v9.4a": "v8.9a v9.3a", "v9.5a": "v9.4a cpa", "v9.6a": "v9.5a cmpbr fprcvt sve2p2 lsui", "v9.7a": "v9.6a",
        "v9.8a": "v9.7a", "v8r": "lse rcpc-immo flagm",
    },
}  # fmt: skip
_ATTRIBUTE = re.compile(r'#hal\.executable\.target<"llvm-cpu", "[^"]*", \{(.*?)\}>', re.DOTALL)
_CPU, _FEATURES = re.compile(r'\bcpu = "([^"]*)"'), re.compile(r'cpu_features = "([^"]*)"')
_VECTOR_BYTES = re.compile(r"native_vector_size = (\d+)")


@dataclass(frozen=True)
class Cpu:
    """A CPU as the compiler sees it.

    Attributes:
        name: The compiler's name for it.
        flags: IREE's flags that compile for it.
        instruction_sets: What its code may contain.
        vector_bits: Width of a SIMD register.
        left_out: Instruction sets that it has and that are not used.
    """

    name: str
    flags: tuple[str, ...]
    instruction_sets: frozenset[str]
    vector_bits: int
    left_out: tuple[str, ...] = ()


@cache
def query(architecture: str, cpu: str, features: str = "", usable: frozenset[str] | None = None) -> Cpu:
    """Ask the compiler about a CPU that it knows: it ends the process where it does not.

    Args:
        architecture: ``x86_64`` or ``aarch64``.
        cpu: A name of it, or ``host``.
        features: Changes to what the name means, such as ``+avx2,-fma``.
        usable: Instruction sets to do with; None: all those that a load can check.
    """
    name, told, vector_bits = _ask(architecture, cpu, features)
    on = enabled(architecture, told.split(","))
    known = INSTRUCTION_SETS[architecture]
    unusable = on & (UNCHECKED[architecture] | (known - usable if usable is not None else frozenset[str]()))
    if unusable:
        given = told if cpu == "host" else features
        changes = ",".join([*filter(None, [given]), *(f"-{feature}" for feature in sorted(unusable))])
        kept = query(architecture, name, changes)
        return Cpu(kept.name, kept.flags, kept.instruction_sets, kept.vector_bits, tuple(sorted(unusable)))
    flags = (*_flags(architecture, cpu, features), f"--iree-llvmcpu-stack-allocation-limit={STACK_BYTES}")
    return Cpu(name, flags, frozenset(on & known), vector_bits)


def enabled(architecture: str, changes: Iterable[str]) -> frozenset[str]:
    """The features that are on after changes such as +avx2 and -fma, in order, with what each brings or needs."""
    on: set[str] = set()
    for change in changes:
        if change[:1] == "+":
            on |= _closure(architecture, change[1:])
        elif change:
            on = {feature for feature in on if change[1:] not in _closure(architecture, feature)}
    return frozenset(on)


@cache
def _closure(architecture: str, feature: str) -> frozenset[str]:
    brought = _IMPLIED[architecture].get(feature, "").split()
    return frozenset({feature}).union(*(_closure(architecture, other) for other in brought))


def _flags(architecture: str, cpu: str, features: str) -> tuple[str, ...]:
    # IREE's own loader of ELF files is in every runtime, so that one module serves all systems of an architecture.
    triple = f"--iree-llvmcpu-target-triple={architecture}-unknown-unknown-eabi-elf"
    flags = (*DEVICE_FLAGS, triple, f"--iree-llvmcpu-target-cpu={cpu}")
    return (*flags, f"--iree-llvmcpu-target-cpu-features={features}") if features else flags


@cache
def _ask(architecture: str, cpu: str, features: str) -> tuple[str, str, int]:
    """Its name, all its features, and the bits of its vectors."""
    session = Session()
    session.set_flags(*_flags(architecture, cpu, features))
    module = ir.Module.parse("module {}", session.context)
    invocation = Invocation(session)
    invocation.import_module(module.operation)
    execute(invocation, "ToPhase", "preprocessing")
    text = str(module)
    return _CPU.findall(text)[0], _FEATURES.findall(text)[0], 8 * int(_VECTOR_BYTES.findall(text)[0])
