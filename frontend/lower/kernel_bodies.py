"""The bodies of hand-made kernels, out of the module while IREE converts and schedules what calls them.

To IREE's passes over the host code a kernel is an opaque object. They walk, fold, verify and number all that is inside
all the same, again and again, and the kernels, written out as registers and their products, are most of the module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from iree.compiler import ir

from .executables import inside, operations

_BODY = "linattn.body"


class KernelBodies:
    """What was taken out of a module.

    Args:
        module: The module; its kernels are empty afterwards. While they are, nothing may call them: in its phase
            ``global-optimization`` IREE runs what depends on constants alone.
    """

    def __init__(self, module: ir.Operation) -> None:
        self._bodies: list[list[Any]] = []
        for inner in _inner_modules(module):
            contents: list[Any] = operations(inner)
            symbols = [ir.StringAttr(op.attributes["sym_name"]).value for op in contents if op.name == "func.func"]
            if not symbols:
                continue
            # The number: kernels that are equal while they are empty would become one.
            number = f"attributes {{{_BODY} = {len(self._bodies)}}}"
            text = "".join(f"func.func @{symbol}() {number} {{ return }}\n" for symbol in symbols)
            parsed: Any = ir.Module.parse(text)
            self._bodies.append([op.detach_from_parent() for op in contents])
            empty: list[Any] = operations(parsed.operation)
            for op in empty:
                _append(inner, op.detach_from_parent())

    def put_back(self, module: ir.Operation) -> None:
        """Put the bodies back.

        Args:
            module: The module, up to the phase ``executable-sources``, which makes executables of the kernels.
        """
        for inner in _inner_modules(module):
            empty: list[Any] = [op for op in operations(inner) if _BODY in op.attributes]
            if not empty:
                continue
            body = self._bodies[ir.IntegerAttr(empty[0].attributes[_BODY]).value]
            for op in empty:
                op.erase()
            for op in body:
                _append(inner, op.clone() if op.attached else op)


def _inner_modules(module: ir.Operation) -> Iterator[ir.Operation]:
    for op in operations(module):
        variants = [op] if op.name == "hal.executable.source" else inside(op, "hal.executable.variant")
        for variant in variants:
            yield from inside(variant, "builtin.module")


def _append(module: ir.Operation, op: Any) -> None:
    point: Any = ir.InsertionPoint(module.regions[0].blocks[0])
    point.insert(op)
