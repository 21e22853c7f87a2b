"""GroupQueryAttention (com.microsoft 1): causal attention with grouped heads and a KV cache.

Query i of batch row b stands at ``past_len[b] + i`` with ``past_len[b] = max(seqlens_k[b] + 1 - T, 0)`` and sees the
keys up to there. With q_norm_weight and k_norm_weight every head is RMS-normalised before it is rotated. With head_sink
the softmax of a head sees one more score, whose value is zero; with smooth_softmax that score is 0. The new keys and
values are written at ``past_len[b]``: into [B, Hkv, P+T, d] in the ONNX form, at the entry point's position into the
past's own buffer [B, Hkv, M, d] in the capacity form. There ``sliding_window_cache``, a smaller buffer for the same
outputs, changes nothing: the whole sequence is kept, the window read.

Source: onnxruntime ContribOperators.md, com.microsoft.GroupQueryAttention (ONNX Runtime 1.32).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir
from linattn.runtime.errors import UnsupportedModelError

from ..checks import float_input, refuse_outputs, require_dtype, require_shape
from ..emit.builder import Builder, Size, spec_of
from ..emit.scalar import Scalar
from ..node import Dim, Node, TensorSpec
from ..op import MICROSOFT, Choice, LoweringContext, LoweringOptions, Op
from ..rotary.rotary_embedding import parse_caches
from ..target import Target
from . import core
from .checks import check_mask, known, past_and_capacity, refuse_attributes, refuse_inputs, total
from .query_heads import Rotary, normed, rotated, split_packed
from .strategies import choose as choose_strategy
from .strategies import emit_softmax_attention

_SUPPORTED = ("num_heads", "kv_num_heads", "scale", "softcap", "local_window_size", "do_rotary", "rotary_interleaved",
              "rotary_embedding_dim", "smooth_softmax", "qk_norm_epsilon", "q_norm_epsilon", "k_norm_epsilon",
              "kv_cache_bit_width", "sliding_window_cache")  # fmt: skip
_NEUTRAL = {"qk_output": 0, "causal": 1, "k_quant_type": "NONE", "v_quant_type": "NONE"}
_REFUSED = {12: "k_scale", 13: "v_scale", 16: "query_seqlens"}
_NORM_WEIGHTS = {14: "q_norm_weight", 15: "k_norm_weight"}


@dataclass(frozen=True)
class GroupQueryAttention:
    """Contract.

    Attributes:
        dtype: Element type of query, keys, values and caches.
        heads: Counts and sizes.
        length: T, tokens of this call.
        past: P (or the capacity M); 0 without a past.
        capacity: Whether the past is a buffer of fixed capacity that is written at the position.
        packed: Whether the query holds keys and values too: [B, T, (Hq + 2 Hkv) * d].
        has_past: Whether past_key and past_value are given.
        scale: Factor on q . k.
        softcap: c in c * tanh(s / c), 0 for none.
        window: How many keys before its own position a query sees (local_window_size - 1), None for all.
        window_sized: Whether the ONNX form's past is a buffer for the window alone.
        rotation: How the op rotates queries and keys itself, None if they come rotated.
        norm_epsilons: Of the norm of each head of queries and of keys; None without their weights.
        sinks: Whether the softmax of each query head sees something beside its keys: the scores of head_sink, or 0.
        masked: Whether there is an attention_bias.
        num_outputs: How many outputs the node lists, 1 to 4.
        where: The node, as errors name it.
    """

    dtype: str
    heads: core.Heads
    length: Dim
    past: Dim
    capacity: bool
    packed: bool
    has_past: bool
    scale: float
    softcap: float
    window: int | None
    window_sized: bool
    rotation: Rotary | None
    norm_epsilons: tuple[float, float] | None
    sinks: bool
    masked: bool
    num_outputs: int
    where: str

    @property
    def rows(self) -> Dim:
        """Rows of the keys: the capacity, or P + T."""
        return self.past if self.capacity else total(self.past, self.length)

    @property
    def has_lengths(self) -> bool:
        """Whether the rows of the batch may stand at different positions."""
        return not self.capacity and self.has_past and self.past != 0

    @property
    def shape(self) -> core.AttentionShape:
        """What the strategy is chosen by."""
        return core.AttentionShape(self.heads, self.length, self.rows, self.masked, not self.has_lengths, self.dtype)


def parse(node: Node) -> GroupQueryAttention:
    """Check the node; see the contract."""
    refuse_attributes(node, _SUPPORTED, _NEUTRAL)
    refuse_inputs(node, _REFUSED, 17)
    refuse_outputs(node, (3, "output_qk"))
    query = float_input(node, 0, "query")
    q_heads, kv_heads = node.attr("num_heads", 0), node.attr("kv_num_heads", 0)
    if kv_heads <= 0 or q_heads <= 0 or q_heads % kv_heads:
        raise node.error("attributes 'num_heads' and 'kv_num_heads'", got=f"{q_heads} and {kv_heads}",
                         expected="positive, the first a multiple of the second")  # fmt: skip
    packed = node.input(1) is None
    parts = q_heads + 2 * kv_heads if packed else q_heads
    if query.rank != 3 or query.shape[2] is None or query.shape[2] % parts:
        raise node.error("input 'query' has the wrong shape", got=query, expected=f"[B, T, {parts} * head size]")
    size = query.shape[2] // parts
    past_key, past_value, capacity = past_and_capacity(node, 3)
    new = [] if packed else [("key", float_input(node, 1, "key")), ("value", float_input(node, 2, "value"))]
    pasts = [(n, s) for n, s in (("past_key", past_key), ("past_value", past_value)) if s is not None]
    batch = known(query.shape[0], *(s.shape[0] for _, s in (*new, *pasts) if s.rank))
    length = known(query.shape[1], *(s.shape[1] for _, s in new if s.rank == 3))
    past = known(*(s.shape[2] for _, s in pasts)) if pasts else 0
    for name, spec in (*new, *pasts):
        is_past = name.startswith("past")
        require_shape(node, name, spec, (batch, kv_heads, past, size) if is_past else (batch, length, kv_heads * size))
        require_dtype(node, name, spec, query.dtype)
    seqlens = node.required(5, "seqlens_k")
    require_dtype(node, "seqlens_k", seqlens, "i32")
    require_shape(node, "seqlens_k", seqlens, (batch,), (batch, 1), (1,), (1, 1), ())  # mobius: [B, 1]
    bias = node.input(10)
    check_mask(node, bias, "attention_bias", (batch, q_heads, length, total(past, length)))
    if bias is not None:
        require_dtype(node, "attention_bias", bias, query.dtype)
    window = node.attr("local_window_size", -1)
    sink = node.input(11)
    if sink is not None:
        require_shape(node, "head_sink", sink, (q_heads,))
        require_dtype(node, "head_sink", sink, query.dtype)
    return GroupQueryAttention(
        dtype=query.dtype,
        heads=core.Heads(batch, q_heads, kv_heads, size, size),
        length=length,
        past=past,
        capacity=capacity,
        packed=packed,
        has_past=past_key is not None,
        scale=node.attr("scale", 0.0) or 1.0 / math.sqrt(size),
        softcap=node.attr("softcap", 0.0),
        window=window - 1 if window >= 0 else None,
        window_sized=node.attr("sliding_window_cache", 0) == 1,
        rotation=_parse_rotation(node, query, size) if node.attr("do_rotary", 0) else None,
        norm_epsilons=_parse_norms(node, query, size),
        sinks=sink is not None or node.attr("smooth_softmax", 0) == 1,
        masked=bias is not None,
        num_outputs=node.num_outputs,
        where=node.where,
    )


def _parse_norms(node: Node, query: TensorSpec, size: int) -> tuple[float, float] | None:
    weights = [(name, node.input(port)) for port, name in _NORM_WEIGHTS.items()]
    given = [(name, spec) for name, spec in weights if spec is not None]
    if not given:
        return None
    if len(given) < len(weights):
        raise node.error("inputs 'q_norm_weight' and 'k_norm_weight'", got=f"'{given[0][0]}' alone", expected="both")
    for name, spec in given:
        require_shape(node, name, spec, (size,))
        require_dtype(node, name, spec, query.dtype)
    both = node.attr("qk_norm_epsilon", 1e-6)
    return node.attr("q_norm_epsilon", both), node.attr("k_norm_epsilon", both)


def _parse_rotation(node: Node, query: TensorSpec, size: int) -> Rotary:
    cos = parse_caches(node, 7, 8, query)
    require_shape(node, "cos_cache", cos, (None, None))
    columns = cos.shape[1]
    if columns is None or not 0 < 2 * columns <= size:
        raise node.error("input 'cos_cache' has the wrong shape", got=cos, expected=f"[positions, at most {size // 2}]")
    if node.attr("rotary_embedding_dim", 0) not in (0, 2 * columns):
        raise node.error("attribute 'rotary_embedding_dim'", got=node.attr("rotary_embedding_dim", 0),
                         expected=f"{2 * columns}, of the columns of 'cos_cache'")  # fmt: skip
    ids = node.input(9)
    if ids is not None:
        require_shape(node, "position_ids", ids, query.shape[:2])
        require_dtype(node, "position_ids", ids, "i64")
    return Rotary(2 * columns, bool(node.attr("rotary_interleaved", 0)))


def output_types(contract: GroupQueryAttention) -> Sequence[TensorSpec | None]:
    """The outputs' types: output, present_key, present_value, and no output_qk."""
    heads = contract.heads
    present = TensorSpec((heads.batch, heads.kv, contract.rows, heads.dk), contract.dtype)
    output = TensorSpec((heads.batch, contract.length, heads.q * heads.dk), contract.dtype)
    return [output, present, present, None][: contract.num_outputs]


