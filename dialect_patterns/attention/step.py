"""Softmax attention of one token with what stands around it: a node that the frontend makes of several of a graph.

    linattn.AttentionStep(query, key, value, past_key, past_value, position_ids, cos, sin, q_weight?, k_weight?, gate?)
        -> (output, present_key, present_value)

    q, k   <- rotated(normed(query)), rotated(normed(key)) by heads         norms where there are weights
    output <- attention(q, keys, values) * sigmoid(gate)                    where there is a gate

query and gate may lie among other columns, head by head: attributes say how far apart and from where on.

What it was made of takes seven kernels and two copies beside attention's two on a GPU; here it is one of its own
(``step_rows``) and the end of attention's second.

Legal: where ``fused_simt`` is what GroupQueryAttention gets, for one token, heads that are a workgroup each, a cache of
fixed capacity. Source: ONNX Runtime 1.32, schemas GroupQueryAttention-1, MRotaryEmbedding-1, RotaryEmbedding-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from iree.compiler import ir

from ..node import Node, TensorSpec
from ..op import INTERNAL, Choice, LoweringContext, LoweringOptions, Op
from ..rotary.m_rotary_embedding import Streams
from ..select import No
from ..target import Target
from . import core
from .fused_simt import emit_attention_fused_simt
from .simt_join import Gate
from .step_rows import StepRows, Turning, emit_step_rows, is_legal
from .strategies import choose as choose_strategy

ATTENTION_STEP = "AttentionStep"
_BUFFERS = 11


@dataclass(frozen=True)
class AttentionStep:
    """Contract.

    Attributes:
        rows: What comes before attention.
        scale: Factor on q . k.
        softcap: c in c * tanh(s / c), 0 for none.
        left: How many keys before its own position the query sees, None for all.
        gate: Where the gate's columns are; None without one.
        where: The node, as errors name it.
    """

    rows: StepRows
    scale: float
    softcap: float
    left: int | None
    gate: Gate | None
    where: str

    @property
    def shape(self) -> core.AttentionShape:
        """What the strategy of attention is chosen by."""
        return core.AttentionShape(self.rows.heads, 1, self.rows.capacity, False, True, self.rows.dtype)


def parse(node: Node) -> AttentionStep:
    """View the node; what it was made of has been checked."""
    past, position, cos = (node.required(i, name) for i, name in ((3, "past_key"), (5, "position_ids"), (6, "cos")))
    batch, kv_heads, capacity, size = (dim or 0 for dim in past.shape)
    heads = core.Heads(batch, node.attr("num_heads", 0), kv_heads, size, size)
    sections = node.attr("sections", list[int]())
    streams = None
    if sections:
        streams = Streams((sections[0], sections[1], sections[2]), bool(node.attr("interleaved_sections", 0)))
    turning = Turning(
        node.attr("rotated", 0), bool(node.attr("interleaved", 0)), streams,
        node.attr("rotary_scale", 1.0), position.dtype, position.rank > 1,
    )  # fmt: skip
    epsilons = (node.attr("q_epsilon", 0.0), node.attr("k_epsilon", 0.0)) if node.input(8) is not None else None
    rows = StepRows(
        heads,
        past.dtype,
        cos.dtype,
        capacity,
        node.attr("query_start", 0),
        node.attr("query_stride", 0),
        epsilons,
        turning,
        cos.shape[0] or 0,
    )
    gate = Gate(node.attr("gate_start", 0), node.attr("gate_stride", 0)) if node.input(10) is not None else None
    left = node.attr("left", -1)
    return AttentionStep(
        rows, node.attr("scale", 1.0), node.attr("softcap", 0.0),
        None if left < 0 else left, gate, node.where,
    )  # fmt: skip


def can_join(contract: AttentionStep, target: Target) -> bool:
    """Whether the node may be made."""
    if not target.is_gpu or target.limits.bindings < _BUFFERS or isinstance(is_legal(contract.rows.heads, target), No):
        return False
    return choose_strategy(contract.shape, contract.where, target).strategy == "fused_simt"


def output_types(contract: AttentionStep) -> Sequence[TensorSpec | None]:
    """The outputs' types."""
    rows, heads = contract.rows, contract.rows.heads
    present = TensorSpec((heads.batch, heads.kv, rows.capacity, heads.dk), rows.dtype)
    return [TensorSpec((heads.batch, 1, heads.q * heads.dk), rows.dtype), present, present]


def choose(contract: AttentionStep, target: Target, options: LoweringOptions) -> Choice:
    """There is one way."""
    del options
    choice = choose_strategy(contract.shape, contract.where, target)
    before = ["rotary embedding", "the caches' row"]
    before = ["norms of queries and keys", *before] if contract.rows.epsilons is not None else before
    after = "" if contract.gate is None else ", the gate in the last"
    return replace(choice, reason=f"three kernels over the filled rows: {', '.join(before)} in the first{after}")


def lower(
    context: LoweringContext, contract: AttentionStep, operands: Sequence[ir.Value | None]
) -> list[ir.Value | None]:
    """Emit the node."""
    b, target, rows, heads = context.builder, context.target, contract.rows, contract.rows.heads
    inputs = [*operands, *[None] * (_BUFFERS - len(operands))]
    query, key, value, past_key, past_value, *turned = (x for x in inputs[:8] if x is not None)
    assert context.position is not None, "a cache of fixed capacity needs the entry point's position"
    first = core.bounded(b, context.position, rows.capacity, 1)
    gammas = [x for x in inputs[8:10] if x is not None]
    q, k, v = emit_step_rows(b, target, rows, [query, key, value], [past_key, past_value], first, turned, gammas)
    y = emit_attention_fused_simt(
        b, target, b.expand(b.collapse(q, 1, 2), 1, [heads.q, 1, heads.dk]), k, v, first=first,
        scale=contract.scale, softcap=contract.softcap, left=contract.left, sink=None, bias=None,
        gate=None if inputs[10] is None or contract.gate is None else (contract.gate, inputs[10]),
    )  # fmt: skip
    return [b.expand(b.collapse(y, 1, 3), 1, [1, heads.q * heads.dk]), k, v]


OPS = (Op(INTERNAL, ATTENTION_STEP, 1, parse, output_types, lower, choose),)
