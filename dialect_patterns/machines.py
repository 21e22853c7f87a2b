"""A hand-made kernel for each of the machines that a module has code for, as one that a dispatch calls.

    hal.executable private @NAME {
      hal.executable.variant public @x86_64_v4 target(...) { export @NAME count(its workgroups) ... its body }
      hal.executable.variant public @x86_64_v3 target(...) { export @NAME count(its workgroups) ... its body } }
    %results = flow.dispatch {@NAME::@x86_64_v4::@NAME, @NAME::@x86_64_v3::@NAME}[B](%sizes..., %tensors...)

Which variant runs is decided when the module is loaded, for all kernels alike, so what one kernel writes for another
(rows cut into tiles, scratch memory) may be another thing on each machine, in memory that has room for the largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile

from .emit.dispatch import Kernel, Variant
from .node import TensorSpec
from .target import Target


def for_machines(target: Target, make: Callable[[Target], Kernel]) -> Kernel:
    """The kernel for a target.

    Args:
        target: The machine, or the machines.
        make: The kernel for one machine.
    """
    if not target.levels:
        return make(target)
    kernels = [make(machine) for machine in target.levels]
    return replace(
        kernels[0],
        name=_name([kernel.name for kernel in kernels]),
        inputs=tuple(_largest(specs) for specs in zip(*(kernel.inputs for kernel in kernels), strict=True)),
        outputs=tuple(_largest(specs) for specs in zip(*(kernel.outputs for kernel in kernels), strict=True)),
        variants=tuple(
            Variant(machine.name, machine.executable, kernel)
            for machine, kernel in zip(target.levels, kernels, strict=True)
        ),
    )


def _largest(specs: Sequence[TensorSpec]) -> TensorSpec:
    """The type that takes the most memory; sizes that are open are the same for all."""
    return max(specs, key=lambda spec: math.prod(size for size in spec.shape if size is not None))


def _name(names: Sequence[str]) -> str:
    """What the names have in common at their start, and then what each has for itself."""
    characters = takewhile(lambda some: len(set(some)) == 1, zip(*names, strict=False))
    common = "".join(some[0] for some in characters)
    tails = dict.fromkeys(name[len(common) :] for name in names)
    return common + "_".join(tails)
