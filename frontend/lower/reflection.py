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
        attributes = operation.attributes
        if operation.operation.name != "util.func" or "iree.reflection" not in attributes:
            continue
        reflection = ir.DictAttr(attributes["iree.reflection"])
        entries = {named.name: named.attr for named in (reflection[i] for i in range(len(reflection)))}
        if REFLECTION_KEY in entries:
            attributes["iree.reflection"] = ir.DictAttr.get(entries | {key: ir.StringAttr.get(text)})
            return
