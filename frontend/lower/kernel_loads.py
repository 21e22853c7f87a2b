"""Kernels that are loaded side by side: a function for each, instead of one initializer that makes one after the other.

A GPU's driver compiles a kernel when it is loaded, and IREE 3.13 loads all of them in one initializer, on one thread:
where a driver takes a tenth of a second for each, that is ten seconds with one core at work. After this pass a
module has

    util.func public @"load_kernel$I"()    makes one kernel, if it is not there; the largest code is number 0
    util.func public @"load_kernels$"()    calls them all, the first time

Whoever loads the module may call the first ones from as many threads as there are cores: each writes a variable of its
own, and IREE's runtime lets several threads into a context whose functions do not meet. Functions that run
kernels call the last one before all else, so a caller who knows nothing of it gets the kernels with the first call.
"""

from __future__ import annotations

import re
from typing import Any

from iree.compiler import ir

from .executables import inside, operations

LOAD_ALL = "load_kernels$"
"""The function that loads the kernels which are not loaded."""
LOAD_ONE = "load_kernel$"
"""With a number from 0 on behind it: the function that loads one."""

_GLOBAL = re.compile(r"__device_\d+_executable_\d+_(.*)$")
_SYMBOL = re.compile(r'@(?:"([^"]*)"|([^":]*))::')
_EXECUTABLE = "!hal.executable"
_LOADED = "kernels_loaded"


def load_side_by_side(module: ir.Operation) -> int:
    """Give each kernel a function that loads it, in place.

    Args:
        module: After IREE's phase ``hal``, in a context.

    Returns:
        How many there are; 0 where they stay as they are: one alone, or kernels that an initializer runs.
    """
    makers = [op for op in inside(module, "util.initializer") if _found(op, "hal.executable.create")]
    places = {found[1]: name for name in _variables(module) if (found := _GLOBAL.match(name))}
    users = [op for op in operations(module) if op not in makers and _kernel_loads(op, set(places.values()))]
    created = _found(makers[0], "hal.executable.create") if len(makers) == 1 else []
    names = [_executable(op) for op in created]
    plain = all(op.name == "util.func" for op in users) and all(len(op.operands) == 2 for op in created)
    if len(created) < 2 or not plain or sorted(names) != sorted(places):
        return 0
    sizes = {name: sum(_bytes(code) for code in inside(one, "hal.executable.binary")) for name, one in _named(module)}
    order = sorted(zip(names, created, strict=True), key=lambda pair: -sizes.get(pair[0], 0))
    device = next(
        op for op in operations(makers[0]) if op.name == "util.global.load" and "device" in str(op.result.type)
    )
    first = operations(module)[0]
    known = {_symbol(op) for op in operations(module)}
    parsed = _functions([places[name] for name, _ in order], ir.FlatSymbolRefAttr(device.attributes["global"]).value)
    for op in operations(parsed.operation):
        if _symbol(op) not in known:
            op.move_before(first)
    for number, (_, create) in enumerate(order):
        _make(next(op for op in operations(module) if _symbol(op) == f"{LOAD_ONE}{number}"), create)
    for maker in makers:
        maker.erase()
    for op in operations(module):
        if _symbol(op) in places.values():
            op.attributes["is_mutable"] = ir.Attribute.parse("unit")
    for user in users:
        for load in _kernel_loads(user, set(places.values())):
            if "is_immutable" in load.attributes:
                del load.attributes["is_immutable"]
        with ir.InsertionPoint.at_block_begin(user.regions[0].blocks[0]), user.location:
            callee = ir.FlatSymbolRefAttr.get(LOAD_ALL)
            ir.Operation.create("util.call", attributes={"callee": callee})
    return len(order)


def _functions(places: list[str], device: str) -> ir.Module:
    """A module with the functions, with no kernel where one is to be made."""
    declared = "\n".join(f'util.global private mutable @"{place}" : {_EXECUTABLE}' for place in places)
    calls = "\n".join(f'util.call @"{LOAD_ONE}{number}"() : () -> ()' for number in range(len(places)))
    text = "".join(
        f"""
        util.func public @"{LOAD_ONE}{number}"() attributes {{inlining_policy = #util.inline.never}} {{
          %none = util.null : {_EXECUTABLE}
          %held = util.global.load @"{place}" : {_EXECUTABLE}
          %missing = util.cmp.eq %held, %none : {_EXECUTABLE}
          cf.cond_br %missing, ^load, ^done
        ^load:
          %device = util.global.load @{device} : !hal.device
          %any = arith.constant -1 : i64
          %made = util.null : {_EXECUTABLE}
          util.global.store %made, @"{place}" : {_EXECUTABLE}
          cf.br ^done
        ^done:
          util.return
        }}"""
        for number, place in enumerate(places)
    )
    return ir.Module.parse(f"""
        util.global private @{device} : !hal.device
        {declared}
        util.global private mutable @{_LOADED} = 0 : i32
        util.func public @"{LOAD_ALL}"() attributes {{inlining_policy = #util.inline.never}} {{
          %loaded = util.global.load @{_LOADED} : i32
          %zero = arith.constant 0 : i32
          %missing = arith.cmpi eq, %loaded, %zero : i32
          cf.cond_br %missing, ^load, ^done
        ^load:
          {calls}
          %one = arith.constant 1 : i32
          util.global.store %one, @{_LOADED} : i32
          cf.br ^done
        ^done:
          util.return
        }}{text}""")


def _make(function: ir.Operation, create: ir.Operation) -> None:
    """Put the making of a kernel where there is none so far."""
    ops = [op.operation for op in function.regions[0].blocks[1].operations]
    device, any_queue, nothing = ops[:3]
    with ir.InsertionPoint(nothing):
        made = create.clone()
    for place, op in enumerate((device, any_queue)):
        made.operands[place] = op.result
    ops[3].operands[0] = made.result
    nothing.erase()


def _found(parent: ir.Operation, name: str) -> list[ir.Operation]:
    """The operations of a kind anywhere inside another."""
    found: list[ir.Operation] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        if op.name == name:
            found.append(op)
        return ir.WalkResult.ADVANCE

    parent.walk(visit)
    return found


def _kernel_loads(parent: ir.Operation, places: set[str]) -> list[ir.Operation]:
    loads = _found(parent, "util.global.load")
    return [op for op in loads if ir.FlatSymbolRefAttr(op.attributes["global"]).value in places]


def _variables(module: ir.Operation) -> list[str]:
    """The names of all variables that hold a kernel."""
    found = [op for op in inside(module, "util.global") if str(op.attributes["type"]) == _EXECUTABLE]
    return [_symbol(op) for op in found]


def _named(module: ir.Operation) -> list[tuple[str, ir.Operation]]:
    return [(_symbol(op), op) for op in inside(module, "hal.executable")]


def _executable(create: ir.Operation) -> str:
    """The executable that is made."""
    found = _SYMBOL.match(str(create.attributes["executable_target"]))
    return (found[1] or found[2]) if found else ""


def _symbol(op: ir.Operation) -> str:
    return ir.StringAttr(op.attributes["sym_name"]).value if "sym_name" in op.attributes else ""


def _bytes(code: ir.Operation) -> int:
    data: Any = code.attributes["data"]
    return int(data.type.get_dim_size(0))
