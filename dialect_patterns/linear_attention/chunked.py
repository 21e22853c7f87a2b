"""Strategy ``chunked``: chunks of C tokens as matrix products; only the state goes from chunk to chunk.

    D_ij = decay from after j to i (0 above the diagonal);  start_i, end_j: from and to the chunk's ends
    A  = strictly_lower(beta_i (k_i . k_j) D_ij);   T = (I + A)^-1            (linear, gated: no T)
    u  = T (beta v) - T (beta start k) S                                      (linear, gated: u = v)
    o  = scale * (start q S + ((q k^T) D) u)
    S <- total * S + (end k)^T u

Everything but the terms with S is done for all chunks at once, with M = chunks * B * Hkv as the batch:

    %kk, %qk = linalg.batch_matmul               %inv = blocks of 4 x 4, merged in pairs (triangular.py)
    %U, %W = linalg.batch_matmul %inv
    for each chunk %c, unrolled, or scf.for where T is open {
      %u   = %U[%c] + linalg.batch_matmul %W[%c], %S
      %out = linalg.batch_matmul %query[%c], %S + linalg.batch_matmul %qk[%c], %u
      %S   = %total[%c] * %S + linalg.batch_matmul %key_end[%c]^T, %u
    }

T that is no multiple of C is padded with zeros, under which no rule changes the state. Sums, decays, the inverse and
the carried state are f32; the state is rounded once a call.

NaN and inf reach the earlier tokens of their chunk (0 times NaN is NaN), never other rows or heads.

Legal: always. Cost per token and head in multiply-adds: 3 dk dv + C (3 dk + 2 dv) + C^2 / 3 (delta rules), so not fewer
than the recurrence's 4 dk dv, but S is read and written once a chunk instead of once a token.
Source: NUMERICS.md sections 1 to 4; Yang et al., Parallelizing Linear Transformers with the Delta Rule (2024).
"""

from __future__ import annotations

from iree.compiler import ir

from ..emit.builder import Builder, Size
from ..emit.scalar import Scalar
from ..op import LoweringContext
from ..select import Legality, Yes
from ..target import Target
from .chunk_scores import Scores, head_scores, key_scores, plain_scores
from .contract import LinearAttention
from .operands import Operands, present_state
from .triangular import inverse

_UNROLL = 128  # chunks


def is_legal(contract: LinearAttention, target: Target) -> Legality:
    """Always."""
    del contract, target
    return Yes()


def emit_linear_attention_chunked(
    context: LoweringContext, contract: LinearAttention, x: Operands, chunk: int
) -> list[ir.Value]:
    """Emit output and present state, with chunks of ``chunk`` tokens (a power of two, 4 or more)."""
    b, c = context.builder, contract
    count = b.maximum(b.floordiv(b.add(x.tokens, chunk - 1), chunk), 1)  # a chunk of padding changes nothing
    q = _emit_chunks(b, c, x.query, c.q_heads, c.dk, count, chunk, rows=c.rows)
    k, v = (
        b.collapse(_emit_chunks(b, c, value, heads, size, count, chunk), 1, 2)
        for value, heads, size in ((x.key, c.k_heads, c.dk), (x.value, c.kv_heads, c.dv))
    )
    scores = _emit_scores(b, c, x, q, k, count, chunk)
    n = b.mul(x.batch, c.kv_heads)
    beta = None
    if x.beta is not None:
        beta = _emit_chunks(b, c, x.beta, c.kv_heads if c.beta == "head" else 1, 1, count, chunk)
    parts = _emit_parts(b, scores, v, b.collapse(beta, 1, 3) if beta is not None else None)
    parts = {name: b.expand(part, 0, [count, n]) for name, part in parts.items()}
    output, state = _emit_scan(
        b, parts, None if x.state is None else b.cast(x.state, "f32"), count, [n, c.rows * chunk, c.dv]
    )
    output = b.expand(b.expand(output, 2, [c.rows, chunk]), 1, [x.batch, c.kv_heads])
    output = b.map("nbhrce->bnchre", lambda o: o * c.scale, output, dtype=c.dtype)
    output = b.collapse(b.collapse(output, 3, 5), 1, 2)
    output = b.slice(output, [0, 0, 0], [x.batch, x.tokens, c.out_heads * c.dv])
    return [output, present_state(b, c, x.batch, state)]


def _emit_chunks(
    b: Builder, c: LinearAttention, value: ir.Value, heads: int, size: int, count: Size, chunk: int, *, rows: int = 1
) -> ir.Value:
    """[B, T, heads * size] as [M, rows, C, size] in f32: ``rows`` heads a state, or else heads repeated per state."""
    value = b.pad_end(value, 1, b.mul(count, chunk))
    states = heads // rows
    value = b.expand(b.expand(value, 2, [states, rows, size]), 1, [count, chunk])
    repeat = c.kv_heads // states
    value = b.map("bnchrs->nbhgrcs", _widen, value, dtype="f32", sizes={"g": repeat})
    return b.collapse(value, 0, 3)  # n, b, h and g


