"""A hand-made kernel as one dispatch: a ``hal.executable.source`` in the module and a ``flow.dispatch`` to call it.

    hal.executable.source private @NAME { hal.executable.export public @main ... count(workgroups)
      builtin.module { func.func @{kernel.name}() attributes {no_pipeline} { BODY } } }
    %results = flow.dispatch @NAME::@main[B](%sizes..., %tensors...)

``no_pipeline`` has IREE leave the body as it is written. The name spells everything the body depends on, so that equal
nodes share one executable. Sizes that are open go in as i32 push constants.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from iree.compiler import ir

from ..node import TensorSpec
from .builder import Builder, Size, spec_of, tensor_type
from .kernel_text import KernelText


@dataclass(frozen=True)
class Kernel:
    """A kernel over tensors whose open dimensions are a batch B and a number of tokens T.

    Attributes:
        name: Symbol; spells the operator and all that the body depends on.
        inputs: Types of the operands.
        outputs: Types of the results.
        axes: For each input and output the letters of its dimensions, ``B`` and ``T`` for these two, ``R`` for a
            number of tiles of rows.
        workgroups: Workgroups along x, along y for each batch row.
        write: Writes the body, given the names of B, T and of the operands' and results' memrefs.
        share: How many of what the call counts as its batch a workgroup takes.
        variants: The kernel for each machine where the module is for several, best first: see ``machines``.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: tuple[str, ...]
    workgroups: tuple[int, int]
    write: Callable[[KernelText, int | str, int | str, Sequence[str]], None]
    share: int = 1
    variants: tuple[Variant, ...] = ()


@dataclass(frozen=True)
class Variant:
    """A kernel for one of several machines.

    Attributes:
        machine: The machine's name.
        executable: MLIR text of IREE's description of it.
        kernel: The kernel; its sizes are open where those of the others are.
    """

    machine: str
    executable: str
    kernel: Kernel

    @property
    def symbol(self) -> str:
        """The machine's name as a symbol."""
        return re.sub(r"\W", "_", self.machine)


def dispatch(
    b: Builder, kernel: Kernel, operands: Sequence[ir.Value], batch: Size, tokens: Size, tiles: Size = 1
) -> list[ir.Value]:
    """Emit the call, and the executable unless the module has it; the results as builtin tensors.

    Sizes that the kernel leaves open may be known here: calls of several sizes share such a kernel.
    """
    _ensure_executable(kernel)
    i32 = ir.IntegerType.get_signless(32)
    sizes = {"B": batch, "T": tokens, "R": tiles}
    constants = [
        ir.Operation.create("arith.index_cast", results=[i32], operands=[b.index(sizes[letter])]).result
        for letter in _open_letters(kernel)
    ]

    def known(spec: TensorSpec, term: str) -> list[Size]:
        return [sizes[letter] if size is None else size for size, letter in zip(spec.shape, term, strict=True)]

    def dims(shape: Sequence[int | None], values: Sequence[Size]) -> list[ir.Value]:
        return [b.index(value) for size, value in zip(shape, values, strict=True) if size is None]

    count = len(kernel.inputs)
    workload = [b.index(batch)]
    arguments = [*constants, *operands]
    argument_dims = [
        dim
        for operand, spec, term in zip(operands, kernel.inputs, kernel.axes[:count], strict=True)
        for dim in dims(spec_of(operand).shape, known(spec, term))
    ]
    shapes = [known(spec, term) for spec, term in zip(kernel.outputs, kernel.axes[count:], strict=True)]
    results = [
        TensorSpec(tuple(size if isinstance(size, int) else None for size in shape), spec.dtype)
        for spec, shape in zip(kernel.outputs, shapes, strict=True)
    ]
    result_dims = [dim for spec, shape in zip(results, shapes, strict=True) for dim in dims(spec.shape, shape)]
    places = [f"@{kernel.name}::@{v.symbol}::@{kernel.name}" for v in kernel.variants]
    entries = [ir.Attribute.parse(place) for place in places or [f"@{kernel.name}::@{kernel.name}"]]
    call = ir.Operation.create(
        "flow.dispatch",
        results=[tensor_type(spec.shape, spec.dtype) for spec in results],
        operands=[*workload, *arguments, *argument_dims, *result_dims],
        attributes={
            "entry_points": ir.ArrayAttr.get(entries),
            "operandSegmentSizes": ir.DenseI32ArrayAttr.get(
                [len(workload), len(arguments), len(argument_dims), len(result_dims)]
            ),
        },
    )
    return list(call.results)


