"""ChosenExperts: a node that the frontend makes where a model computes every expert and masks (``masked_experts``).

    linattn.ChosenExperts(x [..., H], chosen i64 [..., k], weights [..., k], fc1, fc2, fc3) -> [..., H]

As MoE and QMoE, but the model's own router has chosen: a number that is no expert counts nothing, and weights are as
they are. Each layer is three inputs: weights [E, N, K] or packed, scales [E, N, blocks] and zero points [E, N, bytes].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from iree.compiler import ir

from ..checks import float_input, require_dtype, require_shape
from ..emit.builder import Builder, spec_of
from ..emit.scalar import Scalar
from ..node import FLOATS, Node
from .contract import Activation, Experts, Matrix

CHOSEN_EXPERTS = "ChosenExperts"
FIRST = {"fc1": 3, "fc2": 6, "fc3": 9}
"""The number of each layer's first input."""


def parse(node: Node) -> Experts:
    """View the node."""
    x, chosen, weights = float_input(node, 0, "x"), node.required(1, "chosen"), node.required(2, "weights")
    require_dtype(node, "chosen", chosen, "i64", "i32")
    require_dtype(node, "weights", weights, *FLOATS)
    hidden, k = x.shape[-1] or 0, chosen.shape[-1] or 0
    require_shape(node, "chosen", chosen, (*x.shape[:-1], k))
    require_shape(node, "weights", weights, (*x.shape[:-1], k))
    bits, block = node.attr("bits", 0), node.attr("block_size", 0)

    def matrix(name: str, depth: int) -> Matrix:
        first = FIRST[name]
        stored = node.required(first, name)
        zeros = first + 2 if node.input(first + 2) is not None else None
        scales = first + 1 if bits else None
        columns = stored.shape[1] or 0
        return Matrix(name, columns, depth, x.dtype, bits, block or depth, first, scales, zeros, None)

    fc1 = matrix("fc1", hidden)
    fc2 = matrix("fc2", fc1.columns)
    fc3 = matrix("fc3", hidden) if node.input(FIRST["fc3"]) is not None else None
    ends = [port for m in (fc1, fc2, fc3) if m for port in (m.weights, m.scales, m.zeros) if port is not None]
    return Experts(
        where=node.where,
        x=x,
        count=node.required(FIRST["fc1"], "fc1").shape[0] or 0,
        chosen=k,
        inner=fc1.columns,
        normalise=False,
        router_weights=None,
        activation=Activation(node.attr("activation_type", "silu"), 1.0, 0.0, math.inf, False),
        layout="plain" if fc3 is None else "separate",
        fc1=fc1,
        fc2=fc2,
        fc3=fc3,
        constant=node.weights.issuperset(ends),
        given=True,
    )


def given_choice(b: Builder, c: Experts, operands: Sequence[ir.Value | None]) -> tuple[ir.Value, ir.Value]:
    """The experts i32 and their weights f32, both [T, k]."""
    chosen, weights = operands[1:3]
    assert chosen is not None
    assert weights is not None
    rank = spec_of(chosen).rank
    if rank > 2:
        chosen, weights = b.collapse(chosen, 0, rank - 2), b.collapse(weights, 0, rank - 2)
    dtype = spec_of(chosen).dtype

    def expert(number: Scalar) -> Scalar:
        return number.maximum(0).minimum(c.count - 1)

    def weight(number: Scalar, value: Scalar) -> Scalar:
        valid = (number >= Scalar.constant(0, dtype)) & (number < Scalar.constant(c.count, dtype))
        return valid.select(value.to("f32"), Scalar.constant(0.0, "f32"))

    experts = b.map("tk->tk", expert, chosen, dtype="i32")
    return experts, b.map("tk,tk->tk", weight, chosen, weights, dtype="f32")
