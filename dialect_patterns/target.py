"""What a lowering may ask about the machine to compile for: capabilities, never a target's name."""

from __future__ import annotations

from dataclasses import dataclass

STACK_BYTES = 128 * 1024
"""What a kernel's stack may have (CPU), where IREE refuses more than 32 KiB unless told: sums and unpacked operands of
many rows lie there. IREE's workers have 128 KiB by default, some of which is not a kernel's; more is a crash."""


@dataclass(frozen=True)
class Limits:
    """What a driver takes of one dispatch; the defaults are what every GPU driver of IREE's takes.

    Attributes:
        bindings: Buffers.
        constants: 32-bit push constants.
        memory: Bytes of memory that a workgroup shares, however they are asked for.
        declared: How many of them the code may declare by itself.
        threads: Threads of a workgroup.
        sizes: Threads of a workgroup along x, y and z.
        counts: Workgroups along x, y and z.
    """

    bindings: int = 16
    constants: int = 32
    memory: int = 16_384
    declared: int = 16_384
    threads: int = 128
    sizes: tuple[int, int, int] = (128, 128, 64)
    counts: tuple[int, int, int] = (65_535, 65_535, 65_535)


@dataclass(frozen=True)
class Target:
    """Capabilities of the machine to compile for.

    Attributes:
        name: The target's word, for reports only.
        is_gpu: Whether work runs in workgroups of many threads with subgroups.
        vector_bits: Width of a SIMD register in bits (CPU), 0 where that is no notion.
        subgroup_size: Threads of a subgroup, 0 where there are none.
        features: Instruction sets (CPU) that a kernel may use by name, as LLVM calls them.
        matrix_stride: Where subgroups multiply 16 x 16 matrices of f16 with sums in f32: what the stride between rows
            of such a matrix counts in memory of 16-byte chunks, ``chunks`` (SPIR-V) or ``elements`` (NVVM). None where
            there are no such products.
        workgroup_memory: Bytes of a workgroup's memory that a kernel may use (GPU).
        copy_memory: The same of a kernel whose threads copy to it past their registers (``cp.async``); 0 where they
            cannot. Warps that can also have ``ldmatrix`` and ``mma.sync`` of 16 bits (CUDA, sm_80).
        max_threads: Threads of a workgroup that a kernel may use (GPU).
        matrix_units: Whether 16-bit matrix products have units of their own.
        thread_values: How much of a state a thread best holds for one token (GPU): more makes its loads wait.
        cold_code: Whether a kernel's code is not in the caches when a step comes to it (GPU): what is unrolled waits.
        limits: What the driver takes of any dispatch, IREE's own included.
        executable: MLIR text of IREE's description of the machine (CPU), where a module has code for several.
        shares_weights: Whether code for other vector widths reads the same packed weights (CPU).
        fast_math: Whether products of f32 may be of terms of 16 bits.
        levels: The machines that a module has code for, best first, where those are several; what is asked of this
            target itself is then asked of all.
    """

    name: str
    is_gpu: bool = False
    vector_bits: int = 0
    subgroup_size: int = 0
    matrix_stride: str | None = None
    workgroup_memory: int = 16_384
    copy_memory: int = 0
    max_threads: int = 128
    matrix_units: bool = False
    thread_values: int = 128
    cold_code: bool = False
    features: frozenset[str] = frozenset()
    limits: Limits = Limits()
    executable: str = ""
    shares_weights: bool = False
    fast_math: bool = False
    levels: tuple[Target, ...] = ()

    @property
    def machines(self) -> tuple[Target, ...]:
        """The machines that there is code for, best first."""
        return self.levels or (self,)
