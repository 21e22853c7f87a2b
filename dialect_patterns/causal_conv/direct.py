"""Strategy ``direct``: the convolution as a sum of shifted views of the past state joined with the input.

    padded = concat(past_state, input)                     along the sequence
    output = act(bias + sum_j w_j * padded[j*dilation : j*dilation + T])
    present_state = padded[T : T + (k - 1)*dilation]

    %padded = tensor.insert_slice (twice)
    %out    = linalg.generic %padded[0:], %padded[1:], ..., %w[:, 0], %w[:, 1], ...    (sums in f32)
    %state  = tensor.extract_slice %padded

Legal: always; any T, also T = 0 and T < k - 1, and k = 1 with its empty state. Cost per element: k multiply-adds, one
read and one write, and one copy of the input. Source: ONNX schema CausalConvWithState-27.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..emit.builder import Builder, Size, spec_of
from ..emit.scalar import Scalar
from ..node import TensorSpec
from ..op import LoweringContext
from ..select import Legality, Yes
from ..target import Target
from .contract import CausalConv

_TAPS_PER_LOOP = 8  # operands of one loop stay well below the 16 buffers a Vulkan device must offer


def is_legal(contract: CausalConv, target: Target) -> Legality:
    """Always."""
    del contract, target
    return Yes()


@dataclass(frozen=True)
class Operands:
    """The operands in their own types, with everything static that the contract knows.

    Attributes:
        input: [B, C, T], or [B, T, d_1, ..., d_n] with channels_last.
        weight: [C, 1, k].
        bias: [C] or None.
        past: Past state, zeros where the node has none.
        tokens: T.
    """

    input: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    past: ir.Value
    tokens: Size


def prepare(b: Builder, contract: CausalConv, values: Sequence[ir.Value | None]) -> Operands:
    """Put the static sizes into the operands' types and fill in the past state."""
    x, weight, bias, past = [*values, *[None] * 4][:4]
    assert x is not None
    assert weight is not None
    weight = b.refine(weight, TensorSpec((contract.channels, 1, contract.kernel), contract.input.dtype))
    x = b.refine(x, contract.input)
    axis = 1 if contract.channels_last else 2
    if past is not None:
        past = b.refine(past, contract.state_spec)
    else:
        sizes = b.shape(x)
        sizes[axis] = contract.state_length
        past = b.full(0.0, sizes, contract.input.dtype)
    return Operands(x, weight, bias, past, b.dim(x, axis))


def emit_causal_conv_direct(context: LoweringContext, contract: CausalConv, x: Operands) -> list[ir.Value]:
    """Emit output and present state."""
    b = context.builder
    if not contract.channels_last:
        return _emit_conv(b, contract, 2, x, x.input, x.past)
    trailing = b.shape(x.input)[2:]
    flat = _emit_conv(b, contract, 1, x, b.collapse(x.input, 2, -1), b.collapse(x.past, 2, -1))
    return [b.expand(value, 2, trailing) for value in flat]


def _emit_conv(
    b: Builder, contract: CausalConv, axis: int, operands: Operands, x: ir.Value, past: ir.Value
) -> list[ir.Value]:
    """The convolution of rank-3 tensors along ``axis``; output and present state."""
    length = contract.state_length
    sizes = b.shape(x)
    padded = b.concat([past, x], axis) if length else x

    def window(start: Size, like: ir.Value) -> ir.Value:
        return b.slice(padded, [start if i == axis else 0 for i in range(3)], b.shape(like))

    taps = [window(j * contract.dilation, x) for j in range(contract.kernel)]
    weights = [
        b.collapse(b.slice(operands.weight, [0, 0, j], [contract.channels, 1, 1]), 0, 2) for j in range(contract.kernel)
    ]
    output = _emit_taps(b, contract, axis, taps, weights, operands.bias)
    return [output, window(sizes[axis], past) if length else past]


def _emit_taps(
    b: Builder, contract: CausalConv, axis: int, taps: list[ir.Value], weights: list[ir.Value], bias: ir.Value | None
) -> ir.Value:
    """act(bias + sum of taps times weights), a few taps a loop."""
    letters = "btc" if axis == 1 else "bct"
    partial: ir.Value | None = None
    for first in range(0, len(taps), _TAPS_PER_LOOP):
        group = slice(first, first + _TAPS_PER_LOOP)
        last = first + _TAPS_PER_LOOP >= len(taps)
        start = partial if partial is not None else bias
        operands = [*taps[group], *weights[group], *([start] if start is not None else [])]
        count = len(taps[group])

        def body(*elements: Scalar, count: int = count, last: bool = last) -> Scalar:
            terms = [e.to("f32") for e in elements]
            total = terms[2 * count] if len(terms) > 2 * count else None
            for tap, weight in zip(terms[:count], terms[count : 2 * count], strict=True):
                total = tap * weight if total is None else total + tap * weight
            assert total is not None
            return total.silu() if last and contract.activation == "silu" else total

        terms = [letters] * count + ["c"] * count
        if start is not None:
            terms.append("c" if spec_of(start).rank == 1 else letters)
        dtype = contract.input.dtype if last else "f32"
        partial = b.map(f"{','.join(terms)}->{letters}", body, *operands, dtype=dtype)
    assert partial is not None
    return partial
