"""The x86-64 machines that a portable module has code for.

Each level is all that its code may use: exactly what IREE's runtime can ask a CPU for when a module is loaded, so that
the choice covers it (``hal.cpu`` knows no bmi, lzcnt or movbe, which x86-64-v3 has too and the kernels do without), and
below all the baseline, which the manifest has checked. Skylake's AVX-512 without VNNI takes the level below.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from linattn.dialect_patterns.target import STACK_BYTES, Limits, Target
from linattn.runtime.cpu import INSTRUCTION_SETS

BASELINE = (
    "cmov", "cx16", "cx8", "fxsr", "mmx", "popcnt", "sahf", "sse", "sse2", "sse3", "sse4.1", "sse4.2", "ssse3", "x87",
)  # fmt: skip
_V3 = ("avx", "avx2", "f16c", "fma")
_V4 = ("avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl", "avx512vnni")

# What the levels' names bring and code must do without, and LLVM's wish for vectors of 256 bits where there are wider.
_WITHOUT = ("bmi", "bmi2", "lzcnt", "movbe", "prefer-256-bit")

# IREE's own text for x86-64. LLVM orders instructions by the CPU's name: as "generic", one row of an int4 product with
# 32,000 columns took AVX2 1.57 times as long.
_EXECUTABLE = (
    '#hal.executable.target<"llvm-cpu", "embedded-elf-x86_64", {{cpu = "{cpu}", cpu_features = "{features}", '
    'data_layout = "e-m:e-p270:32:32-p271:32:32-p272:64:64-i64:64-i128:128-f80:128-n8:16:32:64-S128", '
    "iree.encoding.resolver = #iree_cpu.cpu_encoding_resolver<>, max_stack_allocation_size = {stack} : i64, "
    'native_vector_size = {bytes} : i64, target_triple = "x86_64-unknown-unknown-eabi-elf"}}>'
)


@dataclass(frozen=True)
class Level:
    """One of the machines.

    Attributes:
        name: The psABI's name, and what else there is.
        cpu: LLVM's name.
        vector_bits: Width of the SIMD registers.
        added: LLVM features beyond the baseline.
    """

    name: str
    cpu: str
    vector_bits: int
    added: tuple[str, ...]

    @property
    def features(self) -> tuple[str, ...]:
        """All LLVM features that its code may use."""
        return tuple(sorted({*BASELINE, *self.added}))

    @property
    def instruction_sets(self) -> tuple[str, ...]:
        """Those of its features that a load checks."""
        return tuple(feature for feature in self.features if feature in INSTRUCTION_SETS["x86_64"])

    @property
    def flags(self) -> str:
        """The features as ``--cpu-features`` takes them."""
        return ",".join([*(f"+{feature}" for feature in self.features), *(f"-{feature}" for feature in _WITHOUT)])

    @property
    def executable(self) -> str:
        """MLIR text of IREE's description of the machine."""
        return _EXECUTABLE.format(cpu=self.cpu, features=self.flags, bytes=self.vector_bits // 8, stack=STACK_BYTES)


LEVELS = (
    Level("x86-64-v4+vnni", "x86-64-v4", 512, (*_V3, *_V4)),
    Level("x86-64-v3", "x86-64-v3", 256, _V3),
    Level("x86-64-v2", "x86-64-v2", 128, ()),
)
"""Best first; the last one is what every machine must have."""


def portable_target(limits: Limits) -> Target:
    """Capabilities of all levels together."""
    levels = tuple(
        Target(
            level.name,
            vector_bits=level.vector_bits,
            features=frozenset(level.features),
            executable=level.executable,
            shares_weights=True,
            limits=limits,
        )
        for level in LEVELS
    )
    return replace(levels[0], name="cpu", levels=levels)


def device_attribute() -> str:
    """MLIR text of the module's ``hal.device.targets``: one device, of any of the levels."""
    executables = ", ".join(level.executable for level in LEVELS)
    return f'[#hal.device.target<"local", [{executables}]> : !hal.device]'
