"""The second kernel of attention on GPUs: the outputs from what several workgroups found for parts of the keys.

A workgroup does a row. Its slices take their share of the parts each, where they can be dealt out evenly, and are
joined in the workgroup's memory: one after the other 36 parts took 10 us on an H100, of which the memory needs a tenth.
"""

from __future__ import annotations

from dataclasses import dataclass

from iree.compiler import ir

from ..emit.builder import Builder, spec_of, tensor_type
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Group, Kernel, dispatch
from ..node import TensorSpec
from ..target import Target
from .simt_call import WIDTH, Call, Sizes

_AT_ONCE = 8
"""Parts of a slice whose loads are under way."""

_MOST_THREADS = 512

LOWEST = -3.4028234663852886e38
"""The lowest finite f32: no score is lower but -inf, and exp(-inf - it) is 0."""


@dataclass(frozen=True)
class Gate:
    """Where the gates of the outputs of one token lie, a row of the batch after the other.

    Attributes:
        start: The first element.
        stride: Elements from a head to the next one.
    """

    start: int
    stride: int


def sink_of_row(k: Kernel, c: Call, n: Sizes, dtype: str, binding: int, head: Scalar, row: Scalar) -> ir.Value:
    """The sink of a row of a key head (its query heads and their tokens), read from ``binding``."""
    sinks = k.buffer(binding, dtype, Scalar.constant(c.kv_heads * c.group, "index"))
    key_head = head.divide_unsigned(c.kv_heads)[1]
    return k.widen(sinks, k.load(sinks, key_head * c.group + n.member(row)[0]))


