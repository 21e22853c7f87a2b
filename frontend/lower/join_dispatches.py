"""Dispatches that one thread does one after the other become one dispatch.

A dispatch costs beside its work, about half a microsecond of the thread that calls and three times that of workers. A
step of a small model is hundreds of them, each so little that no second thread is worth its waking. Between IREE's
phases, when kernels are functions of LLVM's dialect and the host code says which memory each gets, a run of them
becomes one (``joined_code``):

    hal.executable private @joined { ... llvm.func @decode_joined_0(...) { each workgroup of each kernel } }
    stream.cmd.dispatch @joined::@...::@decode_joined_0(...) { each buffer once }

so that it computes what it did, bit by bit. Where memory begins that a kernel reads is known at compile time, so one
buffer of all weights is one binding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from iree.compiler import ir
from linattn.dialect_patterns.target import Limits

from .executables import inside, operations
from .joined_code import (
    BINDING,
    EXECUTABLE,
    Binding,
    Dispatch,
    Run,
    Variant,
    add_executable,
    constant_of,
    symbol_of,
)


def join_dispatches(
    module: ir.Operation, joins: Callable[[str, str], bool], limits: Limits
) -> dict[str, list[list[str]]]:
    """Join what may be joined.

    Args:
        module: After IREE's phase ``executable-targets``; nothing is linked yet.
        joins: Whether a dispatch may be part of a joined one, by function and name of the kernel.
        limits: Of the driver.

    Returns:
        Function -> for each joined dispatch, in order, the names of the kernels in it. Its own is ``joined_name``.
    """
    finder = _Finder(module)
    found: dict[str, list[Run]] = {}
    for function in inside(module, "util.func"):
        name = ir.StringAttr(function.attributes["sym_name"]).value.removesuffix("$async")
        for execute in _executes(function):
            runs = finder.runs(operations(execute), lambda key, name=name: joins(name, key), limits)
            found.setdefault(name, []).extend(run for run in runs if len(run.members) > 1)
    named = [(joined_name(name, i), run) for name, runs in found.items() for i, run in enumerate(runs)]
    if not named:
        return {}
    machines = add_executable(module, named)
    for name, run in named:
        _replace(name, run, machines)
    return {name: [[one.key for one in run.members] for run in runs] for name, runs in found.items() if runs}


def joined_name(function: str, index: int) -> str:
    """The name of a joined dispatch of a function."""
    return f"{function}_{EXECUTABLE}_{index}"


def describe_joined(joined: Mapping[str, Sequence[Sequence[str]]]) -> list[str]:
    """A line for people about each function with joined dispatches, of what ``join_dispatches`` tells."""
    return [
        f"{name}: {sum(map(len, runs))} kernels in {len(runs)} {'dispatches' if len(runs) > 1 else 'dispatch'}"
        for name, runs in joined.items()
    ]


def joined_rows(
    table: Mapping[str, Sequence[Mapping[str, Any]]], joined: Mapping[str, Sequence[Sequence[str]]]
) -> dict[str, list[dict[str, Any]]]:
    """The table of dispatches with one row for each joined one, where the first of its kernels was.

    Such a row has ``kernels``, theirs; bytes and operations are those of all.

    Args:
        table: Of ``describe_dispatches``.
        joined: Of ``join_dispatches``.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, own in table.items():
        left: list[Mapping[str, Any] | None] = list(own)
        made: dict[int, dict[str, Any]] = {}
        for index, keys in enumerate(joined.get(name, ())):
            places = [_take(left, key) for key in keys]
            made[min(places)] = _row(joined_name(name, index), [own[place] for place in places])
        kept = {place: dict(row) for place, row in enumerate(left) if row is not None}
        rows[name] = [row for _, row in sorted((kept | made).items())]
    return rows


def _take(rows: list[Mapping[str, Any] | None], key: str) -> int:
    """The place of the first row of a kernel, which is not there any more."""
    place = next(i for i, row in enumerate(rows) if row is not None and row["key"] == key)
    rows[place] = None
    return place