def _past_lengths(b: Builder, seqlens: ir.Value, batch: Size, length: Size) -> ir.Value:
    """max(seqlens_k + 1 - T, 0) as [B] of i32; one element stands for all rows."""
    shape = spec_of(seqlens).shape
    rows = "1" if not shape or shape[0] == 1 else "b"
    term = rows + "1" * (len(shape) - 1) if shape else ""
    tokens = Scalar(b.index(length)).to("i32")
    return b.map(f"{term}->b", lambda last: (last + 1 - tokens).maximum(0), seqlens, dtype="i32", sizes={"b": batch})


def lower(
    context: LoweringContext, contract: GroupQueryAttention, operands: Sequence[ir.Value | None]
) -> list[ir.Value | None]:
    """Write the cache, then attend over it.

    Raises:
        UnsupportedModelError: for a past of the window alone.
    """
    if contract.window_sized and not contract.capacity:
        raise UnsupportedModelError("attribute 'sliding_window_cache'", where=contract.where, got=1, expected="0 where "
                                    "the context is open", hint="compile with --max-context N")  # fmt: skip
    b, heads = context.builder, contract.heads
    inputs = [*operands, *[None] * (17 - len(operands))]
    seqlens, bias = inputs[5], inputs[10]
    assert inputs[0] is not None
    assert seqlens is not None
    columns = (None, heads.kv * heads.dk, heads.kv * heads.dk)  # a packed query holds the others too
    new = [
        core.refined(b, x, heads.batch, contract.length, size)
        for x, size in zip(inputs[:3], columns, strict=True)
        if x is not None
    ]
    query, key, value = split_packed(b, heads, new[0]) if contract.packed else new
    batch, length = b.dim(query, 0), b.dim(query, 1)
    pasts = [core.refined(b, x, heads.batch, heads.kv, contract.past, heads.dk) for x in inputs[3:5] if x is not None]
    first: Size = 0
    if contract.capacity:
        assert context.position is not None, "a cache of fixed capacity needs the entry point's position"
        first = core.bounded(b, context.position, b.dim(pasts[0], 2), length)
    elif contract.has_lengths:
        first = _past_lengths(b, seqlens, batch, length)
    if contract.norm_epsilons is not None:
        weights = [weight for weight in inputs[14:16] if weight is not None]
        query = normed(b, query, heads.q, weights[0], contract.norm_epsilons[0])
        key = normed(b, key, heads.kv, weights[1], contract.norm_epsilons[1])
    if contract.rotation is not None:
        query = rotated(b, contract.rotation, query, heads.q, first, inputs[7:9], inputs[9])
        key = rotated(b, contract.rotation, key, heads.kv, first, inputs[7:9], inputs[9])
    k, v = (core.split_heads(b, x, heads.kv) for x in (key, value))
    if contract.capacity:
        k, v = (core.write_at(b, past, x, first) for past, x in zip(pasts, (k, v), strict=True))
    elif isinstance(first, ir.Value):
        k, v = (core.append_at(b, past, x, first) for past, x in zip(pasts, (k, v), strict=True))
    if bias is not None:
        sizes = [batch, heads.q, length, b.dim(k, 2)]
        bias = core.align_mask(b, bias, sizes, (first, length) if contract.capacity else None)
    sink = inputs[11]
    if sink is None and contract.sinks:
        sink = b.full(0.0, [heads.q], "f32")
    visibility = core.Visibility(first=first, left=contract.window, right=0)
    y = emit_softmax_attention(
        context, contract.shape, contract.where, query, k, v,
        scale=contract.scale, softcap=contract.softcap, visibility=visibility, mask=bias, sink=sink,
    )  # fmt: skip
    return [y, k, v, None][: contract.num_outputs]


def choose(contract: GroupQueryAttention, target: Target, options: LoweringOptions) -> Choice:
    """The strategy for a node; what is forced for the state operators says nothing here."""
    del options
    return choose_strategy(contract.shape, contract.where, target)


OPS = (Op(MICROSOFT, "GroupQueryAttention", 1, parse, output_types, lower, choose),)
