"""The executables of a module after IREE's phase ``executable-targets``: code in dialects of its own, not yet bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from iree.compiler import ir

_VERSION = re.compile(r"vce<v(\d+)\.(\d+)")


def exports(module: ir.Operation) -> Iterator[tuple[ir.Operation, list[ir.Operation]]]:
    """The exports of all executables, each with the globals and functions of its code."""
    for executable in _inside(module, "hal.executable"):
        for variant in _inside(executable, "hal.executable.variant"):
            code = [op for inner in _inside(variant, "builtin.module") for op in _code(inner)]
            for export in _inside(variant, "hal.executable.export"):
                yield export, code


def state_spirv_versions(module: ir.Operation) -> None:
    """Have SPIR-V say the version that it is written for.

    IREE 3.13 writes for the version of the target (what an entry point lists, which decorations there are) and puts the
    least version that has the instructions at the head; below 1.4 that is not valid.
    """
    for executable in _inside(module, "hal.executable"):
        for variant in _inside(executable, "hal.executable.variant"):
            for inner in _inside(variant, "builtin.module"):
                for code in _inside(inner, "spirv.module"):
                    wanted = _VERSION.search(str(inner.attributes["spirv.target_env"]))
                    said = str(code.attributes["vce_triple"])
                    if wanted and (int(wanted[1]), int(wanted[2])) >= (1, 4):
                        text = _VERSION.sub(f"vce<v{wanted[1]}.{wanted[2]}", said)
                        code.attributes["vce_triple"] = ir.Attribute.parse(text)


def _inside(parent: ir.Operation, name: str) -> list[ir.Operation]:
    return [op for op in _operations(parent) if op.name == name]


def _code(module: ir.Operation) -> list[ir.Operation]:
    return [op for one in _inside(module, "spirv.module") or [module] for op in _operations(one)]


def _operations(parent: ir.Operation) -> list[ir.Operation]:
    return [op.operation for region in parent.regions for block in region.blocks for op in block.operations]
