"""Strategy ``recurrent``: the operator's own definition, one token after the other.

    S <- a * S                       a = exp(g), per head or per row of S; linear, delta: a = 1
    u  = beta * (v - k S)            linear, gated: u = v
    S <- S + k^T u
    o  = scale * q S

Both products read the state of before the token, o = scale * (q a S + (q . k) u), so that the new state is an
elementwise loop with no reader in the same token. For T = 1 there is no loop:

    %held = linalg.generic %k, %S          : 1 x dk, dk x dv
    %read = linalg.generic %q, %S          : r x dk, dk x dv          (the r query heads of a state are the rows)
    %u    = linalg.generic %beta, %v, %held, %a
    %out  = linalg.generic %read, %a, %qk, %u
    %S2   = linalg.generic %S, %a, %k, %u                             (a * S + k^T u)

else the same is the body of an ``scf.for`` over tokens that carries S in f32.

Legal: always. Cost per token and head: 4 dk dv multiply-adds (gated_delta); S is read three times and written once.
Source: ONNX schema LinearAttention-27.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from iree.compiler import ir

from ..emit.builder import Builder, ElementFunction, Size
from ..emit.scalar import Scalar
from ..op import LoweringContext
from ..select import Legality, Yes
from ..target import Target
from .contract import LinearAttention
from .operands import Operands, present_state, state_or_zeros


def is_legal(contract: LinearAttention, target: Target) -> Legality:
    """Always."""
    del contract, target
    return Yes()


def emit_linear_attention_recurrent(context: LoweringContext, contract: LinearAttention, x: Operands) -> list[ir.Value]:
    """Emit output and present state."""
    b = context.builder
    if isinstance(x.tokens, int) and x.tokens == 1:
        output, state = _emit_token(b, contract, x, 0, x.state)
        return [output, present_state(b, contract, x.batch, state)]

    output = b.empty([x.batch, x.tokens, contract.out_heads * contract.dv], contract.dtype)

    def step(t: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        state, output = carried
        row, state = _emit_token(b, contract, x, t, state)
        return [state, b.insert(row, output, [0, t, 0])]

    state, output = b.for_loop(x.tokens, [state_or_zeros(b, contract, x), output], step)
    return [output, present_state(b, contract, x.batch, state)]


def _emit_token(
    b: Builder, contract: LinearAttention, x: Operands, t: Size, state: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """One token: its output row [B, 1, W] in the contract's type and the next state; ``state`` None for zeros."""
    c = contract
    n = b.mul(x.batch, c.kv_heads)
    k = _emit_heads(b, x, x.key, t, c.k_heads, c.dk, c.kv_heads)
    v = _emit_heads(b, x, x.value, t, c.kv_heads, c.dv, c.kv_heads)
    q = b.expand(_emit_heads(b, x, x.query, t, c.q_heads, c.dk, c.out_heads), 0, [n, c.rows])
    decay = None
    row = "nd" if c.decay == "key" else "n1"  # letters of the decay's dimensions
    if x.decay is not None:
        decay = _emit_heads(b, x, x.decay, t, c.kv_heads, c.dk if c.decay == "key" else 1, c.kv_heads)
        decay = b.map("nd->nd", lambda g: g.to("f32").exp(), decay, dtype="f32")
    u = v
    if x.beta is not None:
        beta = _emit_heads(b, x, x.beta, t, c.kv_heads if c.beta == "head" else 1, 1, c.kv_heads)
        if state is None:
            u = b.map("nv,n1->nv", _f32(lambda value, rate: rate * value), v, beta, dtype="f32")
        else:
            held = b.collapse(_emit_read(b, c, b.unsqueeze(k, 1), decay, state), 1, 2)
            u = b.map("nv,nv,n1->nv", _f32(lambda value, old, rate: rate * (value - old)), v, held, beta, dtype="f32")
    overlap = b.reduce("nmd,nd->nm", _f32(lambda acc, e, p: acc + e * p), q, k, initial=0.0)
    if state is None:
        output = b.map("nm,nv->nmv", _f32(lambda e, w: (e * w) * c.scale), overlap, u, dtype=c.dtype)
        state = b.map("nd,nv->ndv", _f32(lambda p, w: p * w), k, u, dtype="f32")
        return b.collapse(b.expand(output, 0, [x.batch, 1, c.kv_heads]), 2, 4), state
    read = _emit_read(b, c, q, decay, state)
    output = b.map("nmv,nm,nv->nmv", _f32(lambda o, e, w: (o + e * w) * c.scale), read, overlap, u, dtype=c.dtype)
    if decay is None:
        state = b.map("ndv,nd,nv->ndv", _f32(lambda s, p, w: s + p * w), state, k, u, dtype="f32")
    else:
        update = _f32(lambda s, a, p, w: s * a + p * w)
        state = b.map(f"ndv,{row},nd,nv->ndv", update, state, decay, k, u, dtype="f32")
    return b.collapse(b.expand(output, 0, [x.batch, 1, c.kv_heads]), 2, 4), state


def _f32(fn: ElementFunction) -> Callable[..., Scalar]:
    """The function ``fn`` on elements converted to f32.

    Conversions stay inside the loops that need them: a conversion of a whole tensor in front of a reduction becomes a
    producer in the same dispatch, which IREE 3.13's Vulkan code generation gets wrong (threads race on its buffer).
    """
    function = cast(Callable[..., Scalar], fn)

    def body(*elements: Scalar) -> Scalar:
        return function(*(e.to("f32") for e in elements))

    return body


def _emit_read(b: Builder, c: LinearAttention, rows: ir.Value, decay: ir.Value | None, state: ir.Value) -> ir.Value:
    """Rows [N, m, dk] times the decayed state, [N, m, dv]; the decayed state itself is never stored."""
    if decay is None:
        return b.reduce("nmd,ndv->nmv", _f32(lambda acc, e, s: acc + e * s), rows, state, initial=0.0)
    if c.decay == "key":
        weigh = _f32(lambda acc, e, a, s: acc + (e * a) * s)
        return b.reduce("nmd,nd,ndv->nmv", weigh, rows, decay, state, initial=0.0)
    read = b.reduce("nmd,ndv->nmv", _f32(lambda acc, e, s: acc + e * s), rows, state, initial=0.0)
    return b.map("nmv,n1->nmv", lambda e, a: e * a, read, decay)


def _emit_heads(b: Builder, x: Operands, value: ir.Value, t: Size, heads: int, size: int, count: int) -> ir.Value:
    """Token ``t`` of [B, T, heads * size] as [B * count, size], each head repeated count / heads times."""
    row = b.slice(value, [0, t, 0], [x.batch, 1, heads * size])
    row = b.collapse(b.expand(row, 2, [heads, size]), 0, 1)
    if count != heads:
        row = b.collapse(b.map("bhd->bhgd", lambda e: e, row, sizes={"g": count // heads}), 1, 2)
    return b.collapse(row, 0, 1)
