"""What a lowering may ask about the machine to compile for: capabilities, never a target's name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """Capabilities of the machine to compile for.

    Attributes:
        name: The target's word, for reports only.
        is_gpu: Whether work runs in workgroups of many threads with subgroups.
        vector_bits: Width of a SIMD register in bits (CPU), 0 where that is no notion.
        subgroup_size: Threads of a subgroup, 0 where there are none.
        features: Instruction sets (CPU) that a kernel may use by name, as LLVM calls them.
        max_threads: Threads of a workgroup (GPU).
        matrix_units: Whether 16-bit matrix products have units of their own.
    """

    name: str
    is_gpu: bool = False
    vector_bits: int = 0
    subgroup_size: int = 0
    max_threads: int = 128
    matrix_units: bool = False
    features: frozenset[str] = frozenset()
