"""A step of LinearAttention with the convolution before it: a node that the frontend makes of both.

    linattn.ConvolvedLinearAttention(input, weight, bias?, past_conv, past_state, a, b, dt_bias?, decay_scale?)
        -> (output, present_state, present_conv)

    query, key, value <- the columns of CausalConvWithState(input, weight, bias, past_conv)      then as in ``gated``

A workgroup needs the queries and keys of its head and the values of its columns: its threads convolve these, four
channels each, into its memory, while their parts of the state are on the way. So each query and key is convolved by
every workgroup of its head, 9 loads for 4 channels, where a kernel of its own took 3.4 us of an H100 by Vulkan, and as
long until the next one began.
Rounding: everything in f32; the operators apart round what they hand on.

Legal: as ``gated``, for static sizes and channels in fours.
Source: ONNX schemas LinearAttention-27, CausalConvWithState-27.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from iree.compiler import ir

from ..causal_conv.contract import CausalConv
from ..node import Node, TensorSpec
from ..op import INTERNAL, Choice, LoweringContext, LoweringOptions, Op
from ..target import Target
from . import contract as plain
from . import gated
from .fused_simt import emit_convolved
from .fused_simt_kernel import Convolution
from .gated import GatedLinearAttention

CONVOLVED_LINEAR_ATTENTION = "ConvolvedLinearAttention"
KEY_HEADS, ACTIVATION = "key_heads", "activation"
_STATE = 4
_BUFFERS = 12
_CHUNK = 4
_MOST_TAPS = 8


@dataclass(frozen=True)
class ConvolvedLinearAttention:
    """Contract.

    Attributes:
        gated: The operator behind the convolution.
        present_conv: Type of the convolution's state.
        convolution: What comes before it.
    """

    gated: GatedLinearAttention
    present_conv: TensorSpec
    convolution: Convolution


def can_join(
    attention: GatedLinearAttention, convolution: CausalConv, target: Target, options: LoweringOptions
) -> bool:
    """Whether both may be one kernel."""
    c = attention.attention
    alike = convolution.input.dtype == c.dtype and not convolution.channels_last and convolution.has_past
    whole = c.dk % _CHUNK == 0 and c.dv % _CHUNK == 0 and c.batch is not None
    taps = 2 <= convolution.kernel <= _MOST_TAPS and convolution.dilation == 1
    fits = target.limits.bindings >= _BUFFERS and gated.can_join(c, target, options)
    width = c.q_heads * c.dk + c.k_heads * c.dk + c.kv_heads * c.dv
    return alike and whole and taps and fits and width == convolution.channels


def parse(node: Node) -> ConvolvedLinearAttention:
    """View the node; what it was made of has been checked."""
    x, weight, state = (node.required(i, name) for i, name in ((0, "input"), (1, "weight"), (_STATE, "past_state")))
    past = node.required(3, "past_conv")
    q_heads, k_heads = node.attr("q_num_heads", 0), node.attr(KEY_HEADS, 0)
    batch, kv_heads, dk, dv = (size or 0 for size in state.shape)
    widths = (q_heads * dk, k_heads * dk, kv_heads * dv)
    parts = tuple(TensorSpec((batch, 1, width), x.dtype) for width in widths)
    attributes = {name: value for name, value in node.attributes.items() if name not in (KEY_HEADS, ACTIVATION)}
    inputs = (*parts, *(node.input(index) for index in range(_STATE, len(node.inputs))))
    inner = replace(node, inputs=inputs, attributes=attributes, num_outputs=2, used_outputs=(True, True))
    taps, is_silu = weight.shape[-1] or 0, node.attr(ACTIVATION, "none") == "silu"
    return ConvolvedLinearAttention(
        gated.parse(inner), past, Convolution(taps, is_silu, node.input(2) is not None, sum(widths))
    )


def output_types(contract: ConvolvedLinearAttention) -> Sequence[TensorSpec | None]:
    """The outputs' types."""
    return [*plain.output_types(contract.gated.attention), contract.present_conv]


def choose(contract: ConvolvedLinearAttention, target: Target, options: LoweringOptions) -> Choice:
    """There is one way."""
    choice = gated.choose(contract.gated, target, options)
    return replace(choice, reason=f"{choice.reason}, the convolution before it")


def lower(
    context: LoweringContext, contract: ConvolvedLinearAttention, operands: Sequence[ir.Value | None]
) -> list[ir.Value | None]:
    """Emit the node."""
    before = replace(contract.gated.before, convolution=contract.convolution)
    inputs = [value for value in operands if value is not None]
    return list(emit_convolved(context, contract.gated.attention, before, inputs, contract.present_conv))


OPS = (Op(INTERNAL, CONVOLVED_LINEAR_ATTENTION, 1, parse, output_types, lower, choose),)
