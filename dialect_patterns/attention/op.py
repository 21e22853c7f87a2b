"""Attention (ai.onnx 23, 24 and 25): softmax attention with grouped heads, masks and a KV cache.

Query i stands at position ``offset + i``; ``offset`` is the past's length (the entry point's position in the capacity
form), ``nonpad_kv_seqlen[b] - T`` where that input is given, else 0. With ``is_causal`` it sees the keys up to there;
``attn_mask`` hides more (bool) or is added to the scores (float). A query that sees no key gives zeros.

Source: ONNX operator schemas Attention-23, -24 and -25 with the errata of ONNX 1.23, and ``onnx.reference``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from iree.compiler import ir

from ..checks import float_input, refuse_outputs, require_dtype, require_shape
from ..emit.builder import Builder, Size
from ..emit.scalar import Scalar
from ..node import Dim, Node, TensorSpec
from ..op import Choice, LoweringContext, LoweringOptions, Op
from ..target import Target
from . import core
from .checks import check_mask, known, past_and_capacity, refuse_attributes, refuse_inputs, total
from .strategies import choose as choose_strategy
from .strategies import emit_softmax_attention

_SUPPORTED = ["is_causal", "kv_num_heads", "q_num_heads", "scale", "softcap", "softmax_precision",
              "qk_matmul_output_mode"]  # fmt: skip
_SUPPORTED_25 = [*_SUPPORTED, "left_window_size", "right_window_size"]
_DOUBLE = 11  # TensorProto.DOUBLE


@dataclass(frozen=True)
class Attention:
    """Contract.

    Attributes:
        dtype: Element type of Q, K, past_key and the output.
        value_dtype: Element type of V and past_value.
        heads: Counts and sizes.
        length: T, queries of this call.
        new_keys: L, keys and values of this call.
        past: P (or the capacity M); 0 without a past.
        capacity: Whether the past is a buffer of fixed capacity that is written at the position.
        has_past: Whether past_key and past_value are given.
        flat: Whether Q, K, V and the output are [B, T, H*d] rather than [B, H, T, d].
        scale: Factor on q . k.
        softcap: c in c * tanh(s / c), 0 for none.
        left: How many keys before its own position a query sees, None for all.
        right: How many after it (0 with is_causal), None for all.
        masked: Whether there is an attn_mask.
        ragged: Whether there is a nonpad_kv_seqlen.
        num_outputs: How many outputs the node lists, 1 to 4.
        where: The node, as errors name it.
    """

    dtype: str
    value_dtype: str
    heads: core.Heads
    length: Dim
    new_keys: Dim
    past: Dim
    capacity: bool
    has_past: bool
    flat: bool
    scale: float
    softcap: float
    left: int | None
    right: int | None
    masked: bool
    ragged: bool
    num_outputs: int
    where: str

    @property
    def rows(self) -> Dim:
        """Rows of the keys: the capacity, or P + L."""
        return self.past if self.capacity else total(self.past, self.new_keys)

    @property
    def shape(self) -> core.AttentionShape:
        """What the strategy is chosen by."""
        # Queries after the last key would have the kernels that go by position read behind the keys.
        has_keys = self.length is not None and self.new_keys is not None and self.length <= self.new_keys
        causal = self.right == 0 and not self.ragged and has_keys
        return core.AttentionShape(
            self.heads, self.length, self.rows, self.masked, causal, self.dtype, self.value_dtype
        )


def _parse_heads(node: Node, q: TensorSpec, k: TensorSpec, v: TensorSpec) -> core.Heads:
    counts = node.attr("q_num_heads", 0), node.attr("kv_num_heads", 0)
    if q.rank == 3:
        if min(counts) <= 0:
            raise node.error("attributes 'q_num_heads' and 'kv_num_heads'", got=f"{counts[0]} and {counts[1]}",
                             expected="positive for inputs of 3 dimensions")  # fmt: skip
        dk, dk_of_key, dv = (
            None if x.shape[2] is None or x.shape[2] % count else x.shape[2] // count
            for x, count in ((q, counts[0]), (k, counts[1]), (v, counts[1]))
        )
    else:
        given, counts = counts, (q.shape[1] or 0, known(k.shape[1], v.shape[1]) or 0)
        if any(a not in (0, c) for a, c in zip(given, counts, strict=True)):
            raise node.error("attributes 'q_num_heads' and 'kv_num_heads'", got=given, expected=counts)
        dk, dk_of_key, dv = known(q.shape[3], k.shape[3]), known(k.shape[3], q.shape[3]), v.shape[3]
    if not counts[1] or not counts[0] or counts[0] % counts[1]:
        raise node.error("heads of Q and K", got=f"{counts[0]} and {counts[1]}",
                         expected="static, the first a multiple of the second")  # fmt: skip
    if dk is None or dv is None or dk != dk_of_key:
        raise node.error("head sizes of Q, K and V", got=f"{q}, {k}, {v}", expected="static, and equal for Q and K")
    return core.Heads(known(q.shape[0], k.shape[0], v.shape[0]), counts[0], counts[1], dk, dv)


def parse(node: Node) -> Attention:
    """Check the node; see the contract."""
    refuse_attributes(node, _SUPPORTED_25 if node.version >= 25 else _SUPPORTED, {})
    refuse_inputs(node, {6: "nonpad_kv_seqlen"} if node.version < 24 else {}, 7)
    refuse_outputs(node, (3, "qk_matmul_output"))
    q, k, v = (float_input(node, i, name) for i, name in enumerate("QKV"))
    for spec, name in ((q, "Q"), (k, "K"), (v, "V")):
        if spec.rank not in (3, 4) or spec.rank != q.rank:
            raise node.error(f"input '{name}'", got=spec, expected="3 or 4 dimensions, as many as the others")
    require_dtype(node, "K", k, q.dtype)
    if node.attr("softmax_precision", 1) == _DOUBLE:
        raise node.error("attribute 'softmax_precision'", got="double", expected="float or narrower",
                         hint="the softmax is computed in f32")  # fmt: skip
    heads = _parse_heads(node, q, k, v)
    tokens = q.rank - 2
    length, new_keys = q.shape[tokens], known(k.shape[tokens], v.shape[tokens])
    past_key, past_value, capacity = past_and_capacity(node, 4)
    nonpad = node.input(6)
    past: Dim = 0
    if past_key is not None and past_value is not None:
        past = known(past_key.shape[2], past_value.shape[2])
        heads = replace(heads, batch=known(heads.batch, past_key.shape[0], past_value.shape[0]))
        for spec, name, size, dtype in (
            (past_key, "past_key", heads.dk, q.dtype),
            (past_value, "past_value", heads.dv, v.dtype),
        ):
            require_shape(node, name, spec, (heads.batch, heads.kv, past, size))
            require_dtype(node, name, spec, dtype)
        if nonpad is not None:
            raise node.error("input 'nonpad_kv_seqlen'", got=nonpad, expected="left out where there is a past")
    if nonpad is not None:
        require_shape(node, "nonpad_kv_seqlen", nonpad, (heads.batch,))
        require_dtype(node, "nonpad_kv_seqlen", nonpad, "i64")
    mask = node.input(3)
    check_mask(node, mask, "attn_mask", (heads.batch, heads.q, length, total(past, new_keys)))
    if mask is not None:
        require_dtype(node, "attn_mask", mask, "i1", q.dtype)
    left, right = node.attr("left_window_size", -1), node.attr("right_window_size", -1)
    if node.attr("is_causal", 0):
        right = 0
    return Attention(
        dtype=q.dtype,
        value_dtype=v.dtype,
        heads=heads,
        length=length,
        new_keys=new_keys,
        past=past,
        capacity=capacity,
        has_past=past_key is not None,
        flat=q.rank == 3,
        scale=node.attr("scale", 1.0 / math.sqrt(heads.dk)),
        softcap=node.attr("softcap", 0.0),
        left=left if left >= 0 else None,
        right=right if right >= 0 else None,
        masked=mask is not None,
        ragged=nonpad is not None,
        num_outputs=node.num_outputs,
        where=node.where,
    )


def output_types(contract: Attention) -> Sequence[TensorSpec | None]:
    """The outputs' types: Y, present_key, present_value, and no qk_matmul_output."""
    heads, length = contract.heads, contract.length
    rows = contract.rows
    shape = (heads.batch, length, heads.q * heads.dv) if contract.flat else (heads.batch, heads.q, length, heads.dv)
    outputs = [
        TensorSpec(shape, contract.dtype),
        TensorSpec((heads.batch, heads.kv, rows, heads.dk), contract.dtype),
        TensorSpec((heads.batch, heads.kv, rows, heads.dv), contract.value_dtype),
        None,
    ]
    return outputs[: contract.num_outputs]


