"""The products of strategy ``fused_simt``: some rows of one expert by its weights, for one layer.

A workgroup takes a tile of columns for the rows of one item: the assignment with that number, or, where tokens are
grouped, up to 8 assignments of one expert (``simt_groups``). Threads along K read neighbouring pieces of a column; the
first layer has gate and factor of a column in the same threads, and activates them.

    h [T k, I] = act(x W1_e^T + b1_e, ...)         y [T k, H] = h W2_e^T + b2_e          f32, by assignment
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from iree.compiler import ir

from ..emit.builder import Size, spec_of, tensor_type
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer, Group, Kernel, dispatch
from ..mat_mul_n_bits.simt_weights import PackedWeights
from ..node import TensorSpec
from ..op import LoweringContext
from ..target import Target
from .activation import activate
from .contract import Experts, Matrix
from .simd_bits import product
from .simd_layers import Layer
from .simt_routing import clamped

VECTOR = 4
"""Elements of a row that are loaded at once."""

_THREADS = 128
_UNROLL = 4  # loads of a column that are under way
_STEPS = 2  # of a thread along K, at least


@dataclass(frozen=True)
class Items:
    """What workgroups take, beside tiles of columns.

    Attributes:
        count: How many items.
        rows: Rows of an item.
        experts: Where an item's expert is, i32 [count].
        order: The assignments of each item, i32 [count * rows], -1 for none; None where an item is its assignment.
    """

    count: Size
    rows: int
    experts: ir.Value
    order: ir.Value | None


@dataclass(frozen=True)
class Weights:
    """One layer's operands.

    Attributes:
        layer: What they are.
        values: The weights as they are; or words, scales and zero points (``simd_bits``).
        bias: [E, N], or None.
    """

    layer: Layer
    values: Sequence[ir.Value]
    bias: ir.Value | None


def emit_product(
    context: LoweringContext,
    c: Experts,
    items: Items,
    rows: ir.Value,
    share: int,
    weights: Sequence[Weights],
    size: Size,
    *,
    activated: bool,
) -> ir.Value:
    """Emit a layer: f32 [assignments, columns].

    Args:
        context: Where, and for what.
        c: The contract.
        items: What workgroups take.
        rows: [n, K].
        share: Assignments that share a row of those.
        weights: The layers that are multiplied with the same rows.
        size: How many assignments.
        activated: Whether the activation follows.
    """
    b = context.builder
    layer = weights[0].layer
    plan = plan_for(layer, context.target)
    dtype = spec_of(rows).dtype
    operands = [rows, items.experts, *([items.order] if items.order is not None else [])]
    for one in weights:
        operands += [*one.values, *([one.bias] if one.bias is not None else [])]

    def body(k: Kernel) -> None:
        _Product(k, c, plan, dtype, items, share, weights, activated).emit()

    keys = [f"{w.layer.matrix.key}{_scales(w)}{'b' if w.bias is not None else ''}" for w in weights]
    kind = f"{c.layout}_{c.activation.key}" if activated else "plain"
    shape = f"{layer.columns}x{layer.matrix.depth}_{c.chosen}of{c.count}s{share}"
    grouped = f"{items.rows}{'g' if items.order is not None else ''}"
    name = f"experts_simt_{dtype}_{'_'.join(keys)}_{kind}_{shape}_r{grouped}_{plan}"
    static = isinstance(size, int)
    output = (tensor_type((size if static else None, layer.columns), "f32"), [] if isinstance(size, int) else [size])
    numbers = [b.index(items.count), b.index(size)]
    tiles = -(-layer.columns // plan.tile)
    return dispatch(name, Group(plan.threads, plan.subgroup), tiles, b.index(items.count), numbers, operands,
                    [output], body)[0]  # fmt: skip


def _scales(weights: Weights) -> str:
    return spec_of(weights.values[1]).dtype if weights.layer.matrix.bits else ""


@dataclass(frozen=True)
class Plan:
    """How a product is cut.

    Attributes:
        across: Threads along K.
        groups: Columns of a workgroup, each with so many threads.
        subgroup: Threads of a subgroup, 0 to do without its operations.
    """

    across: int
    groups: int
    subgroup: int

    @property
    def threads(self) -> int:
        """Threads of a workgroup."""
        return self.across * self.groups

    @property
    def tile(self) -> int:
        """Columns of a workgroup."""
        return self.groups

    def __str__(self) -> str:
        return f"a{self.across}x{self.groups}g{self.subgroup}"


def plan_for(layer: Layer, target: Target) -> Plan:
    """As many threads along K as have something to do, up to a subgroup."""
    threads, subgroup = min(_THREADS, target.max_threads), target.subgroup_size
    most, across, units = min(subgroup or 16, threads), 1, units_of(layer.matrix)
    while across < most and across * _STEPS < units:
        across *= 2
    groups = max(1, threads // across)
    return Plan(across, groups, subgroup if subgroup and across * groups % subgroup == 0 else 0)


def units_of(matrix: Matrix) -> int:
    """What a thread loads of a column at once: words of packed weights, else vectors."""
    return matrix.depth * matrix.bits // 32 if matrix.bits else matrix.depth // VECTOR


class _FloatColumns:
    """Columns of weights as they are, [E, N, K]."""

    def __init__(self, k: Kernel, layer: Layer, first: int) -> None:
        m = layer.matrix
        self.k, self.layer = k, layer
        count = Scalar.constant(layer.experts * m.columns * m.depth // VECTOR, "index")
        self.buffer, self.after = k.buffer(first, m.dtype, count, VECTOR), first + 1
        self.units, self.vectors = m.depth // VECTOR, 1

    def load(self, expert: Scalar, part: int, column: Scalar, place: Scalar) -> list[ir.Value]:
        """One unit."""
        at = model_column(self.layer, expert, part, column) * self.units + place
        return [self.k.load(self.buffer, at)]

    def add(
        self, sums: Sequence[ir.Value], loads: list[ir.Value], rows: Sequence[Sequence[ir.Value]],
        expert: Scalar, part: int, column: Scalar, place: Scalar, fits: Scalar | None,
    ) -> list[ir.Value]:  # fmt: skip
        """The sums of each row and the products with what was loaded."""
        del expert, part, column, place
        k = self.k
        weights = k.elements(k.widen(self.buffer, loads[0]))
        if fits is not None:
            weights = [k.select(fits, weight, k.constant(0.0)) for weight in weights]
        found = list(sums)
        for m, values in enumerate(rows):
            for value, weight in zip(values, weights, strict=True):
                found[m] = k.fma(value, weight, found[m])
        return found


class _PackedColumns:
    """Columns of packed words, all of gate before all of factor."""

    def __init__(self, k: Kernel, layer: Layer, scales: str, first: int) -> None:
        one = product(layer, None)
        self.k, self.layer = k, layer
        columns = layer.experts * layer.parts * layer.columns
        c = replace(one, columns=columns, a=TensorSpec(one.a.shape, scales))
        self.weights = PackedWeights(k, c, 1, first)
        self.after = self.weights.output
        self.units, self.vectors = c.row_words, c.per_word // VECTOR

    def _column(self, expert: Scalar, part: int, column: Scalar) -> Scalar:
        layer = self.layer
        return (expert * layer.parts + part) * layer.columns + column

    def load(self, expert: Scalar, part: int, column: Scalar, place: Scalar) -> list[ir.Value]:
        """One unit."""
        return self.weights.load(self._column(expert, part, column), place)

    def add(
        self, sums: Sequence[ir.Value], loads: list[ir.Value], rows: Sequence[Sequence[ir.Value]],
        expert: Scalar, part: int, column: Scalar, place: Scalar, fits: Scalar | None,
    ) -> list[ir.Value]:  # fmt: skip
        """The sums of each row and the products with what was loaded."""
        k = self.k
        (found,) = self.weights.unpack(loads, self._column(expert, part, column), place)
        scale = found.scale if fits is None else k.select(fits, found.scale, k.constant(0.0))
        values = found.values if found.offset is None else [k.sub(v, found.offset) for v in found.values]
        results: list[ir.Value] = []
        for total, row in zip(sums, rows, strict=True):
            part_sum = k.mul(row[0], values[0])
            for value, weight in zip(row[1:], values[1:], strict=True):
                part_sum = k.fma(value, weight, part_sum)
            results.append(k.fma(part_sum, scale, total))
        return results


def model_column(layer: Layer, expert: Scalar, part: int, column: Scalar) -> Scalar:
    """Where a part's column is among those of all experts, in the model's order."""
    inside = column * 2 + part if layer.layout == "interleaved" else column + part * layer.columns
    return expert * layer.matrix.columns + inside


class _Product:
    """Emits the kernel."""

    def __init__(
        self, k: Kernel, c: Experts, plan: Plan, dtype: str, items: Items, share: int, weights: Sequence[Weights],
        activated: bool,
    ) -> None:  # fmt: skip
        self.k, self.c, self.p, self.rows, self.share, self.activated = k, c, plan, items.rows, share, activated
        self.count, self.size = k.number(0), k.number(1)
        layer = weights[0].layer
        self.columns, depth = layer.columns, layer.matrix.depth
        self.row = depth // VECTOR
        self.a = k.buffer(0, dtype, self.size * self.row, VECTOR)
        self.experts = k.buffer(1, "i32", self.count)
        self.order = k.buffer(2, "i32", self.count * self.rows) if items.order is not None else None
        at = 3 if self.order is not None else 2
        self.parts: list[tuple[_FloatColumns | _PackedColumns, Layer, int, Buffer | None]] = []
        for one in weights:
            m = one.layer.matrix
            found = _PackedColumns(k, one.layer, _scales(one), at) if m.bits else _FloatColumns(k, one.layer, at)
            at, bias = found.after, None
            if one.bias is not None:
                bias = k.buffer(at, m.dtype, Scalar.constant(c.count * m.columns, "index"))
                at += 1
            self.parts += [(found, one.layer, part, bias) for part in range(one.layer.parts)]
        self.y = k.buffer(at, "f32", self.size * self.columns)

    def emit(self) -> None:
        """Emit everything."""
        k, p = self.k, self.p
        item = k.item().minimum(self.count - 1)
        self.expert = clamped(k.load(self.experts, item), self.c.count)
        assignments, self.valid = self._assignments(item)
        self.assignments = assignments
        sources = [a.divide_unsigned(self.share)[0] for a in assignments]
        self.group, self.lane = k.thread().divide_unsigned(p.across)
        first = k.tile() * p.tile + self.group
        column = first if self.columns % p.tile == 0 else first.minimum(self.columns - 1)
        sums = self._sums(column, sources)
        values = self._met(sums)

        def write() -> None:
            self._write(values, column)

        condition = self.lane.equals(0)
        if self.columns % p.tile:
            condition = condition & (first < self.columns)
        k.when(condition, write)

    def _assignments(self, item: Scalar) -> tuple[list[Scalar], list[Scalar] | None]:
        """The item's rows, and which of them there are."""
        k = self.k
        if self.order is None:
            return [item], None
        raw = [k.load(self.order, item * self.rows + m) for m in range(self.rows)]
        valid = [Scalar(value) >= 0 for value in raw]
        zero = Scalar.constant(0, "i32")
        found = [Scalar(v).maximum(zero).to("index", unsigned=True).minimum(self.size - 1) for v in raw]
        return found, valid

    def _sums(self, column: Scalar, sources: Sequence[Scalar]) -> list[ir.Value]:
        """This thread's sums, of each part for each row."""
        k, p = self.k, self.p
        zero = Scalar.constant(0, "index")
        sums: list[ir.Value] = []
        units = {found.units for found, *_ in self.parts}
        for size in sorted(units):  # layers of different bits have loops of their own
            parts = [part for part in self.parts if part[0].units == size]
            steps = -(-size // p.across)
            unroll = max(u for u in range(1, _UNROLL + 1) if steps % u == 0)
            stop = Scalar.constant(steps, "index")
            if self.valid is not None:  # a tile without rows reads nothing
                stop = self.valid[0].select(stop, zero)
            initial = [k.constant(0.0)] * (len(parts) * self.rows)

            def step(
                index: Scalar,
                carried: list[ir.Value],
                parts: Sequence[tuple[_FloatColumns | _PackedColumns, Layer, int, Buffer | None]] = parts,
                size: int = size,
                unroll: int = unroll,
            ) -> list[ir.Value]:
                return self._step(index, carried, parts, size, unroll, column, sources)

            sums += k.loop(zero, stop, unroll, initial, step)
        return sums

    def _step(
        self, index: Scalar, carried: list[ir.Value],
        parts: Sequence[tuple[_FloatColumns | _PackedColumns, Layer, int, Buffer | None]], size: int, unroll: int,
        column: Scalar, sources: Sequence[Scalar],
    ) -> list[ir.Value]:  # fmt: skip
        k, p = self.k, self.p
        places = [(index + u) * p.across + self.lane for u in range(unroll)]
        fits: list[Scalar | None] = [None] * unroll
        if size % p.across:
            fits = [place < size for place in places]
            places = [place.minimum(size - 1) for place in places]
        loads = [[found.load(self.expert, part, column, at) for found, _, part, _ in parts] for at in places]
        vectors = parts[0][0].vectors
        given = [
            [[k.load(self.a, source * self.row + (at * vectors + i)) for i in range(vectors)] for source in sources]
            for at in places
        ]
        sums = list(carried)
        for at, fit, stored, inputs in zip(places, fits, loads, given, strict=True):
            rows = [[e for v in one for e in k.elements(k.widen(self.a, v))] for one in inputs]
            for i, ((found, _, part, _), one) in enumerate(zip(parts, stored, strict=True)):
                start = i * self.rows
                own = found.add(sums[start : start + self.rows], one, rows, self.expert, part, column, at, fit)
                sums[start : start + self.rows] = own
        return sums

    def _met(self, sums: list[ir.Value]) -> list[ir.Value]:
        """The sums over the threads of a column."""
        k, p = self.k, self.p
        if p.across == 1:
            return sums
        if p.subgroup:
            offset = 1
            while offset < p.across:
                sums = [k.add(value, k.shuffle_xor(value, offset)) for value in sums]
                offset *= 2
            return sums
        scratch = k.shared(p.threads * len(sums))
        for i, value in enumerate(sums):
            k.store(value, scratch, k.thread() * len(sums) + i)
        k.barrier()
        results: list[ir.Value] = []
        for i in range(len(sums)):
            found = [k.load(scratch, (self.group * p.across + lane) * len(sums) + i) for lane in range(p.across)]
            while len(found) > 1:
                found = [k.add(found[j], found[j + 1]) for j in range(0, len(found), 2)]
            results.append(found[0])
        return results

    def _write(self, values: Sequence[ir.Value], column: Scalar) -> None:
        k = self.k
        parts = sorted(self.parts, key=lambda part: part[0].units)  # the order of the sums
        for m in range(self.rows):
            found: dict[int, Scalar] = {}
            for i, (_, layer, part, bias) in enumerate(parts):
                value = values[i * self.rows + m]
                if bias is not None:
                    stored = k.load(bias, model_column(layer, self.expert, part, column))
                    value = k.add(value, k.widen(bias, stored))
                found[part if layer.matrix.name != "fc3" else 1] = Scalar(value)
            result = activate(self.c.activation, found[0], found.get(1)) if self.activated else found[0]

            def write(m: int = m, result: Scalar = result) -> None:
                k.store(result.value, self.y, self.assignments[m] * self.columns + column)

            if self.valid is None:
                write()
            else:
                k.when(self.valid[m], write)
