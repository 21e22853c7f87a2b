"""Tensors without elements on GPUs: IREE 3.13's drivers take no empty memory and CUDA no kernel without workgroups.

A session with an open context begins with caches of no rows, and what a model makes of these has none either. Vulkan's
driver refuses a binding of no bytes ("resolved to an empty buffer range"), so what may be empty gets a byte, which no
kernel reads; CUDA's refuses to launch no workgroups ("INVALID_ARGUMENT"), so such a launch is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from iree.compiler import ir
from iree.compiler.dialects import arith, scf

_SPARE = 64
"""Bytes more than a function asks for: an empty range may stand at the end."""
_LAST = re.compile(r"(\d+)>$")
_SIZE = 7
"""The operand of ``hal.device.queue.alloca`` that says how many bytes."""
_WORKGROUPS = slice(3, 6)
"""The operands of ``hal.command_buffer.dispatch`` that say how many workgroups there are along x, y and z."""


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
        _only_if_any(op)


def _only_if_any(op: ir.Operation) -> None:
    """Leave a launch out where the number of its workgroups is computed and comes out as zero."""
    counts = [value for value in op.operands[_WORKGROUPS] if not _is_constant(value)]
    if not counts:
        return
    with ir.InsertionPoint(op), op.location:
        index = ir.IndexType.get()
        zero = ir.Operation.create(
            "arith.constant", results=[index], attributes={"value": ir.IntegerAttr.get(index, 0)}
        ).result
        product = counts[0]
        for other in counts[1:]:
            product = ir.Operation.create("arith.muli", results=[index], operands=[product, other]).result
        some = arith.CmpIOp(arith.CmpIPredicate.sgt, product, zero).result
        branch = scf.IfOp(some)
        with ir.InsertionPoint(branch.then_block):
            end = scf.YieldOp([])
    op.move_before(end.operation)


def _is_constant(value: ir.Value) -> bool:
    return getattr(value.owner, "name", "") == "arith.constant"


def _change(op: ir.Operation, places: Sequence[int], by: str, number: int) -> None:
    """Put ``by`` and a number onto those operands that are not constants."""
    with ir.InsertionPoint(op), op.location:
        index = ir.IndexType.get()
        constant: ir.Value | None = None
        for place in places:
            value = op.operands[place]
            if _is_constant(value):
                continue
            if constant is None:
                attributes = {"value": ir.IntegerAttr.get(index, number)}
                constant = ir.Operation.create("arith.constant", results=[index], attributes=attributes).result
            op.operands[place] = ir.Operation.create(by, results=[index], operands=[value, constant]).result