def emit_join(
    b: Builder, target: Target, c: Call, parts: int, found: list[ir.Value], sink: ir.Value | None, result: TensorSpec,
    gate: tuple[Gate, ir.Value] | None = None,
) -> ir.Value:  # fmt: skip
    """The outputs from their parts.

    Args:
        b: The builder.
        target: To compile for.
        c: What is computed.
        parts: P.
        found: Maxima and sums [B * Hkv, P, R, 2] and weighted values [B * Hkv, P, R, dv], f32.
        sink: What the softmax of each query head sees beside its keys [Hq], or None.
        result: Type of the outputs [B, Hq, T, dv].
        gate: What the outputs of one token are multiplied by the logistic function of, of their type; None for nothing.
    """
    heads, wide = c.batch * c.kv_heads, min(target.max_threads, c.dv // WIDTH)
    sink_type = "" if sink is None else spec_of(sink).dtype
    lead = f"{result.dtype}_sink{sink_type}_{c.group}x{c.kv_heads}" if sink_type else result.dtype
    room = max(1, min(target.max_threads, _MOST_THREADS) // wide) if wide == c.dv // WIDTH else 1
    slices = max(count for count in range(1, room + 1) if parts % count == 0)
    at_once = max(count for count in range(1, _AT_ONCE + 1) if parts // slices % count == 0)
    name = f"attention_fused_simt_join_{lead}_h{heads}_by{slices}x{at_once}_d{c.dv}"
    of_gate = _OfGate(gate[0], spec_of(gate[1]).shape[-1] or 0) if gate is not None else None
    name += "" if of_gate is None else f"_gate{of_gate.gate.start}by{of_gate.gate.stride}of{of_gate.width}g{c.group}"
    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [(tensor_type(result.shape, result.dtype), [])]

    numbers = [b.index(size) for size in (c.tokens, c.rows, parts)]

    def body(kernel: Kernel) -> None:
        sizes = Sizes(*(kernel.number(i) for i in range(3)))
        _emit_join(kernel, c, sizes, (slices, at_once), sink_type, result.dtype, of_gate)

    inputs = [*found, *([] if sink is None else [sink]), *([] if gate is None else [gate[1]])]
    return dispatch(name, Group(wide * slices, 0), 1, b.index(heads * c.rows), numbers, inputs, outputs, body)[0]


@dataclass(frozen=True)
class _OfGate:
    gate: Gate
    width: int  # of a row

    def load(self, k: Kernel, c: Call, binding: int, dtype: str, heads: tuple[Scalar, Scalar], at: Scalar) -> ir.Value:
        """The gates of a vector of a row of a key head."""
        (head, row), size = heads, c.batch * self.width // WIDTH
        gates = k.buffer(binding, dtype, Scalar.constant(size, "index"), WIDTH)
        batch, key_head = head.divide_unsigned(c.kv_heads)
        start = (key_head * c.group + row) * (self.gate.stride // WIDTH) + (self.gate.start // WIDTH)
        return k.widen(gates, k.load(gates, batch * (self.width // WIDTH) + start + at))


def _emit_join(
    k: Kernel, c: Call, n: Sizes, counts: tuple[int, int], sink_type: str, dtype: str, gate: _OfGate | None
) -> None:
    """Join the parts of one row, dealt out to so many slices, so many of one at once."""
    (slices, at_once), heads, vectors = counts, c.batch * c.kv_heads, c.dv // WIDTH
    rows = n.parts * n.rows * heads
    stats, sums = k.buffer(0, "f32", rows * 2), k.buffer(1, "f32", rows * vectors, WIDTH)
    of_gate = 3 if sink_type else 2
    output = k.buffer(of_gate + (gate is not None), dtype, n.rows * (heads * vectors), WIDTH)
    head, row = k.item_by(n.rows)
    wide, each = k.group.threads // slices, n.parts.divide_unsigned(slices)[0]
    own, lane = k.thread().divide_unsigned(wide) if slices > 1 else (Scalar.constant(0, "index"), k.thread())
    start = own * each

    def place(part: Scalar) -> Scalar:
        return (head * n.parts + part) * n.rows + row

    def highest(first: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
        top = carried[0]
        for found in [k.load(stats, place(first + i) * 2) for i in range(at_once)]:
            top = k.maximum(top, found)
        return [top]

    sink = sink_of_row(k, c, n, sink_type, 2, head, row) if sink_type else None
    (top,) = k.loop(start, start + each, at_once, [k.constant(LOWEST)], highest)
    for first in range(0, vectors, wide):
        column = (lane + first).minimum(vectors - 1)

        def add(first: Scalar, carried: list[ir.Value], column: Scalar = column) -> list[ir.Value]:
            whole, mixed = carried
            places = [place(first + i) for i in range(at_once)]
            tops, totals = ([k.load(stats, at * 2 + i) for at in places] for i in range(2))
            values = [k.load(sums, at * vectors + column) for at in places]
            for highest, total, value in zip(tops, totals, values, strict=True):
                factor = k.exp(k.sub(highest, top))
                whole, mixed = k.fma(total, factor, whole), k.fma(value, k.splat(factor, WIDTH), mixed)
            return [whole, mixed]

        whole, mixed = k.loop(start, start + each, at_once, [k.constant(0.0), k.constant(0.0, WIDTH)], add)
        found = [(top, whole, mixed)] if slices == 1 else _of_slices(k, slices, own, lane, (top, whole, mixed))
        most = found[0][0] if sink is None else sink
        for other, _, _ in found:
            most = k.maximum(most, other)
        total, result = k.constant(0.0) if sink is None else k.exp(k.sub(sink, most)), k.constant(0.0, WIDTH)
        for other, part, value in found:
            factor = k.exp(k.sub(other, most))
            total, result = k.fma(part, factor, total), k.fma(value, k.splat(factor, WIDTH), result)
        result = k.div(result, k.splat(k.maximum(total, k.constant(1e-30)), WIDTH))

        if gate is not None:
            factor = k.neg(gate.load(k, c, of_gate, dtype, (head, row), column))
            result = k.div(result, k.add(k.exp(factor), k.constant(1.0, WIDTH)))

        def write(result: ir.Value = result, column: Scalar = column) -> None:
            k.store(result, output, (head * n.rows + row) * vectors + column)

        if slices == 1:
            write()
        else:
            k.when(own.equals(0), write)


def _of_slices(
    k: Kernel, slices: int, own: Scalar, lane: Scalar, mine: tuple[ir.Value, ir.Value, ir.Value]
) -> list[tuple[ir.Value, ir.Value, ir.Value]]:
    """Maximum, sum and weighted values of every slice, for this thread's columns."""
    wide = k.group.threads // slices
    numbers, chunks = k.shared(2 * slices), k.shared_chunks(k.group.threads)
    top, whole, mixed = mine

    def put() -> None:
        k.store(top, numbers, own * 2)
        k.store(whole, numbers, own * 2 + 1)

    k.when(lane.equals(0), put)
    k.store_as_is(mixed, chunks, k.thread())
    k.barrier()
    return [
        (
            k.load(numbers, Scalar.constant(2 * one, "index")),
            k.load(numbers, Scalar.constant(2 * one + 1, "index")),
            k.load(chunks, lane + one * wide),
        )
        for one in range(slices)
    ]
