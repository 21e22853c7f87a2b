"""Steps whose arguments are packed once: a function that finds what changes from token to token in memory.

IREE's Python can append to a list of arguments and cannot change one, so a call with a number among them is packed
anew, 20 arguments for one position. On a CPU that takes 20 to 40 us a token, for the weights leave nothing of it in
the caches:

    util.func public @decode_packed(...) {      runtime/README.md has the arguments
        the position ids become `position`, the mask's column of the token before it 1
        @decode(..., position, ...)
    }

It has no kernel of its own, and is added where IREE has made everything else, so it costs a KB of module.
"""

from __future__ import annotations

import dataclasses
import math

from iree.compiler import ir
from linattn.runtime.device import numpy_dtype
from linattn.runtime.manifest import STEPS_KEY, EntryPoint, Manifest
from linattn.runtime.step import step_shapes

from .step_loops import BUFFER, VIEW, add_function, can_write_inputs, memory, store


def with_packed_steps(manifest: Manifest) -> Manifest:
    """The manifest with `EntryPoint.packed` where the function can write all that changes but the token.

    Args:
        manifest: Of a CPU's module whose functions take the memory of their results.
    """

    def named(entry: EntryPoint) -> EntryPoint:
        can = entry.tokens == 1 and can_write_inputs(manifest)
        return dataclasses.replace(entry, packed=f"{entry.symbol}_packed") if can else entry

    return dataclasses.replace(manifest, entry_points=tuple(named(entry) for entry in manifest.entry_points))


def add_packed_steps(module: ir.Operation, manifest: Manifest) -> None:
    """Add the functions that the manifest tells of.

    Args:
        module: After IREE's phase ``hal``, in a context.
        manifest: The one that the module has.
    """
    for entry in manifest.entry_points:
        if entry.packed is not None:
            add_function(module, _text(manifest, entry))


def _text(m: Manifest, entry: EntryPoint) -> str:
    """The function, behind a declaration of the one that it calls."""
    shapes = step_shapes(m, m.batch or 1)
    assert shapes is not None
    inputs = [f"%input{i}" for i in range(len(m.inputs))]
    states = [f"%state{i}" for i in range(len(m.states))]
    outputs = [f"%output{i}" for i in range(len(m.outputs))]
    outputs += [f"%into{i}" for i, spec in enumerate(m.states) if not spec.in_place]
    tied = sum(spec.in_place for spec in m.states)
    arguments = [f"{name}: {VIEW}" for name in (*inputs, *states, "%numbers", *outputs)]
    passed = [*inputs, *states, *(["%position"] if m.takes_position else []), *outputs, "%workspace"]
    types = [VIEW] * len(inputs + states) + ["i64"] * m.takes_position + [VIEW] * len(outputs) + [BUFFER]
    returned = f"({', '.join([VIEW] * tied)})"
    call = f"util.call @{entry.symbol}({', '.join(passed)}) : ({', '.join(types)}) -> {returned}"

    ids, column = list[str](), list[str]()
    for i, (spec, shape) in enumerate(zip(m.inputs, shapes, strict=True)):
        size = numpy_dtype(spec.dtype).itemsize
        if spec.role == "position_ids":
            ids += store(f"p{i}", inputs[i], [n * size for n in range(math.prod(shape))], None, "%position_low")
        elif spec.role == "attention_mask":
            starts = [n * shape[-1] * size for n in range(math.prod(shape[:-1]))]
            column += store(f"m{i}", inputs[i], starts, size, "%true" if size == 1 else "%one_low")
    lines = [
        f"util.func private @{entry.symbol}({', '.join(types)}) -> {returned}",
        f"util.func public @{entry.packed}({', '.join(arguments)}, %workspace: {BUFFER})",
        f'attributes {{iree.reflection = {{{STEPS_KEY} = "{entry.symbol}"}}, inlining_policy = #util.inline.never}} {{',
        "%zero_at = arith.constant 0 : index",
        "%zero = arith.constant 0 : i64",
        "%one_low = arith.constant 1 : i32",
        "%one = arith.constant 1 : i64",
        "%true = arith.constant 1 : i8",
        *(memory(name) for name in ("%numbers", *inputs)),
        f"%position_low = hal.buffer.load<%number_memory : {BUFFER}>[%zero_at] : i32",
        "%position = arith.extsi %position_low : i32 to i64",
        *ids,
        "%is_first = arith.cmpi eq, %position, %zero : i64",
        "cf.cond_br %is_first, ^call, ^mark",
        "^mark:",
        "%before = arith.subi %position, %one : i64",
        "%column = arith.index_cast %before : i64 to index",
        *column,
        "cf.br ^call",
        "^call:",
        f"%tied:{tied} = {call}" if tied else call,
        "util.return",
        "}",
    ]
    return "\n".join(lines)
