"""Several steps a call: a function with a generation's loop around the one that chooses the next token.

On a CPU the weights of a step leave nothing of Python in the caches, so that what Python does for a token is fetched
anew each time. A loop outside of kernels stays in the bytecode that IREE's runtime interprets, which is a few KB:

    util.func public @decode_draw_steps(...) -> i64 {      runtime/README.md has the arguments
      ^step(done, states, memory for the next ones, memory for those behind them):
        the position ids become start + done
        @decode_draw(row `done` of the tokens, ..., the token into row `done + 1`)
        the token's column of the mask becomes 1
        the end where a token cannot be fed (negative: there was none) or is one of `stops`, or `count` steps are done
    }

It has no kernel of its own, and is added where IREE has made everything else, so it costs a KB of module.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from iree.compiler import ir
from linattn.runtime.device import numpy_dtype
from linattn.runtime.manifest import STEPS_KEY, EntryPoint, Manifest
from linattn.runtime.step import DRAW_SETTINGS, step_shapes
from linattn.runtime.step_loop import row_bytes

from .executables import operations

VIEW, BUFFER = "!hal.buffer_view", "!hal.buffer"
_GREATEST = (1 << 31) - 1
_NUMBERS = ("int64", "int32")
_FLAGS = (*_NUMBERS, "bool", "int8", "uint8")


def with_step_loops(manifest: Manifest) -> Manifest:
    """The manifest with `EntryPoint.steps` where a loop can write all that changes from step to step.

    Args:
        manifest: Of a CPU's module whose functions take the memory of their results.
    """
    can = _can_loop(manifest)

    def named(entry: EntryPoint) -> EntryPoint:
        one = entry.draw or entry.token
        return dataclasses.replace(entry, steps=f"{one}_steps") if one and can else entry

    return dataclasses.replace(manifest, entry_points=tuple(named(entry) for entry in manifest.entry_points))


def add_step_loops(module: ir.Operation, manifest: Manifest) -> None:
    """Add the functions that the manifest tells of.

    Args:
        module: After IREE's phase ``hal``, in a context.
        manifest: The one that the module has.
    """
    for entry in manifest.entry_points:
        if entry.steps is not None:
            add_function(module, _text(manifest, entry))


def add_function(module: ir.Operation, text: str) -> None:
    """Add the last function of a module's text, in a context."""
    parsed = ir.Module.parse(text)
    operations(parsed.operation)[-1].move_before(operations(module)[0])


def _can_loop(m: Manifest) -> bool:
    return can_write_inputs(m) and sum(spec.role == "logits" for spec in m.outputs) == 1


def can_write_inputs(m: Manifest) -> bool:
    """Whether a function outside of kernels can write all inputs of a step that change from token to token."""
    shapes = step_shapes(m, m.batch) if m.batch is not None else None
    if shapes is None:
        return False
    columns = (m.max_context or 0) + 1
    return all(
        (spec.role == "tokens" and spec.dtype in _NUMBERS)
        or (spec.role == "position_ids" and spec.dtype in _NUMBERS)
        or (spec.role == "attention_mask" and spec.dtype in _FLAGS and shape[-1] == columns)
        for spec, shape in zip(m.inputs, shapes, strict=True)
    )


