"""The code of dispatches that became one: a function that calls the kernels of each, workgroup by workgroup.

    llvm.func @decode_joined_0(%environment, %dispatch, %workgroup) {
      for each kernel:  its bindings and constants put in order, on the stack
                        for each of its workgroups: llvm.call %kernel(%environment, %own_dispatch, %own_workgroup) }

Source: IREE 3.13, ``executable_library.h``: what a kernel is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from iree.compiler import ir
from linattn.dialect_patterns.target import Limits

from .executables import inside, operations

EXECUTABLE = "joined"
BINDING = "#hal.pipeline.binding<"
_DISPATCH_FIELDS = ("i32", "i32", "i16", "i16", "i32", "i32", "i16", "i8", "i8", "ptr", "ptr", "ptr")
_WORKGROUP_FIELDS = ("i32", "i32", "i16", "i16", "i32", "ptr", "i32")
_DISPATCH = f'!llvm.struct<"iree_hal_executable_dispatch_state_v0_t", ({", ".join(_DISPATCH_FIELDS)})>'
_WORKGROUP = f'!llvm.struct<"iree_hal_executable_workgroup_state_v0_t", ({", ".join(_WORKGROUP_FIELDS)})>'
_PREFIX = {"ptr": "!llvm.ptr"}  # outside of LLVM's own types
_GIVEN = "{llvm.align = 16 : i64, llvm.noalias, llvm.nonnull, llvm.noundef}"
_ARGUMENTS = f"(%environment: !llvm.ptr {_GIVEN}, %dispatch: !llvm.ptr {_GIVEN}, %workgroup: !llvm.ptr {_GIVEN}) -> i32"
_KERNEL = f"(!llvm.ptr {_GIVEN}, !llvm.ptr {_GIVEN}, !llvm.ptr {_GIVEN}) -> i32"
_ALL = f"""
    llvm.func internal @joined_workgroups(%kernel: !llvm.ptr, %environment: !llvm.ptr, %dispatch: !llvm.ptr,
        %workgroup: !llvm.ptr, %xs: i32, %ys: i32, %zs: i16) -> i32 attributes {{passthrough = ["noinline"]}} {{
      %zero = llvm.mlir.constant(0 : i32) : i32
      %one = llvm.mlir.constant(1 : i32) : i32
      %first = llvm.mlir.constant(0 : i16) : i16
      %next = llvm.mlir.constant(1 : i16) : i16
      %y_place = llvm.getelementptr %workgroup[0, 1] : (!llvm.ptr) -> !llvm.ptr, {_WORKGROUP}
      %z_place = llvm.getelementptr %workgroup[0, 2] : (!llvm.ptr) -> !llvm.ptr, {_WORKGROUP}
      llvm.br ^over_z(%first, %zero : i16, i32)
    ^over_z(%z: i16, %wrong_z: i32):
      llvm.store %z, %z_place : i16, !llvm.ptr
      llvm.br ^over_y(%zero, %wrong_z : i32, i32)
    ^over_y(%y: i32, %wrong_y: i32):
      llvm.store %y, %y_place : i32, !llvm.ptr
      llvm.br ^over_x(%zero, %wrong_y : i32, i32)
    ^over_x(%x: i32, %wrong_x: i32):
      llvm.store %x, %workgroup : i32, !llvm.ptr
      %found = llvm.call %kernel(%environment, %dispatch, %workgroup)
          : !llvm.ptr, (!llvm.ptr, !llvm.ptr, !llvm.ptr) -> i32
      %wrong = llvm.or %wrong_x, %found : i32
      %x_next = llvm.add %x, %one : i32
      %more_x = llvm.icmp "ult" %x_next, %xs : i32
      llvm.cond_br %more_x, ^over_x(%x_next, %wrong : i32, i32), ^end_x
    ^end_x:
      %y_next = llvm.add %y, %one : i32
      %more_y = llvm.icmp "ult" %y_next, %ys : i32
      llvm.cond_br %more_y, ^over_y(%y_next, %wrong : i32, i32), ^end_y
    ^end_y:
      %z_next = llvm.add %z, %next : i16
      %more_z = llvm.icmp "ult" %z_next, %zs : i16
      llvm.cond_br %more_z, ^over_z(%z_next, %wrong : i16, i32), ^end
    ^end:
      llvm.return %wrong : i32
    }}