def _widen(x: Scalar) -> Scalar:
    """``x`` in f32, in a loop that is not repeated in its readers.

    IREE copies loops that only convert to a wider type into every dispatch that reads the result. That would redo the
    transpose there, and its Vulkan code generation gets such producers wrong (3.13.0). ``math`` ops keep it from that.
    """
    return x if x.dtype == "f32" else x.to("f32").multiply_add(1.0, -0.0)


def _emit_scores(
    b: Builder, c: LinearAttention, x: Operands, q: ir.Value, k: ir.Value, count: Size, chunk: int
) -> Scores:
    if x.decay is None:
        return plain_scores(b, q, k, c.has_delta)
    size = c.dk if c.decay == "key" else 1
    g = _emit_chunks(b, c, x.decay, c.kv_heads, size, count, chunk)
    if c.decay == "key":
        return key_scores(b, q, k, b.collapse(g, 1, 2), c.has_delta)
    return head_scores(b, q, k, b.collapse(b.collapse(g, 2, 3), 1, 2), c.has_delta)


def _emit_parts(b: Builder, scores: Scores, v: ir.Value, beta: ir.Value | None) -> dict[str, ir.Value]:
    """What the scan needs of every chunk, each with M as the first dimension."""
    parts = {"query": b.collapse(scores.query, 1, 2), "qk": b.collapse(scores.qk, 1, 2)}
    if scores.total is not None:
        parts["total"] = scores.total
    if beta is None:
        return {**parts, "u": v, "added": b.contract("mcd,mce->mde", scores.key_end, v)}
    assert scores.kk is not None
    assert scores.key is not None
    inv = inverse(b, b.map("mij,mi->mij", lambda s, rate: s * rate, scores.kk, beta))
    rated = b.map("mje,mj->mje", lambda e, rate: e * rate, v, beta)
    keys = b.map("mjd,mj->mjd", lambda e, rate: e * -rate, scores.key, beta)
    return {
        **parts,
        "value": b.contract("mij,mje->mie", inv, rated),
        "key": b.contract("mij,mjd->mid", inv, keys),
        "key_end": scores.key_end,
    }


def _emit_scan(
    b: Builder, parts: dict[str, ir.Value], state: ir.Value | None, count: Size, shape: list[Size]
) -> tuple[ir.Value, ir.Value]:
    """From chunk to chunk: outputs [chunks, N, r * C, dv], not scaled, and the last state [N, dk, dv].

    Without a past state the first chunk has no products with it.
    """

    def chunk(index: Size, state: ir.Value | None, outputs: ir.Value) -> list[ir.Value]:
        part = {name: _chunk(b, value, index) for name, value in parts.items()}
        u = part.get("u")
        if u is None:
            u = part["value"]
            if state is not None:
                u = _plus(b, b.contract("ncd,nde->nce", part["key"], state), u)
        output = b.contract("nij,nje->nie", part["qk"], u)
        if state is not None:
            output = _plus(b, output, b.contract("nid,nde->nie", part["query"], state))
        outputs = b.insert(b.expand(output, 0, [1, shape[0]]), outputs, [index, 0, 0, 0])
        added = part["added"] if "added" in part else b.contract("ncd,nce->nde", part["key_end"], u)
        if state is None:
            return [added, outputs]
        if "total" not in part:
            return [_plus(b, added, state), outputs]
        letters = "n1" if b.dim(part["total"], 1) == 1 else "nd"
        state = b.map(f"nde,{letters},nde->nde", lambda d, f, s: d + f * s, added, part["total"], state)
        return [state, outputs]

    outputs = b.empty([count, *shape], "f32")
    carried = chunk(0, None, outputs) if state is None else [state, outputs]
    first = 1 if state is None else 0
    state, outputs = b.repeat(
        count, carried, lambda index, carried: chunk(index, *carried), first=first, unroll=_UNROLL
    )
    return outputs, state


def _plus(b: Builder, product: ir.Value, addend: ir.Value) -> ir.Value:
    """A matrix product plus a tensor; as a product's initial value the tensor would not compile for CUDA (3.13.0)."""
    return b.map("nij,nij->nij", lambda p, a: p + a, product, addend)


def _chunk(b: Builder, value: ir.Value, index: Size) -> ir.Value:
    """Chunk ``index`` of [chunks, N, ...], as [N, ...]."""
    sizes = b.shape(value)
    sizes[0] = 1
    return b.collapse(b.slice(value, [index, *[0] * (len(sizes) - 1)], sizes), 0, 1)
