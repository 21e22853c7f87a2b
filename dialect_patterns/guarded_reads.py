"""No index can leave its tensor: numbers that come from data are clamped where a tensor is read or written with them.

The importer lowers Gather, GatherElements and GatherND to ``tensor.extract`` inside a loop, ScatterElements and
ScatterND to ``iree_linalg_ext.scatter``, after it has counted ONNX's negative indices from the end; nothing in either
looks at what the index is. An index past one of the ends becomes the first or last one (of the flattened axes, for the
ND operators). In place, and no kernel more:

    %i = arith.index_cast %in : i64 to index               %0 = arith.maxsi %in, %c0_i64
    %v = tensor.extract %table[%i, %j]                -->  %1 = arith.minsi %0, %c999_i64
                                                           %i = arith.index_cast %1 ...

Loop indices and what is computed from them stay as they are, and so does an index that is within its bounds already.
What the runtime refuses (``InputSpec.bounds``) never comes here; whoever calls a module in another way, or computes an
index in the model, gets the clamped element. Only a table without rows has none to give.
"""

from __future__ import annotations

from dataclasses import dataclass

from iree.compiler import ir
from iree.compiler.dialects import tensor

from .emit.builder import Builder, Size, spec_of
from .emit.scalar import Scalar

_ANY = 1 << 63


@dataclass(frozen=True)
class Range:
    """What is known of an index.

    Attributes:
        low: It is at least this.
        high: It is at most this.
        trusted: Whether it depends on loop indices, sizes and constants alone.
    """

    low: int = -_ANY
    high: int = _ANY
    trusted: bool = False


def guard_reads(module: ir.Module) -> int:
    """Clamp the indices of a module of linalg, changed in place.

    Returns:
        How many operands were clamped.
    """
    reads: list[ir.Operation] = []
    scatters: list[ir.Operation] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        if op.name == "tensor.extract":
            reads.append(op)
        elif op.name == "iree_linalg_ext.scatter":
            scatters.append(op)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    for scatter in scatters:
        with ir.InsertionPoint(scatter), scatter.location:
            _guard_scatter(scatter)
    return sum(_guard_read(read) for read in reads) + len(scatters)


def _guard_read(read: ir.Operation) -> int:
    source, *indices = read.operands
    count = 0
    for axis, index in enumerate(indices):
        size = spec_of(source).shape[axis]
        found = range_of(index)
        if found.trusted or size == 0 or (size is not None and found.low >= 0 and found.high < size):
            continue
        with read.location:
            read.operands[axis + 1] = _clamped(read, source, axis, index)
        count += 1
    return count


def _clamped(read: ir.Operation, source: ir.Value, axis: int, index: ir.Value) -> ir.Value:
    size = spec_of(source).shape[axis]
    if size is None:
        with ir.InsertionPoint(_outside_loops(read)):
            last = Scalar(Builder().index(Builder().sub(tensor.DimOp(source, Builder().index(axis)).result, 1)))
        with ir.InsertionPoint(read):
            return Scalar(index).minimum(last).maximum(0).value
    with ir.InsertionPoint(read):
        number = _before_index_cast(index)
        bits = 64 if number.dtype == "index" else int(number.dtype[1:])
        return number.minimum(min(size, 1 << (bits - 1)) - 1).maximum(0).to("index").value


def _before_index_cast(index: ir.Value) -> Scalar:
    """The integer that an index was made of: on devices with indices of 32 bits the cast drops bits of it."""
    owner = index.owner
    if isinstance(owner, ir.Block) or owner.operation.name != "arith.index_cast":
        return Scalar(index)
    return Scalar(owner.operation.operands[0])


def _outside_loops(op: ir.Operation) -> ir.Operation:
    """The outermost structured operation around ``op``, before which its tensors are there; else ``op``."""
    found, parent = op, op.parent
    while parent is not None:
        if parent.operation.name.startswith("linalg."):
            found = parent.operation
        parent = parent.operation.parent
    return found


def _guard_scatter(scatter: ir.Operation) -> None:
    b = Builder()
    indices, target = scatter.operands[1], scatter.operands[2]
    axes = list(ir.DenseI64ArrayAttr(scatter.attributes["dimension_map"]))
    last: list[Size] = [b.sub(b.dim(target, axis), 1) for axis in axes]
    ends = [Scalar(b.index(end)).to(spec_of(indices).dtype) for end in last]
    letters = "abcdefgh"[: spec_of(indices).rank]

    def clamp(index: Scalar) -> Scalar:
        end = ends[0]
        for column, other in enumerate(ends[1:], 1):
            end = b.loop_index(len(letters) - 1).equals(column).select(other, end)
        return index.minimum(end).maximum(0)

    scatter.operands[1] = b.map(f"{letters}->{letters}", clamp, indices)


def range_of(value: ir.Value) -> Range:
    """What an index can be, as far as the operations that it is computed with say so."""
    owner = value.owner
    if isinstance(owner, ir.Block):
        is_counter = owner.owner.operation.name == "scf.for" and ir.BlockArgument(value).arg_number == 0
        return Range(trusted=is_counter)
    op = owner.operation
    if op.name == "arith.constant":
        attribute = op.attributes["value"]
        low, high = (attribute.value,) * 2 if isinstance(attribute, ir.IntegerAttr) else (-_ANY, _ANY)
        return Range(low, high, True)
    if op.name in ("linalg.index", "tensor.dim"):
        return Range(0, _ANY, True)
    if op.name == "arith.index_cast":
        return range_of(op.operands[0])
    if not op.name.startswith(("arith.", "affine.")):
        return Range()
    operands = [range_of(operand) for operand in op.operands]
    trusted = all(operand.trusted for operand in operands)
    if op.name == "arith.minsi":
        return Range(min(o.low for o in operands), min(o.high for o in operands), trusted)
    if op.name == "arith.maxsi":
        return Range(max(o.low for o in operands), max(o.high for o in operands), trusted)
    if op.name == "arith.select":
        return Range(min(o.low for o in operands[1:]), max(o.high for o in operands[1:]), trusted)
    return Range(trusted=trusted)
