"""PTX in a kernel, which IREE leaves as it is."""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir


def assembly(
    text: str,
    constraints: str,
    operands: Sequence[ir.Value] = (),
    results: Sequence[str] = (),
    *,
    is_pure: bool = False,
) -> list[ir.Value]:
    """One instruction.

    Args:
        text: It, with ``$0`` for the first result or operand.
        constraints: Of each of them, as LLVM writes them: ``=f,r``.
        operands: What it takes.
        results: Types of what it gives.
        is_pure: Whether it depends on its operands alone.
    """
    types = [ir.Type.parse(name) for name in results]
    struct = [ir.Type.parse(f"!llvm.struct<({', '.join(results)})>")] if len(types) > 1 else types
    attributes: dict[str, ir.Attribute] = {
        "asm_string": ir.StringAttr.get(text),
        "constraints": ir.StringAttr.get(constraints),
    }
    if not is_pure:
        attributes["has_side_effects"] = ir.Attribute.parse("unit")
    found = ir.Operation.create("llvm.inline_asm", results=struct, operands=list(operands), attributes=attributes)
    if len(types) < 2:
        return list(found.results)
    return [
        ir.Operation.create(
            "llvm.extractvalue",
            results=[kind],
            operands=[found.results[0]],
            attributes={"position": ir.DenseI64ArrayAttr.get([i])},
        ).result
        for i, kind in enumerate(types)
    ]
