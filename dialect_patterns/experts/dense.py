"""Strategy ``dense``: every expert is computed for every token, and those that were not chosen count nothing.

    w [T, E] = softmax of the router where fewer than k experts are liked better, else 0
    h [E, T, I] = act(x W1_e^T + b1_e, ...)      y [T, H] = sum over e of w_e (h_e W2_e^T + b2_e)

Portable linalg, also for weights that the model computes, and what the kernels are tested against. Legal: everywhere.
Cost: all experts' weights, and E / k times the products that are needed.
"""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir

from ..emit.builder import Builder, spec_of
from ..emit.scalar import Scalar
from ..op import LoweringContext
from .activation import activate
from .contract import Experts, Matrix
from .given import given_choice


def emit_experts_dense(
    context: LoweringContext, contract: Experts, rows: ir.Value, operands: Sequence[ir.Value | None]
) -> ir.Value:
    """Emit the node: [T, H] of x's rows [T, H]."""
    b, c = context.builder, contract
    router = operands[1]
    assert router is not None
    rows = b.cast(rows, "f32")
    weights = (
        _given(b, c, operands)
        if c.given
        else _weights(b, c, router, operands[c.router_weights] if c.router_weights is not None else None)
    )
    gate, factor = _first(b, c, rows, operands)

    def act(g: Scalar, f: Scalar | None = None) -> Scalar:
        return activate(c.activation, g, f)

    hidden = b.map("etn,etn->etn", act, gate, factor) if factor is not None else b.map("etn->etn", act, gate)
    y = _layer(b, c.fc2, hidden, operands)
    # Experts that were not chosen count nothing, whatever they came to.
    y = b.reduce(
        "etn,te->tn",
        lambda total, value, w: total + (w > 0.0).select(value * w, Scalar.constant(0.0, "f32")),
        y,
        weights,
        initial=0.0,
    )
    return b.cast(y, c.x.dtype)


def _given(b: Builder, c: Experts, operands: Sequence[ir.Value | None]) -> ir.Value:
    """[T, E]: what each expert counts, where the model has chosen."""
    experts, weights = given_choice(b, c, operands)
    places = b.map("e->e", lambda _: b.loop_index(0).to("i32"), b.empty([c.count], "i32"), dtype="i32")

    def add(total: Scalar, expert: Scalar, weight: Scalar, place: Scalar) -> Scalar:
        return total + expert.equals(place).select(weight, Scalar.constant(0.0, "f32"))

    return b.reduce("tk,tk,e->te", add, experts, weights, places, initial=0.0)


def _weights(b: Builder, c: Experts, router: ir.Value, given: ir.Value | None) -> ir.Value:
    """[T, E]: what each expert counts."""
    logits = b.cast(router, "f32")
    most = b.reduce("te->t", lambda acc, v: acc.maximum(v), logits, initial=float("-inf"))
    powers = b.map("te,t->te", lambda v, m: (v - m).exp(), logits, most)
    p = b.map("te,t->te", lambda v, total: v / total, powers, b.sum("te->t", powers))

    def before(count: Scalar, mine: Scalar, other: Scalar, mine_at: Scalar, other_at: Scalar) -> Scalar:
        first = (other > mine) | (other.equals(mine) & (other_at > mine_at))
        return count + first.to("i32")

    places = b.map("e->e", lambda _: b.loop_index(0).to("i32"), b.empty([c.count], "i32"), dtype="i32")
    rank = b.reduce("te,tf,e,f->te", before, p, p, places, places, initial=0, dtype="i32")
    zero = Scalar.constant(0.0, "f32")
    source = p if given is None else b.cast(given, "f32")
    chosen = b.map("te,te->te", lambda v, r: (r < c.chosen).select(v, zero), source, rank)
    if not c.normalise:
        return chosen
    return b.map("te,t->te", lambda v, total: v / total, chosen, b.sum("te->t", chosen))


def _first(
    b: Builder, c: Experts, rows: ir.Value, operands: Sequence[ir.Value | None]
) -> tuple[ir.Value, ir.Value | None]:
    """[E, T, I]: gate and factor."""
    tokens = b.dim(rows, 0)
    given = b.map("tk->etk", lambda v: v, rows, sizes={"e": c.count})
    hidden = _layer(b, c.fc1, given, operands)
    if c.fc3 is not None:
        return hidden, _layer(b, c.fc3, given, operands)
    if c.layout == "plain":
        return hidden, None
    if c.layout == "halves":
        size = [c.count, tokens, c.inner]
        return b.slice(hidden, [0, 0, 0], size), b.slice(hidden, [0, 0, c.inner], size)
    pairs = b.expand(hidden, 2, [c.inner, 2])
    size = [c.count, tokens, c.inner, 1]
    parts = [b.collapse(b.slice(pairs, [0, 0, 0, i], size), 2, 3) for i in (0, 1)]
    return parts[0], parts[1]


def _layer(b: Builder, matrix: Matrix, rows: ir.Value, operands: Sequence[ir.Value | None]) -> ir.Value:
    """[E, T, N] = rows [E, T, K] by each expert's weights, and its bias."""
    weights = operands[matrix.weights]
    assert weights is not None
    weights = _dequantised(b, matrix, weights, operands) if matrix.bits else b.cast(weights, "f32")
    y = b.contract("bmk,bnk->bmn", rows, weights)
    bias = operands[matrix.bias] if matrix.bias is not None else None
    return y if bias is None else b.map("etn,en->etn", lambda v, w: v + w.to("f32"), y, bias)


def _dequantised(b: Builder, m: Matrix, packed: ir.Value, operands: Sequence[ir.Value | None]) -> ir.Value:
    """[E, N, K] in f32."""
    scales = operands[m.scales] if m.scales is not None else None
    zeros = operands[m.zeros] if m.zeros is not None else None
    assert scales is not None
    count, per_byte, mask = b.dim(packed, 0), 8 // m.bits, (1 << m.bits) - 1
    if spec_of(scales).rank == 2:
        scales = b.unsqueeze(scales, 2)
    shared = zeros is not None and spec_of(zeros).rank == 2  # bytes of several columns

    def field(source: ir.Value, row: Sequence[Scalar], place: Scalar) -> Scalar:
        byte = b.load(source, *row, (place // per_byte).to("index")).to("i32", unsigned=True)
        return Scalar(_shift(byte, (place % per_byte).to("i32") * m.bits)) & mask

    def weight(scale: Scalar) -> Scalar:
        e, n, block, inside = (b.loop_index(axis) for axis in range(4))
        q = field(packed, [e, n], block * m.block_size + inside).to("f32")
        if zeros is None:
            return (q - float(1 << (m.bits - 1))) * scale.to("f32")
        zero = field(zeros, [e], n) if shared else field(zeros, [e, n], block)
        return (q - zero.to("f32")) * scale.to("f32")

    whole = b.map("enb->enbk", weight, scales, dtype="f32", sizes={"e": count, "k": m.block_size})
    return b.collapse(whole, 2, 3)


def _shift(value: Scalar, bits: Scalar) -> ir.Value:
    return value.shift_right(bits).value