def _row(key: str, members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    sizes = [row["bytes"] for row in members]
    work = [row["flop"] for row in members if row["flop"] is not None]
    largest = max(members, key=lambda row: row["bytes"] or 0)
    nodes = [row["node"] for row in members if row["node"]]
    return {
        "key": key,
        "node": f"{nodes[0]} to {nodes[-1]}" if nodes else "",
        "bytes": None if None in sizes else sum(sizes),
        "flop": sum(work) if work else None,
        "dtype": largest["dtype"],
        "kernels": list(members),
    }


class _Finder:
    """Finds dispatches that can be joined.

    Args:
        module: The module.
    """

    def __init__(self, module: ir.Operation) -> None:
        self._executables = {
            ir.StringAttr(op.attributes["sym_name"]).value: op for op in inside(module, "hal.executable")
        }
        self._variants: dict[str, Variant | None] = {}

    def runs(self, body: Sequence[ir.Operation], joins: Callable[[str], bool], limits: Limits) -> list[Run]:
        """What follows on each other in the body of a ``stream.cmd.execute``."""
        runs = [Run()]
        for op in body:
            some = [self._dispatch(one) for one in _flat(op)]
            for one in some:
                if one is None or None in some or not joins(one.key):
                    runs.append(Run())
                elif not runs[-1].take(one, limits):
                    runs.append(Run())
                    runs[-1].take(one, limits)
        return runs

    def _dispatch(self, op: ir.Operation) -> Dispatch | None:
        """A dispatch with all that is known of it; None for another operation, or what cannot be joined."""
        if op.name != "stream.cmd.dispatch":
            return None
        places = [str(place) for place in ir.ArrayAttr(op.attributes["entry_points"])]
        kernels = [self._variant(place) for place in places]
        some, values, resources, sizes, offsets, lengths = _segments(op)
        accesses = [ir.IntegerAttr(one).value for one in ir.ArrayAttr(op.attributes["resource_accesses"])]
        whole = [kernel for kernel in kernels if kernel is not None]
        workload = [constant_of(value) for value in some]
        counts = [_counts(kernel.export, workload) for kernel in whole]
        known = [count for count in counts if count is not None]
        takes = {str(kernel.export.attributes["layout"]).count(BINDING) for kernel in whole}
        if len(known) < len(places) or takes != {len(resources)} or any(0 in count for count in known):
            return None
        parts = zip(resources, sizes, offsets, lengths, accesses, strict=True)
        bindings = [Binding(*part) for part in parts]
        return Dispatch(op, places[0].rpartition("::@")[2].strip('"'), whole, known, values, bindings)

    def _variant(self, place: str) -> Variant | None:
        if place not in self._variants:
            self._variants[place] = self._look(place)
        return self._variants[place]

    def _look(self, place: str) -> Variant | None:
        executable, variant_name, name = (part.strip('@"') for part in place.split("::"))
        variants = inside(self._executables[executable], "hal.executable.variant")
        (variant,) = (op for op in variants if symbol_of(op) == variant_name)
        exports, modules = inside(variant, "hal.executable.export"), inside(variant, "builtin.module")
        code = [op for inner in modules for op in operations(inner)]
        functions = [op for op in code if op.name == "llvm.func" and operations(op)]
        plain = {"sym_name", "sym_visibility", "target"} >= set(_names(variant))
        alone = len(exports) == len(modules) == len(functions) == 1
        if not plain or not alone or any(op.name != "llvm.func" for op in code):
            return None
        if "workgroup_local_memory" in exports[0].attributes or symbol_of(functions[0]) != name:
            return None
        others = [op for op in code if op not in functions]
        return Variant(variant, functions[0], others, modules[0], exports[0])


def _flat(op: ir.Operation) -> list[ir.Operation]:
    """The operations in one that says that they may run at once, in an order that is as good as any other."""
    if op.name in ("stream.cmd.concurrent", "stream.cmd.serial"):
        inner = [one for one in operations(op) if one.name != "stream.yield"]
        return [each for one in inner for each in _flat(one)]
    return [op]


def _executes(function: ir.Operation) -> list[ir.Operation]:
    found: list[ir.Operation] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        if op.name == "stream.cmd.execute":
            found.append(op)
        return ir.WalkResult.ADVANCE

    function.walk(visit)
    return found


def _names(op: ir.Operation) -> list[str]:
    return [op.attributes[i].name for i in range(len(op.attributes))]


def _segments(op: ir.Operation) -> list[list[ir.Value]]:
    """The operands of a dispatch by their kinds."""
    kind: Any = ir.DenseI32ArrayAttr
    sizes: list[int] = list(kind(op.attributes["operandSegmentSizes"]))
    parts: list[list[ir.Value]] = []
    place = 0
    for size in sizes:
        parts.append([op.operands[i] for i in range(place, place + size)])
        place += size
    return parts


_COUNTING: dict[str, Callable[[int, int], int]] = {
    "arith.addi": lambda a, b: a + b,
    "arith.muli": lambda a, b: a * b,
    "arith.ceildivui": lambda a, b: -(-a // b),
    "arith.minui": min,
    "arith.maxui": max,
}


def _counts(export: ir.Operation, workload: Sequence[int | None]) -> tuple[int, int, int] | None:
    """Workgroups along x, y and z, by the region that counts them; None where they are not known."""
    block: Any = export.regions[0].blocks[0]
    known: dict[ir.Value, int | None] = dict(zip(list(block.arguments)[1:], workload, strict=True))
    for op in operations(export):
        if op.name == "hal.return":
            x, y, z = (known.get(value) for value in op.operands)
            return None if x is None or y is None or z is None else (x, y, z)
        operands = [known.get(value) for value in op.operands]
        if op.name == "arith.constant":
            known[op.results[0]] = constant_of(op.results[0])
        elif op.name in _COUNTING and None not in operands:
            known[op.results[0]] = _COUNTING[op.name](*(value for value in operands if value is not None))
    return None


def _replace(name: str, run: Run, machines: Sequence[str]) -> None:
    """Put one call where the last of them was, and take them all out; ``machines``: names of the variants."""
    last: Any = run.members[-1].op
    place = last
    while place.parent.name != "stream.cmd.execute":
        place = place.parent
    execute = place.parent
    index = ir.IndexType.get()
    with ir.InsertionPoint(execute), execute.location:
        start = ir.Operation.create(
            "arith.constant", results=[index], attributes={"value": ir.IntegerAttr.get(index, 0)}
        ).results[0]
    bindings = list(run.buffers.values())
    whole = [offset is None for _, offset in run.buffers]
    operands = [
        *run.constants,
        *(binding.resource for binding in bindings),
        *(binding.size for binding in bindings),
        *(start if all_of else binding.offset for binding, all_of in zip(bindings, whole, strict=True)),
        *(binding.size if all_of else binding.length for binding, all_of in zip(bindings, whole, strict=True)),
    ]
    i32, count = ir.IntegerType.get_signless(32), len(bindings)
    places = [ir.Attribute.parse(f'@{EXECUTABLE}::@{machine}::@"{name}"') for machine in machines]
    with ir.InsertionPoint(place), run.members[0].op.location:
        ir.Operation.create(
            "stream.cmd.dispatch",
            operands=operands,
            attributes={
                "entry_points": ir.ArrayAttr.get(places),
                "resource_accesses": ir.ArrayAttr.get(
                    [ir.IntegerAttr.get(i32, run.access[key]) for key in run.buffers]
                ),
                "operandSegmentSizes": ir.DenseI32ArrayAttr.get([0, len(run.constants), count, count, count, count]),
            },
        )
    for member in run.members:
        gone: Any = member.op
        parent = gone.parent
        gone.erase()
        while parent.name != "stream.cmd.execute" and [op.name for op in operations(parent)] in ([], ["stream.yield"]):
            outer = parent.parent
            parent.erase()
            parent = outer
