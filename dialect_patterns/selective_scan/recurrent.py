"""Strategy ``recurrent``: the operator's own definition, one token after the other, as linalg.

    %state  = linalg.generic %past, %step, %rate, %value, %key       exp(step * rate) * S + value * key
    %output = linalg.generic %query, %state                          sum_n query * S

For T = 1 without a loop, else as the body of an ``scf.for`` over tokens. Legal: always, any T, also 0. Cost per token:
D * N exponentials, 4 D N multiply-adds; the state is read twice and written once.
"""

from __future__ import annotations

from iree.compiler import ir

from ..emit.builder import Builder, Size
from ..emit.scalar import Scalar
from ..op import LoweringContext
from .contract import SelectiveScan


def emit_selective_scan_recurrent(
    context: LoweringContext, contract: SelectiveScan, inputs: list[ir.Value], past: ir.Value | None
) -> list[ir.Value]:
    """Emit output and present state.

    Args:
        context: Builder and target.
        contract: What to compute.
        inputs: Value, step, rate, key and query.
        past: The past state, None where the node has none.
    """
    b, value = context.builder, inputs[0]
    batch, tokens = b.dim(value, 0), b.dim(value, 1)
    if isinstance(tokens, int) and tokens == 1:
        output, state = _emit_token(b, contract, inputs, 0, past)
        return [b.unsqueeze(output, 1), state]
    start = past if past is not None else b.full(0.0, [batch, contract.channels, contract.states], "f32")

    def step(t: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        row, state = _emit_token(b, contract, inputs, t, carried[0])
        return [state, b.insert(b.unsqueeze(row, 1), carried[1], [0, t, 0])]

    state, output = b.for_loop(tokens, [start, b.empty([batch, tokens, contract.channels], "f32")], step)
    return [output, state]


def _emit_token(
    b: Builder, c: SelectiveScan, inputs: list[ir.Value], t: Size, state: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """Output [B, D] of a token, and the state after it; ``state`` None for zeros."""
    value, step, rate, key, query = inputs
    batch = b.dim(value, 0)

    def row(tensor: ir.Value, size: int) -> ir.Value:
        return b.collapse(b.slice(tensor, [0, t, 0], [batch, 1, size]), 0, 1)

    u, k = row(value, c.channels), row(key, c.states)
    if state is None:
        state = b.map("bd,bn->bdn", lambda v, w: v * w, u, k)
    else:

        def update(s: Scalar, d: Scalar, a: Scalar, v: Scalar, w: Scalar) -> Scalar:
            return s * (d * a).exp() + v * w

        state = b.map("bdn,bd,dn,bd,bn->bdn", update, state, row(step, c.channels), rate, u, k)
    output = b.reduce("bdn,bn->bd", lambda acc, s, q: acc + s * q, state, row(query, c.states), initial=0.0)
    return output, state
