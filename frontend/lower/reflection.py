"""The reflection attributes of a module: texts that a runtime reads from one of its functions."""

from __future__ import annotations

from iree.compiler import ir
from linattn.runtime.manifest import REFLECTION_KEY


def set_reflection(module: ir.Operation, key: str, text: str) -> None:
    """Write a text beside the manifest, or the manifest anew.

    Args:
        module: In any of IREE's phases up to ``hal``.
        key: Name of the text.
        text: What to write.
    """
    for operation in module.regions[0].blocks[0].operations:
        if operation.operation.name == "util.func" and REFLECTION_KEY in _texts(operation.operation):
            add_text(operation.operation, key, text)
            return


def add_text(function: ir.Operation, key: str, text: str) -> None:
    """Write a text into a function's own reflection attributes.

    Args:
        function: A ``util.func``.
        key: Name of the text.
        text: What to write.
    """
    function.attributes["iree.reflection"] = ir.DictAttr.get(_texts(function) | {key: ir.StringAttr.get(text)})


def _texts(function: ir.Operation) -> dict[str, ir.Attribute]:
    attributes = function.attributes
    if "iree.reflection" not in attributes:
        return {}
    reflection = ir.DictAttr(attributes["iree.reflection"])
    return {named.name: named.attr for named in (reflection[i] for i in range(len(reflection)))}