def _open_letters(kernel: Kernel) -> list[str]:
    """Which of B, T and R are open in some operand or result."""
    found = {
        letter
        for spec, term in zip((*kernel.inputs, *kernel.outputs), kernel.axes, strict=True)
        for size, letter in zip(spec.shape, term, strict=True)
        if size is None
    }
    return [letter for letter in "BTR" if letter in found]


def _ensure_executable(kernel: Kernel) -> None:
    """Put the executable at the start of the module around the insertion point, once."""
    op: Any = ir.InsertionPoint.current.block.owner
    while op.name != "builtin.module":
        op = op.parent
    block: Any = op.regions[0].blocks[0]
    if kernel.name in ir.SymbolTable(op):
        return
    text = executable_text(kernel)
    try:
        parsed: Any = ir.Module.parse(text)
    except ir.MLIRError as error:
        numbered = "\n".join(f"{i:4} {line}" for i, line in enumerate(text.splitlines(), 1))
        raise AssertionError(f"the text of {kernel.name} is wrong\n{numbered}\n{error}") from error
    executable = parsed.body.operations[0].detach_from_parent()
    start: Any = ir.InsertionPoint.at_block_begin(block)
    start.insert(executable)


def executable_text(kernel: Kernel) -> str:
    """The whole executable as MLIR."""
    reads = ["#hal.pipeline.binding<storage_buffer, ReadOnly>"] * len(kernel.inputs)
    bindings = ", ".join([*reads, *["#hal.pipeline.binding<storage_buffer>"] * len(kernel.outputs)])
    layout = f"#layout = #hal.pipeline.layout<constants = {len(_open_letters(kernel))}, bindings = [{bindings}]>"
    if not kernel.variants:
        return f"{layout}\nhal.executable.source private @{kernel.name} {{{_export_text(kernel, kernel.name)}}}\n"
    variants = [
        f"hal.executable.variant public @{v.symbol} target({v.executable}) {{{_export_text(v.kernel, kernel.name)}}}\n"
        for v in kernel.variants
    ]
    return f"{layout}\nhal.executable private @{kernel.name} {{\n{''.join(variants)}}}\n"


def _export_text(kernel: Kernel, name: str) -> str:
    """The workgroups and the body."""
    specs = (*kernel.inputs, *kernel.outputs)
    letters = _open_letters(kernel)
    known: dict[str, int | str] = {}
    for spec, term in zip(specs, kernel.axes, strict=True):
        known.update({letter: size for letter, size in zip(term, spec.shape, strict=True) if size is not None})
    k = KernelText()
    for ordinal, letter in enumerate(letters):
        raw = k.op(f"hal.interface.constant.load layout(#layout) ordinal({ordinal}) : i32", "i32")
        known[letter] = k.op(f"arith.index_castui {raw} : i32 to index", "index")
    zero = k.index(0)
    memrefs: list[str] = []
    for binding, (spec, term) in enumerate(zip(specs, kernel.axes, strict=True)):
        sizes = [known[letter] for size, letter in zip(spec.shape, term, strict=True) if size is None]
        memref = f"memref<{spec}>"
        dims = f"{{{', '.join(map(str, sizes))}}}" if sizes else ""
        place = f"hal.interface.binding.subspan layout(#layout) binding({binding}) alignment(64) offset({zero})"
        memrefs.append(k.op(f"{place} : {memref}{dims}", memref))
    kernel.write(k, known.get("B", 1), known.get("T", 1), memrefs)
    x, y = kernel.workgroups
    return f"""
  hal.executable.export public @{name} ordinal(0) layout(#layout)
      count(%device: !hal.device, %batch: index) -> (index, index, index) {{
    %x = arith.constant {x} : index
    %heads = arith.constant {y} : index
    %share = arith.constant {kernel.share} : index
    %groups = arith.ceildivui %batch, %share : index
    %y = arith.muli %groups, %heads : index
    %z = arith.constant 1 : index
    hal.return %x, %y, %z : index, index, index
  }}
  builtin.module {{
    func.func @{name}() attributes {{
        translation_info = #iree_codegen.translation_info<pipeline = #iree_codegen.no_pipeline>}} {{
{k.text()}
      return
    }}
  }}
"""
