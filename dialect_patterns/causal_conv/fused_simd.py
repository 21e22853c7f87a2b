"""Strategy ``fused_simd``: convolution and next state as one hand-made CPU kernel.

    padded = concat(past_state, input);  output = act(bias + sum_j w_j * padded[j*dilation : j*dilation + T])
    present_state = padded[T : T + (k - 1)*dilation]

    hal.executable.source private @causal_conv_fused_simd_...         one for all equal nodes
    %out, %state = flow.dispatch @...[B](B?, T?, %input, %weight, %bias, %past)

A workgroup does some channels of a batch row; see ``simd_kernel``. Nothing is padded or copied in memory.

Legal: on CPUs, sequence last, with a state (k > 1) that fits in a few vectors. Cost per element: k multiply-adds, one
read, one write. Source: ONNX schema CausalConvWithState-27.
"""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir

from ..builder import Size
from ..dispatch import Kernel, dispatch
from ..kernel_text import Index, KernelText
from ..node import Dim, TensorSpec
from ..op import LoweringContext
from ..select import Legality, No, Yes
from ..target import Target
from .contract import CausalConv
from .direct import Operands
from .simd_kernel import Body, write_one_token

_MAX_STATE = 256  # elements of the state of the channels of one vector, and of one channel
_MIN_LANES = 4
_ELEMENTS = 8192  # of the input a workgroup


def is_legal(contract: CausalConv, target: Target) -> Legality:
    """On CPUs, with the sequence last and a short state."""
    if target.is_gpu or not target.vector_bits:
        return No("the target is not a CPU with vectors")
    if contract.channels_last:
        return No("channels_last")
    if not contract.state_length:
        return No("a kernel of one tap has no state")
    if contract.state_length > _MAX_STATE or contract.kernel > _MAX_STATE // _MIN_LANES:
        return No(f"the state has {contract.state_length} tokens, more than {_MAX_STATE}")
    if contract.input.shape[2] == 1 and _lanes(contract, target) < _MIN_LANES:
        return No(f"{contract.channels} channels with {contract.state_length} tokens of state do not fill vectors")
    return Yes()


def emit_causal_conv_fused_simd(context: LoweringContext, contract: CausalConv, x: Operands) -> list[ir.Value]:
    """Emit output and present state."""
    b, c = context.builder, contract
    kernel = causal_conv_kernel(c, context.target)
    one = c.input.shape[2] == 1
    value, past = x.input, x.past
    batch: Size = b.dim(value, 0)
    if one:
        value, past = b.collapse(value, 1, 2), b.collapse(past, 1, 2)
    operands = [value, b.collapse(x.weight, 0, 2), *([x.bias] if x.bias is not None else [])]
    operands += [past] if c.has_past else []
    results = dispatch(b, kernel, operands, batch, x.tokens)
    if one:
        results = [b.expand(results[0], 1, [c.channels, 1]), b.expand(results[1], 1, [c.channels, c.state_length])]
    return results


def causal_conv_kernel(contract: CausalConv, target: Target) -> Kernel:
    """The kernel of a contract."""
    c, dtype = contract, contract.input.dtype
    batch, _, tokens = c.input.shape
    one = tokens == 1
    lanes = _lanes(c, target)
    channels = _channels(c, lanes)
    if one:
        value = TensorSpec((batch, c.channels), dtype)
        state = TensorSpec((batch, c.channels * c.state_length), dtype)
        axes = ("B_", "B_")
    else:
        value, state, axes = c.input, c.state_spec, ("B_T", "B__")
    given = [(value, axes[0]), (TensorSpec((c.channels * c.kernel,), dtype), "_")]
    given += [(TensorSpec((c.channels,), dtype), "_")] if c.has_bias else []
    given += [(state, axes[1])] if c.has_past else []

    def write(k: KernelText, batch: Index, tokens: Index, memrefs: Sequence[str]) -> None:
        del batch
        if one:
            write_one_token(k, c, channels, lanes, memrefs)
        else:
            Body(k, c, channels, lanes, tokens, memrefs).write()

    return Kernel(
        name=_symbol(c, target),
        inputs=tuple(spec for spec, _ in given),
        outputs=(value, state),
        axes=(*(term for _, term in given), *axes),
        workgroups=(c.channels // channels, 1),
        write=write,
    )


def _lanes(c: CausalConv, target: Target) -> int:
    """Lanes of a vector: of channels for one token, else of tokens."""
    most = max(target.vector_bits // 32, _MIN_LANES)
    tokens = c.input.shape[2]
    if tokens == 1:
        lanes = min(c.channels & -c.channels, most)
        while lanes * max(c.state_length, c.kernel) > _MAX_STATE:
            lanes //= 2
        return lanes
    if tokens is not None and tokens & -tokens >= _MIN_LANES:
        return min(tokens & -tokens, most)
    return most


def _channels(c: CausalConv, lanes: int) -> int:
    """Channels of a workgroup: a power of two times what they have in common with all."""
    tokens = c.input.shape[2]
    wanted = max(1, _ELEMENTS // (tokens * (8 if tokens == 1 else 1) if tokens else 256))
    channels = 1
    while channels * 2 <= wanted and c.channels % (channels * 2) == 0:
        channels *= 2
    return max(channels, lanes) if tokens == 1 else channels


def _symbol(c: CausalConv, target: Target) -> str:
    def dim(size: Dim) -> str:
        return "x" if size is None else str(size)

    batch, _, tokens = c.input.shape
    parts = ("bias" if c.has_bias else "no_bias", "past" if c.has_past else "no_past")
    shape = f"c{c.channels}k{c.kernel}d{c.dilation}_b{dim(batch)}t{dim(tokens)}"
    name = f"causal_conv_fused_simd_{c.input.dtype}_{c.activation}_{'_'.join(parts)}_{shape}_v{target.vector_bits}"
    return name