def _text(m: Manifest, entry: EntryPoint) -> str:
    """The function, behind a declaration of the one that it calls."""
    one, rows, shapes = entry.draw or entry.token, m.batch or 1, step_shapes(m, m.batch or 1)
    assert shapes is not None
    ids_at = next(i for i, spec in enumerate(m.inputs) if spec.role == "tokens")
    chosen_at = next(i for i, spec in enumerate(m.outputs) if spec.role == "logits")
    width, bounds = numpy_dtype(m.inputs[ids_at].dtype).itemsize, m.inputs[ids_at].bounds
    moving = [i for i, spec in enumerate(m.states) if not spec.in_place]
    tied, draws = len(m.states) - len(moving), entry.draw is not None

    inputs = [f"%input{i}" if i != ids_at else "%ids" for i in range(len(m.inputs))]
    outputs = [f"%output{i}" if i != chosen_at else "%chosen" for i in range(len(m.outputs))]
    states = [f"%state{i}" for i in range(len(m.states))]
    now, into, later = (_each(kind, moving) for kind in ("now", "into", "later"))
    first, second = _each("first", moving), _each("second", moving)
    views = [name for name in inputs if name != "%ids"] + states + [name for name in outputs if name != "%chosen"]
    views += [*first, *second, "%tokens", *(["%draws"] if draws else []), "%stops"]
    numbers = ["%start", "%count", "%stop_count"]
    arguments = [f"{name}: {VIEW}" for name in views] + [f"%workspace: {BUFFER}"] + [f"{n}: i64" for n in numbers]

    current = [f"%now{i}" if i in moving else f"%state{i}" for i in range(len(m.states))]
    passed = [*inputs, *current, *(["%draw"] if draws else [])]
    storage = [*outputs, *into]
    types = [VIEW] * len(passed) + ["i64"] * m.takes_position + [VIEW] * len(storage) + [BUFFER]
    passed += [*(["%position"] if m.takes_position else []), *storage, "%workspace"]
    returned = f"({', '.join([VIEW] * tied)})"
    call = f"util.call @{one}({', '.join(passed)}) : ({', '.join(types)}) -> {returned}"

    before, after = list[str](), list[str]()
    for i, (spec, shape) in enumerate(zip(m.inputs, shapes, strict=True)):
        size = numpy_dtype(spec.dtype).itemsize
        if spec.role == "position_ids":
            before += store(f"p{i}", inputs[i], [n * size for n in range(math.prod(shape))], None, "%position_low")
        elif spec.role == "attention_mask":
            starts = [n * shape[-1] * size for n in range(math.prod(shape[:-1]))]
            after += store(f"m{i}", inputs[i], starts, size, "%true" if size == 1 else "%one_low")
    if draws:
        before += [
            f"%draw_row = arith.constant {row_bytes(4 * DRAW_SETTINGS * rows)} : index",
            "%draw_start = arith.muli %at, %draw_row : index",
            f"%draw_bytes = arith.constant {4 * DRAW_SETTINGS * rows} : index",
            f"%settings = arith.constant {DRAW_SETTINGS} : index",
            "%f32 = hal.element_type<f32> : i32",
            _view("%draw", "%draw_memory", "%draw_start, %draw_bytes", "%rows, %settings", "%f32"),
        ]
    carried = ", ".join(f"{name}: {VIEW}" for name in (*now, *into, *later))
    kinds = ", ".join(["i64", *[VIEW] * (3 * len(moving))])
    start = ", ".join(["%zero", *(states[i] for i in moving), *first, *second])
    following = ", ".join(["%after", *into, *later, *into])
    lines = [
        f"util.func private @{one}({', '.join(types)}) -> {returned}",
        f"util.func public @{entry.steps}({', '.join(arguments)}) -> i64",
        f'attributes {{iree.reflection = {{{STEPS_KEY} = "{one}"}}, inlining_policy = #util.inline.never}} {{',
        "%zero = arith.constant 0 : i64",
        *(f"%one{kind} = arith.constant 1 : {i}" for kind, i in (("", "i64"), ("_low", "i32"), ("_at", "index"))),
        "%true = arith.constant 1 : i8",
        f"%greatest = arith.constant {min(bounds[1] if bounds else _GREATEST, _GREATEST)} : i32",
        f"%row = arith.constant {row_bytes(width * rows)} : index",
        f"%bytes = arith.constant {width * rows} : index",
        f"%rows = arith.constant {rows} : index",
        "%stop_bytes = arith.constant 4 : index",
        f"%type = hal.element_type<i{8 * width}> : i32",
        "%dense = hal.encoding_type<dense_row_major> : i32",
        *(memory(name) for name in ("%tokens", "%stops", *(["%draws"] if draws else []))),
        *(memory(name) for name in inputs if name != "%ids"),
        f"cf.br ^step({start} : {kinds})",
        f"^step(%done: i64{f', {carried}' if carried else ''}):",
        "%position = arith.addi %start, %done : i64",
        "%position_low = arith.trunci %position : i64 to i32",
        "%column = arith.index_cast %position : i64 to index",
        "%at = arith.index_cast %done : i64 to index",
        "%ids_start = arith.muli %at, %row : index",
        "%chosen_start = arith.addi %ids_start, %row : index",
        _view("%ids", "%token_memory", "%ids_start, %bytes", "%rows, %one_at", "%type"),
        _view("%chosen", "%token_memory", "%chosen_start, %bytes", "%rows, %one_at", "%type"),
        *before,
        f"%tied:{tied} = {call}" if tied else call,
        *after,
        "%after = arith.addi %done, %one : i64",
        *(line for row in range(rows) for line in _look(row, row * width)),
        f"cf.cond_br %none{rows - 1}, ^end, ^stop(%zero : i64)",
        "^stop(%which: i64):",
        "%is_compared = arith.cmpi sge, %which, %stop_count : i64",
        "cf.cond_br %is_compared, ^more, ^compare",
        "^compare:",
        "%which_at = arith.index_cast %which : i64 to index",
        "%stop_start = arith.muli %which_at, %stop_bytes : index",
        f"%stop = hal.buffer.load<%stop_memory : {BUFFER}>[%stop_start] : i32",
        "%is_stop = arith.cmpi eq, %stop, %token0 : i32",
        "%next = arith.addi %which, %one : i64",
        "cf.cond_br %is_stop, ^end, ^stop(%next : i64)",
        "^more:",
        "%is_last = arith.cmpi sge, %after, %count : i64",
        f"cf.cond_br %is_last, ^end, ^step({following} : {kinds})",
        "^end:",
        "util.return %after : i64",
        "}",
    ]
    return "\n".join(lines)


