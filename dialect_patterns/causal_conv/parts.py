"""A convolution whose output is read by parts of its channels: a node that the frontend makes of it and a Split.

    linattn.CausalConvParts(input [B, T, C], weight, bias?, past_state?)
        -> (part_1 [B, T, N_1], ..., part_n [B, T, N_n], present_state)      attribute sizes: N_1, ..., N_n, sum C

    part_i / norm of each heads_i channels * factors_i                       where attribute heads_i is not 0

A layer's queries, keys and values come out of one convolution, and the first two are divided by the Euclidean norms of
their heads. As nodes of their own, three copies and two norms move each element four times more.

Legal: on CPUs, where ``fused_simd`` takes rows and workgroups have channels of one part. Cost: as ``fused_simd``.
Source: ONNX schemas CausalConvWithState-27, LpNormalization-22.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from iree.compiler import ir

from ..node import Node, TensorSpec
from ..op import INTERNAL, MICROSOFT, Choice, LoweringContext, LoweringOptions, Op
from ..target import Target
from .contract import CausalConv
from .contract import parse as parse_whole
from .direct import Operands
from .fused_simd import emit_causal_conv_rows
from .simd_channels import Part

CAUSAL_CONV_PARTS = "CausalConvParts"
_OWN = ("sizes", "heads", "factors")


@dataclass(frozen=True)
class CausalConvParts:
    """Contract.

    Attributes:
        whole: The convolution, with its channels first.
        parts: Of its output, one after the other.
    """

    whole: CausalConv
    parts: tuple[Part, ...]


def parts_of(sizes: Sequence[int], heads: Sequence[int], factors: Sequence[float]) -> tuple[Part, ...]:
    """Parts that lie one after the other."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(Part(*each) for each in zip(starts, sizes, heads, factors, strict=True))


def parse(node: Node) -> CausalConvParts:
    """View the node; what it was made of has been checked."""
    x = node.required(0, "input")
    batch, tokens, channels = x.shape
    attributes = {name: value for name, value in node.attributes.items() if name not in _OWN}
    inputs = (
        TensorSpec((batch, channels, tokens), x.dtype),
        *(node.input(index) for index in range(1, len(node.inputs))),
    )
    # Of the two contracts the wider one; the node has been checked against its own.
    whole = replace(
        node, domain=MICROSOFT, inputs=inputs, attributes=attributes, num_outputs=2, used_outputs=(True, True)
    )
    sizes, heads = node.attr("sizes", list[int]()), node.attr("heads", list[int]())
    return CausalConvParts(parse_whole(whole), parts_of(sizes, heads, node.attr("factors", list[float]())))


def output_types(contract: CausalConvParts) -> Sequence[TensorSpec | None]:
    """The outputs' types."""
    batch, _, tokens = contract.whole.input.shape
    parts = [TensorSpec((batch, tokens, part.size), contract.whole.input.dtype) for part in contract.parts]
    return [*parts, contract.whole.state_spec]


def choose(contract: CausalConvParts, target: Target, options: LoweringOptions) -> Choice:
    """There is one way."""
    del target, options
    c, normed = contract.whole, sum(1 for part in contract.parts if part.head)
    how = f", {normed} of them divided by the norms of their heads" if normed else ""
    reason = f"one kernel, state update included, {len(contract.parts)} parts of its output{how}"
    return Choice("fused_simd", reason, rule=c.activation, heads=f"{c.channels} x {c.kernel}")


def lower(context: LoweringContext, contract: CausalConvParts, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Emit the kernel."""
    b, c = context.builder, contract.whole
    x, weight, bias, past = [*operands, *[None] * 4][:4]
    assert x is not None
    assert weight is not None
    batch, channels, tokens = c.input.shape
    x = b.refine(x, TensorSpec((batch, tokens, channels), c.input.dtype))
    weight = b.refine(weight, TensorSpec((c.channels, 1, c.kernel), c.input.dtype))
    state = past if past is None else b.refine(past, c.state_spec)
    given = Operands(x, weight, bias, x if state is None else state, b.dim(x, 1))
    return emit_causal_conv_rows(context, c, given, contract.parts)


OPS = (Op(INTERNAL, CAUSAL_CONV_PARTS, 1, parse, output_types, lower, choose),)