def _by_head(b: Builder, contract: Attention, x: ir.Value, tokens: Dim, heads: int, size: int) -> ir.Value:
    """Q, K or V as [B, H, T, d]."""
    batch = contract.heads.batch
    if contract.flat:
        return core.split_heads(b, core.refined(b, x, batch, tokens, heads * size), heads)
    return core.refined(b, x, batch, heads, tokens, size)


def lower(context: LoweringContext, contract: Attention, operands: Sequence[ir.Value | None]) -> list[ir.Value | None]:
    """Extend or write the cache, then attend over it."""
    b, heads = context.builder, contract.heads
    inputs = [*operands, *[None] * (7 - len(operands))]
    query, key, value, mask, past_key, past_value, nonpad = inputs
    assert query is not None
    assert key is not None
    assert value is not None
    tokens_axis = 1 if contract.flat else 2
    query = core.refined(b, query, *_query_dims(contract))
    k = _by_head(b, contract, key, contract.new_keys, heads.kv, heads.dk)
    v = _by_head(b, contract, value, contract.new_keys, heads.kv, heads.dv)
    length, new_keys = b.dim(query, tokens_axis), b.dim(k, 2)
    first: Size = 0
    limit: Size | None = None
    written: tuple[Size, Size] | None = None
    if past_key is not None and past_value is not None:
        past_key = core.refined(b, past_key, heads.batch, heads.kv, contract.past, heads.dk)
        past_value = core.refined(b, past_value, heads.batch, heads.kv, contract.past, heads.dv)
        if contract.capacity:
            assert context.position is not None, "a cache of fixed capacity needs the entry point's position"
            first = core.bounded(b, context.position, b.dim(past_key, 2), new_keys)
            limit = b.add(first, new_keys)
            written = (first, new_keys)
            k, v = core.write_at(b, past_key, k, first), core.write_at(b, past_value, v, first)
        elif contract.past != 0:
            first = b.dim(past_key, 2)
            k, v = b.concat([past_key, k], 2), b.concat([past_value, v], 2)
    elif nonpad is not None:
        limit = nonpad
        tokens = Scalar(b.index(length)).to("i32")
        first = b.map("b->b", lambda n: n.to("i32") - tokens, nonpad, dtype="i32")
    if mask is not None:
        mask = core.align_mask(b, mask, [b.dim(query, 0), heads.q, length, b.dim(k, 2)], written)
    visibility = core.Visibility(first, limit, contract.left, contract.right)
    y = emit_softmax_attention(
        context, contract.shape, contract.where, query, k, v,
        scale=contract.scale, softcap=contract.softcap, visibility=visibility, mask=mask, flat=contract.flat,
    )  # fmt: skip
    return [y, k, v, None][: contract.num_outputs]


def _query_dims(contract: Attention) -> tuple[Dim, ...]:
    heads = contract.heads
    if contract.flat:
        return heads.batch, contract.length, heads.q * heads.dk
    return heads.batch, heads.q, contract.length, heads.dk


def choose(contract: Attention, target: Target, options: LoweringOptions) -> Choice:
    """The strategy for a node; what is forced for the state operators says nothing here."""
    del options
    return choose_strategy(contract.shape, contract.where, target)


OPS = (Op("", "Attention", 23, parse, output_types, lower, choose),)
