"""Tensors without elements on GPUs: IREE 3.13's drivers take no empty memory, so what may be empty gets a byte.

A session with an open context begins with caches of no rows, and what a model makes of these has none either. Vulkan's
driver refuses a binding of no bytes ("resolved to an empty buffer range"), CUDA's to free memory of no bytes. No kernel
reads what was added: one for no elements has no work.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from iree.compiler import ir

_SPARE = 64
"""Bytes more than a function asks for: an empty range may stand at the end."""
_LAST = re.compile(r"(\d+)>$")
_SIZE = 7
"""The operand of ``hal.device.queue.alloca`` that says how many bytes."""


def fill_empty_ranges(module: ir.Operation) -> None:
    """Let no size that is computed be zero, in place.

    Args:
        module: After IREE's phase ``hal``.
    """
    allocations: list[ir.Operation] = []
    dispatches: list[ir.Operation] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        if op.name == "hal.device.queue.alloca":
            allocations.append(op)
        elif op.name == "hal.command_buffer.dispatch":
            dispatches.append(op)
        return ir.WalkResult.ADVANCE

    module.walk(visit)
    for op in allocations:
        _change(op, [_SIZE], "arith.addi", _SPARE)
    for op in dispatches:
        found = _LAST.search(str(op.attributes["operandSegmentSizes"]))
        lengths, count = int(found[1]) if found else 0, len(op.operands)
        _change(op, range(count - lengths, count), "arith.maxui", 1)


def _change(op: ir.Operation, places: Sequence[int], by: str, number: int) -> None:
    """Put ``by`` and a number onto those operands that are not constants."""
    with ir.InsertionPoint(op), op.location:
        index = ir.IndexType.get()
        constant: ir.Value | None = None
        for place in places:
            value = op.operands[place]
            if getattr(value.owner, "name", "") == "arith.constant":
                continue
            if constant is None:
                attributes = {"value": ir.IntegerAttr.get(index, number)}
                constant = ir.Operation.create("arith.constant", results=[index], attributes=attributes).result
            op.operands[place] = ir.Operation.create(by, results=[index], operands=[value, constant]).result
