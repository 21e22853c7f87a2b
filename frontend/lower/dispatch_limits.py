"""Every dispatch of a finished module against what the target's driver takes, IREE's own dispatches included.

A module that breaks a limit compiles and does not load, or worse. Two looks into IREE's pipeline: at the executables
when their code is there and not yet serialised (bindings, constants, threads, memory), and at the host code when the
numbers of workgroups are computed (those that are constants by then).

Source: IREE 3.13, ``native_executable.c`` of the CUDA driver, ``executable.c`` of the Vulkan driver,
``executable_library.h``; Vulkan 1.3, section Limits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from iree.compiler import ir
from linattn.dialect_patterns.target import Limits, Target
from linattn.runtime.errors import LoweringError

from .executables import kernels

_NAMED_NODES = 3


class DispatchLimits:
    """Checks a module on its way through IREE's compiler.

    Args:
        target: Whose driver.
        description: The target, for errors.
        nodes: Name of a dispatch -> nodes of the ONNX graph that it came from.
    """

    def __init__(self, target: Target, description: str, nodes: Mapping[str, Sequence[str]]) -> None:
        self._limits: Limits = target.limits
        self._description = description
        self._nodes = nodes

    def check_kernels(self, module: ir.Operation) -> None:
        """Check each kernel's bindings, constants, threads and memory.

        Args:
            module: After the phase ``executable-targets``.

        Raises:
            LoweringError: if one has more of something than the driver takes.
        """
        for kernel in kernels(module):
            name = kernel.name
            self._check(name, "bindings", kernel.bindings, self._limits.bindings)
            self._check(name, "push constants", kernel.constants, self._limits.constants)
            for size, limit, axis in zip(kernel.sizes, self._limits.sizes, "xyz", strict=False):
                self._check(name, f"threads of a workgroup along {axis}", size, limit)
            self._check(name, "threads of a workgroup", kernel.threads, self._limits.threads)
            self._check(name, "declared bytes of shared memory", kernel.declared, self._limits.declared)
            self._check(name, "bytes of shared memory", kernel.memory, self._limits.memory)

    def check_counts(self, module: ir.Operation) -> None:
        """Check the numbers of workgroups that are known.

        Args:
            module: After the phase ``hal``.

        Raises:
            LoweringError: if a dispatch has more workgroups than the driver takes.
        """
        found: list[tuple[str, list[int | None]]] = []

        def visit(op: ir.Operation) -> ir.WalkResult:
            if op.name == "hal.command_buffer.dispatch":
                found.append((_called(op), [_constant(value) for value in _counts(op)]))
            return ir.WalkResult.ADVANCE

        module.walk(visit)
        for name, counts in found:
            for count, limit, axis in zip(counts, self._limits.counts, "xyz", strict=True):
                if count is not None:
                    self._check(name, f"workgroups along {axis}", count, limit)

    def _check(self, name: str, what: str, got: int, limit: int) -> None:
        if got <= limit:
            return
        nodes = self._nodes.get(name, ())
        named = ", ".join(f"'{node}'" for node in nodes[:_NAMED_NODES])
        more = f" and {len(nodes) - _NAMED_NODES} more" if len(nodes) > _NAMED_NODES else ""
        raise LoweringError(
            f"the dispatch {name} does not run on the target: {what}",
            where=f"node {named}{more}" if named else None,
            got=got,
            expected=f"at most {limit} ({self._description})",
            hint="name the GPU with --gpu-target if it offers more; else report the model",
        )


def _counts(op: ir.Operation) -> list[ir.Value]:
    """The operands of a dispatch that are its numbers of workgroups, after command buffer, executable and ordinal."""
    return [op.operands[i] for i in range(3, 6)]


def _called(op: ir.Operation) -> str:
    """Name of the export that a dispatch calls; of its executable where the ordinal is not looked up."""
    owner: Any = op.operands[2].owner
    if getattr(owner, "name", "") == "hal.executable.lookup.function":
        return str(owner.attributes["entry_point"]).rpartition("::@")[2].strip('"')
    return str(op.location)


def _constant(value: ir.Value) -> int | None:
    owner: Any = value.owner
    if getattr(owner, "name", "") == "arith.constant":
        return ir.IntegerAttr(owner.attributes["value"]).value
    return None