def _each(kind: str, moving: Sequence[int]) -> list[str]:
    return [f"%{kind}{i}" for i in moving]


def memory(view: str) -> str:
    """The buffer of a view: `%tokens` -> `%token_memory`, `%input1` -> `%input1_memory`."""
    return f"{view.removesuffix('s')}_memory = hal.buffer_view.buffer<{view} : {VIEW}> : {BUFFER}"


def _view(name: str, memory: str, region: str, shape: str, kind: str) -> str:
    where = f"buffer({memory} : {BUFFER})[{region}]"
    return f"{name} = hal.buffer_view.create {where} shape([{shape}]) type({kind}) encoding(%dense) : {VIEW}"


def store(name: str, view: str, starts: Sequence[int], size: int | None, value: str) -> list[str]:
    """Writes a number to some places, those of `%column` where its elements have a size; high halves are zero.

    Args:
        name: What constants are called after.
        view: Of the memory.
        starts: The places, in bytes.
        size: Of an element; None: the places are those themselves.
        value: Four bytes, or `%true`, which has one.
    """
    kind, lines = "i8" if value == "%true" else "i32", list[str]()
    for n, start in enumerate(starts):
        place = f"%{name}_{n}"
        lines.append(f"{place} = arith.constant {start} : index")
        if size is not None:
            lines += [
                f"{place}_size = arith.constant {size} : index",
                f"{place}_at = arith.muli %column, {place}_size : index",
                f"{place}_column = arith.addi {place}, {place}_at : index",
            ]
            place = f"{place}_column"
        lines.append(f"hal.buffer.store<{view}_memory : {BUFFER}>[{place}] value({value} : {kind})")
    return lines


def _look(row: int, offset: int) -> list[str]:
    """Loads a row's token, and whether it or one before it is none that can be fed: negative ones are great too."""
    lines = [
        f"%offset{row} = arith.constant {offset} : index",
        f"%place{row} = arith.addi %chosen_start, %offset{row} : index",
        f"%token{row} = hal.buffer.load<%token_memory : {BUFFER}>[%place{row}] : i32",
    ]
    if row == 0:
        return [*lines, "%none0 = arith.cmpi ugt, %token0, %greatest : i32"]
    missing = f"%missing{row} = arith.cmpi ugt, %token{row}, %greatest : i32"
    return [*lines, missing, f"%none{row} = arith.ori %none{row - 1}, %missing{row} : i1"]
