"""LinearAttention of one token with what makes its inputs: a node that the frontend makes of several of a graph.

    linattn.GatedLinearAttention(query, key, value, past_state, a, b, dt_bias, decay_scale) -> (output, present_state)

    query, key  <- query / |query|, key / |key| by heads                   where an attribute says so, else as they are
    decay, beta <- decay_scale * softplus(a + dt_bias), sigmoid(b)         or decay and beta themselves

A decode step is many small kernels, and each costs microseconds beside its work: two norms and two gates are four a
layer. A thread of ``fused_simt`` holds its part of query and key anyway, so that a norm is one more sum over the lanes.
Rounding: everything in f32; the operators apart round what they hand on.

Legal: where ``fused_simt`` is what the node gets, for one token, on GPUs with subgroup operations.
Source: ONNX schemas LinearAttention-27, LpNormalization-22; ONNX Runtime 1.32, schema LinearAttentionGate-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from iree.compiler import ir

from ..node import Node, TensorSpec
from ..op import INTERNAL, MICROSOFT, Choice, LoweringContext, LoweringOptions, Op
from ..target import Target
from . import contract as plain
from . import op
from .contract import LinearAttention
from .fused_simt import emit_linear_attention_fused_simt
from .fused_simt_kernel import Before
from .operands import prepare

GATED_LINEAR_ATTENTION = "GatedLinearAttention"
QUERY_NORM, KEY_NORM = "query_norm", "key_norm"
_INPUTS = len(plain.INPUTS)
_BUFFERS = _INPUTS + 4  # dt_bias, decay_scale and two results


@dataclass(frozen=True)
class GatedLinearAttention:
    """Contract.

    Attributes:
        attention: The operator that is left, whose decay and beta are a and b where there are gates.
        before: What is computed before it.
    """

    attention: LinearAttention
    before: Before


def can_join(attention: LinearAttention, target: Target, options: LoweringOptions) -> bool:
    """Whether what makes a node's inputs may be part of its kernel."""
    is_step = attention.tokens == 1 and target.is_gpu and target.subgroup_size > 0
    fits = target.limits.bindings >= _BUFFERS
    return is_step and fits and op.choose(attention, target, options).strategy == "fused_simt"


def parse(node: Node) -> GatedLinearAttention:
    """View the node; what it was made of has been checked."""
    before = Before(
        query_norm=bool(node.attr(QUERY_NORM, 0)),
        key_norm=bool(node.attr(KEY_NORM, 0)),
        gates=len(node.inputs) > _INPUTS,  # two more of them: dt_bias and decay_scale
    )
    attributes = {name: value for name, value in node.attributes.items() if name not in (QUERY_NORM, KEY_NORM)}
    # Of the two contracts the wider one; the node has been checked against its own.
    inputs = tuple(node.input(index) for index in range(len(node.inputs)))
    attention = replace(node, domain=MICROSOFT, inputs=inputs[:_INPUTS], attributes=attributes)
    return GatedLinearAttention(plain.parse(attention), before)


def output_types(contract: GatedLinearAttention) -> Sequence[TensorSpec | None]:
    """The outputs' types."""
    return plain.output_types(contract.attention)


def choose(contract: GatedLinearAttention, target: Target, options: LoweringOptions) -> Choice:
    """There is one way."""
    choice = op.choose(contract.attention, target, options)
    norms = ("the query's norm", "the key's norm", "the gates")
    included = [name for name, is_there in zip(norms, contract.before.flags, strict=True) if is_there]
    return replace(choice, reason=f"{choice.reason}, with {', '.join(included)}")


def lower(
    context: LoweringContext, contract: GatedLinearAttention, operands: Sequence[ir.Value | None]
) -> list[ir.Value | None]:
    """Emit the node."""
    c = contract.attention
    x = prepare(context.builder, c, operands[:_INPUTS])
    rates = [value for value in operands[_INPUTS:] if value is not None]
    results = emit_linear_attention_fused_simt(context, c, x, contract.before, rates)
    return [value if used else None for value, used in zip(results, c.used_outputs, strict=False)]


OPS = (Op(INTERNAL, GATED_LINEAR_ATTENTION, 1, parse, output_types, lower, choose),)
