"""The second kernel of attention on GPUs: the outputs from what several workgroups found for parts of the keys."""

from __future__ import annotations

from iree.compiler import ir

from ..emit.builder import Builder, spec_of, tensor_type
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Group, Kernel, dispatch
from ..node import TensorSpec
from ..target import Target
from .simt_call import WIDTH, Call, Sizes

_AT_ONCE = 8
"""Parts whose loads are under way: one after the other 16 took 4.5 us on an H100, and a cache of 4096 rows has 64."""

LOWEST = -3.4028234663852886e38
"""The lowest finite f32: no score is lower but -inf, and exp(-inf - it) is 0."""


def sink_of_row(k: Kernel, c: Call, n: Sizes, dtype: str, binding: int, head: Scalar, row: Scalar) -> ir.Value:
    """The sink of a row of a key head (its query heads and their tokens), read from ``binding``."""
    sinks = k.buffer(binding, dtype, Scalar.constant(c.kv_heads * c.group, "index"))
    key_head = head.divide_unsigned(c.kv_heads)[1]
    return k.widen(sinks, k.load(sinks, key_head * c.group + n.member(row)[0]))


def emit_join(
    b: Builder, target: Target, c: Call, parts: int, found: list[ir.Value], sink: ir.Value | None, result: TensorSpec
) -> ir.Value:
    """The outputs from their parts.

    Args:
        b: The builder.
        target: To compile for.
        c: What is computed.
        parts: P.
        found: Maxima and sums [B * Hkv, P, R, 2] and weighted values [B * Hkv, P, R, dv], f32.
        sink: What the softmax of each query head sees beside its keys [Hq], or None.
        result: Type of the outputs [B, Hq, T, dv].
    """
    heads, wide = c.batch * c.kv_heads, min(target.max_threads, c.dv // WIDTH)
    sink_type = "" if sink is None else spec_of(sink).dtype
    lead = f"{result.dtype}_sink{sink_type}_{c.group}x{c.kv_heads}" if sink_type else result.dtype
    at_once = max(count for count in range(1, _AT_ONCE + 1) if parts % count == 0)
    name = f"attention_fused_simt_join_{lead}_h{heads}_by{at_once}_d{c.dv}"
    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [(tensor_type(result.shape, result.dtype), [])]

    numbers = [b.index(size) for size in (c.tokens, c.rows, parts)]

    def body(kernel: Kernel) -> None:
        _emit_join(kernel, c, Sizes(*(kernel.number(i) for i in range(3))), at_once, sink_type, result.dtype)

    inputs = found if sink is None else [*found, sink]
    return dispatch(name, Group(wide, 0), 1, b.index(heads * c.rows), numbers, inputs, outputs, body)[0]


def _emit_join(k: Kernel, c: Call, n: Sizes, at_once: int, sink_type: str, dtype: str) -> None:
    """Join the parts of one row, so many at once."""
    heads, vectors = c.batch * c.kv_heads, c.dv // WIDTH
    rows = n.parts * n.rows * heads
    stats, sums = k.buffer(0, "f32", rows * 2), k.buffer(1, "f32", rows * vectors, WIDTH)
    output = k.buffer(3 if sink_type else 2, dtype, n.rows * (heads * vectors), WIDTH)
    head, row = k.item_by(n.rows)

    def place(part: Scalar) -> Scalar:
        return (head * n.parts + part) * n.rows + row

    start = Scalar.constant(0, "index")

    def highest(first: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
        top = carried[0]
        for found in [k.load(stats, place(first + i) * 2) for i in range(at_once)]:
            top = k.maximum(top, found)
        return [top]

    sink = sink_of_row(k, c, n, sink_type, 2, head, row) if sink_type else None
    (top,) = k.loop(start, n.parts, at_once, [k.constant(LOWEST) if sink is None else sink], highest)
    own_sum = k.constant(0.0) if sink is None else k.exp(k.sub(sink, top))
    for first in range(0, vectors, k.group.threads):
        column = (k.thread() + first).minimum(vectors - 1)

        def add(first: Scalar, carried: list[ir.Value], column: Scalar = column) -> list[ir.Value]:
            whole, mixed = carried
            places = [place(first + i) for i in range(at_once)]
            tops, totals = ([k.load(stats, at * 2 + i) for at in places] for i in range(2))
            values = [k.load(sums, at * vectors + column) for at in places]
            for highest, total, value in zip(tops, totals, values, strict=True):
                own = k.exp(k.sub(highest, top))
                whole, mixed = k.fma(total, own, whole), k.fma(value, k.splat(own, WIDTH), mixed)
            return [whole, mixed]

        whole, mixed = k.loop(start, n.parts, at_once, [own_sum, k.constant(0.0, WIDTH)], add)
        result = k.div(mixed, k.splat(k.maximum(whole, k.constant(1e-30)), WIDTH))
        k.store(result, output, (head * n.rows + row) * vectors + column)
