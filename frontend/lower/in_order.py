"""Functions that a Vulkan queue takes one after the other by itself: whoever calls them need not have it wait.

IREE 3.13's Vulkan driver has a thread of the host signal the semaphore of a call, and what waits for that begins later.
A call that is one command buffer with a barrier at its end needs no semaphore: what the queue is given after it begins
behind that barrier, as long as nothing that the driver holds back comes between. Such functions are marked, see
``IN_ORDER_KEY``. CUDA's driver hands calls to a thread of its own, and keeps them in order by their semaphores alone.

Source: Vulkan 1.3, "Implicit Synchronization Guarantees" and "Pipeline Barriers", whose second scope is all commands
later in submission order.
"""

from __future__ import annotations

from iree.compiler import ir
from linattn.runtime.manifest import IN_ORDER_KEY

from .executables import inside, operations
from .reflection import add_text

_ASYNC = "$async"
_BARRIER = "hal.command_buffer.execution_barrier"
_EXECUTE = "hal.device.queue.execute"
_WAIT, _SIGNAL, _COMMANDS = 2, 3, 4
"""The operands of ``hal.device.queue.execute``: what it waits for, what it signals, and from there on its commands."""
_DISPATCHES = 1 << 1
"""Of the categories of a command buffer's commands: those of another kind may go to a queue of their own."""
_STAGES = 1 << 2 | 1 << 3
"""Dispatches and transfers, of the stages of a barrier."""


def mark_in_order(module: ir.Operation) -> list[str]:
    """Mark those functions that are one submission which ends with a barrier, in place.

    Args:
        module: After IREE's phase ``hal``, before kernels are given functions that load them; in a context.

    Returns:
        Their names.
    """
    marked: list[str] = []
    for function in inside(module, "util.func"):
        name = ir.StringAttr(function.attributes["sym_name"]).value
        if name.endswith(_ASYNC) and _is_in_order(function):
            add_text(function, IN_ORDER_KEY, "true")
            marked.append(name)
    return marked


def _is_in_order(function: ir.Operation) -> bool:
    """Whether a function waits for its last argument but one, submits one command buffer, and signals the last."""
    submitted: list[ir.Operation] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        if op.name.startswith("hal.device.queue.") or op.name == "util.call":
            submitted.append(op)
        return ir.WalkResult.ADVANCE

    function.walk(visit)
    blocks, right = list(function.regions[0].blocks), operations(function)
    if len(blocks) != 1 or [op.name for op in submitted] != [_EXECUTE] or submitted[0] not in right:
        return False
    arguments, operands = list(blocks[0].arguments), list(submitted[0].operands)
    if len(operands) != _COMMANDS + 1 or operands[_WAIT:_COMMANDS] != arguments[-2:]:
        return False
    own = [op for op in right if op.name.startswith("hal.command_buffer.") and operands[_COMMANDS] in _values(op)]
    if [op.name for op in own[:1] + own[-2:]] != ["hal.command_buffer.create", _BARRIER, "hal.command_buffer.finalize"]:
        return False
    runs = _bits(own[0], "command_categories") & _DISPATCHES
    return bool(runs) and all(_bits(own[-2], f"{one}_stage_mask") & _STAGES == _STAGES for one in ("source", "target"))


def _values(op: ir.Operation) -> list[ir.Value]:
    return [*op.operands, *op.results]


def _bits(op: ir.Operation, name: str) -> int:
    return ir.IntegerAttr(op.attributes[name]).value