"""


Buffer = tuple[ir.Value, ir.Value | None]
"""What a joined dispatch is given: a resource, and where in it its memory starts; None: all of it."""


@dataclass(frozen=True)
class Variant:
    """A kernel for one machine.

    Attributes:
        op: The variant.
        function: The kernel.
        others: What else is in its module: functions that it calls, none of them defined there.
        module: That module.
        export: How it is called.
    """

    op: ir.Operation
    function: ir.Operation
    others: list[ir.Operation]
    module: ir.Operation
    export: ir.Operation


@dataclass(frozen=True)
class Binding:
    """Memory that a dispatch gets.

    Attributes:
        resource: What it is a part of.
        size: Of the whole of that.
        offset: Where it begins.
        length: How long it is.
        access: Bits: 1 it is read, 2 it is written.
    """

    resource: ir.Value
    size: ir.Value
    offset: ir.Value
    length: ir.Value
    access: int


@dataclass(frozen=True)
class Dispatch:
    """A call of a kernel.

    Attributes:
        op: The call.
        key: Name of the kernel.
        kernels: The kernel for each machine.
        counts: The workgroups along x, y and z for each machine.
        constants: What it is given beside memory.
        bindings: Memory.
    """

    op: ir.Operation
    key: str
    kernels: list[Variant]
    counts: list[tuple[int, int, int]]
    constants: list[ir.Value]
    bindings: list[Binding]


@dataclass
class Run:
    """Dispatches that become one.

    Attributes:
        members: In their order.
        buffers: What the one is given: resource and offset (None: from its start), and the first binding of that.
        access: What all of them do with each.
        constants: The numbers that are not known at compile time.
    """

    members: list[Dispatch] = field(default_factory=list[Dispatch])
    buffers: dict[Buffer, Binding] = field(default_factory=dict[Buffer, Binding])
    access: dict[Buffer, int] = field(default_factory=dict[Buffer, int])
    constants: list[ir.Value] = field(default_factory=list[ir.Value])

    def take(self, one: Dispatch, limits: Limits) -> bool:
        """Add a dispatch, if the joined one does not need more than a driver takes."""
        buffers = dict.fromkeys([*self.buffers, *(buffer_of(binding) for binding in one.bindings)])
        constants = dict.fromkeys([*self.constants, *(c for c in one.constants if constant_of(c) is None)])
        if len(buffers) > limits.bindings or len(constants) > limits.constants:
            return False
        for binding in one.bindings:
            key = buffer_of(binding)
            self.buffers.setdefault(key, binding)
            self.access[key] = self.access.get(key, 0) | binding.access
        self.constants = list(constants)
        self.members.append(one)
        return True


def add_executable(module: ir.Operation, named: Sequence[tuple[str, Run]]) -> list[str]:
    """Put the executable with all joined dispatches at the module's start.

    Args:
        module: The module.
        named: Joined dispatches and their names.

    Returns:
        The names of its variants; those of other executables may have others.
    """
    machines = range(len(named[0][1].members[0].kernels))
    variants = "\n".join(_variant_text(named, machine) for machine in machines)
    parsed: Any = ir.Module.parse(f"hal.executable private @{EXECUTABLE} {{\n{variants}\n}}")
    executable: Any = operations(parsed.operation)[0]
    for machine, variant in enumerate(inside(executable, "hal.executable.variant")):
        (inner,) = inside(variant, "builtin.module")
        kernels = {one.key: one.kernels[machine] for _, run in named for one in run.members}
        first = next(iter(kernels.values()))
        for i in range(len(first.module.attributes)):
            attribute = first.module.attributes[i]
            inner.attributes[attribute.name] = attribute.attr
        for export in inside(variant, "hal.executable.export"):
            export.attributes["workgroup_size"] = first.export.attributes["workgroup_size"]
        declared = {symbol_of(op): op for op in operations(inner)}
        for key, kernel in kernels.items():
            place: Any = declared[_own(key)]
            copy = kernel.function.clone(ip=ir.InsertionPoint(place))
            place.erase()
            copy.location = ir.Location.unknown()  # what debuggers are told of a function is of one function
            copy.attributes["sym_name"] = ir.StringAttr.get(_own(key))
            copy.attributes["passthrough"] = ir.ArrayAttr.get([ir.StringAttr.get("noinline")])
            for other in kernel.others:
                if symbol_of(other) not in declared:
                    declared[symbol_of(other)] = other.clone(ip=ir.InsertionPoint(copy))
    block: Any = module.regions[0].blocks[0]
    start: Any = ir.InsertionPoint.at_block_begin(block)
    start.insert(executable.detach_from_parent())
    return [symbol_of(kernel.op) for kernel in named[0][1].members[0].kernels]


def _own(key: str) -> str:
    """The name of a kernel in the joined executable; linked, all names are in one module."""
    return f"{EXECUTABLE}_{key}"


def _variant_text(named: Sequence[tuple[str, Run]], machine: int) -> str:
    variant = named[0][1].members[0].kernels[machine].op
    exports = "\n".join(_export_text(name, ordinal, run) for ordinal, (name, run) in enumerate(named))
    keys = dict.fromkeys(one.key for _, run in named for one in run.members)
    kernels = "\n".join(f'    llvm.func @"{_own(key)}"{_KERNEL}' for key in keys)
    code = "\n".join(_function_text(name, run, machine) for name, run in named)
    target = variant.attributes["target"]
    return (
        f"  hal.executable.variant public @{symbol_of(variant)} target({target}) {{\n{exports}\n"
        f"  builtin.module {{\n{kernels}\n{_ALL}\n{code}\n  }}\n  }}"
    )


def _export_text(name: str, ordinal: int, run: Run) -> str:
    reads, writes = f"{BINDING}storage_buffer, ReadOnly>", f"{BINDING}storage_buffer>"
    bindings = ", ".join(writes if run.access[key] & 2 else reads for key in run.buffers)
    layout = f"#hal.pipeline.layout<constants = {len(run.constants)}, bindings = [{bindings}]>"
    return f"""    hal.executable.export public @"{name}" ordinal({ordinal}) layout({layout})
        count(%device: !hal.device) -> (index, index, index) {{
      %one = arith.constant 1 : index
      hal.return %one, %one, %one : index, index, index
    }}"""


def _function_text(name: str, run: Run, machine: int) -> str:
    """The function of a joined dispatch for one machine."""
    most = max(len(one.bindings) for one in run.members)
    values = max(1, *(len(one.constants) for one in run.members))
    text = _Text()
    one = text.op("llvm.mlir.constant(1 : i32) : i32")
    dispatch, group, pointers, numbers = (
        text.op(f"llvm.alloca {one} x {kind} {{alignment = 64 : i64}} : (i32) -> !llvm.ptr")
        for kind in (_DISPATCH, _WORKGROUP, f"!llvm.array<{most} x ptr>", f"!llvm.array<{values} x i32>")
    )
    # IREE says that both are aligned to 16 bytes; those of its workers are not, and LLVM would copy vectors.
    state, given = text.copied("%dispatch", _DISPATCH, dispatch, _DISPATCH_FIELDS)
    text.copied("%workgroup", _WORKGROUP, group, _WORKGROUP_FIELDS)
    # Lengths of bindings stay those of the joined dispatch: kernels do not look at them.
    for value, place in ((numbers, 9), (pointers, 10)):
        state = text.op(f"llvm.insertvalue {value}, {state}[{place}] : {_DISPATCH}")
    buffers = [
        text.op(f"llvm.load {text.at(given[10], i, '!llvm.ptr')} : !llvm.ptr -> !llvm.ptr")
        for i in range(len(run.buffers))
    ]
    wrong = text.op("llvm.mlir.constant(0 : i32) : i32")
    places = {key: i for i, key in enumerate(run.buffers)}
    for member in run.members:
        for i, binding in enumerate(member.bindings):
            offset = constant_of(binding.offset) or 0
            pointer = text.at(buffers[places[buffer_of(binding)]], offset, "i8")
            text.do(f"llvm.store {pointer}, {text.at(pointers, i, '!llvm.ptr')} : !llvm.ptr, !llvm.ptr")
        for i, value in enumerate(member.constants):
            known = constant_of(value)
            if known is None:
                place = text.at(given[9], run.constants.index(value), "i32")
                number = text.op(f"llvm.load {place} : !llvm.ptr -> i32")
            else:
                number = text.op(f"llvm.mlir.constant({known} : i32) : i32")
            text.do(f"llvm.store {number}, {text.at(numbers, i, 'i32')} : i32, !llvm.ptr")
        x, y, z = member.counts[machine]
        own = state
        fields = ((len(member.constants), 3, "i16"), (x, 4, "i32"), (y, 5, "i32"), (z, 6, "i16"))
        counts: list[str] = []
        for number, place, kind in (*fields, (len(member.bindings), 8, "i8")):
            counts.append(text.op(f"llvm.mlir.constant({number} : {kind}) : {kind}"))
            own = text.op(f"llvm.insertvalue {counts[-1]}, {own}[{place}] : {_DISPATCH}")
        text.do(f"llvm.store {own}, {dispatch} : {_DISPATCH}, !llvm.ptr")
        kernel = text.op(f'llvm.mlir.addressof @"{_own(member.key)}" : !llvm.ptr')
        arguments = ", ".join([kernel, "%environment", dispatch, group, *counts[1:4]])
        kinds = "(!llvm.ptr, !llvm.ptr, !llvm.ptr, !llvm.ptr, i32, i32, i16) -> i32"
        found = text.op(f"llvm.call @joined_workgroups({arguments}) : {kinds}")
        wrong = text.op(f"llvm.or {wrong}, {found} : i32")
    text.do(f"llvm.return {wrong} : i32")
    return f'    llvm.func @"{name}"{_ARGUMENTS} {{\n{text.lines()}\n    }}'


class _Text:
    """Operations as text."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def lines(self) -> str:
        """All of it."""
        return "\n".join(self._lines)

    def do(self, text: str) -> None:
        """An operation without a result."""
        self._lines.append(f"      {text}")

    def op(self, text: str) -> str:
        """An operation with a result."""
        name = f"%v{len(self._lines)}"
        self.do(f"{name} = {text}")
        return name

    def copied(self, pointer: str, kind: str, place: str, fields: Sequence[str]) -> tuple[str, list[str]]:
        """A structure and its fields, read one by one, and written to another place."""
        found: list[str] = []
        whole = self.op(f"llvm.mlir.undef : {kind}")
        for i, field_kind in enumerate(fields):
            field_place = self.op(f"llvm.getelementptr {pointer}[0, {i}] : (!llvm.ptr) -> !llvm.ptr, {kind}")
            found.append(
                self.op(f"llvm.load volatile {field_place} : !llvm.ptr -> {_PREFIX.get(field_kind, field_kind)}")
            )
            whole = self.op(f"llvm.insertvalue {found[-1]}, {whole}[{i}] : {kind}")
        self.do(f"llvm.store {whole}, {place} : {kind}, !llvm.ptr")
        return whole, found

    def at(self, pointer: str, index: int, kind: str) -> str:
        """A place some elements behind another."""
        return (
            self.op(f"llvm.getelementptr {pointer}[{index}] : (!llvm.ptr) -> !llvm.ptr, {kind}") if index else pointer
        )


def symbol_of(op: ir.Operation) -> str:
    """Its name."""
    return ir.StringAttr(op.attributes["sym_name"]).value


def constant_of(value: ir.Value) -> int | None:
    """A number that is known."""
    owner: Any = value.owner
    if isinstance(owner, ir.Block) or owner.name != "arith.constant":
        return None
    return ir.IntegerAttr(owner.attributes["value"]).value


def buffer_of(binding: Binding) -> Buffer:
    """What a joined dispatch is given for a binding: the whole resource where it is known where it begins."""
    return binding.resource, None if constant_of(binding.offset) is not None else binding.offset
