"""Strategy ``fused_simd``: convolution and next state as one hand-made CPU kernel.

    padded = concat(past_state, input);  output = act(bias + sum_j w_j * padded[j*dilation : j*dilation + T])
    present_state = padded[T : T + (k - 1)*dilation]

    hal.executable.source private @causal_conv_fused_simd_...         one for all equal nodes
    %out, %state = flow.dispatch @...[B](B?, T?, %input, %weight, %bias, %past)

A workgroup does some channels of a batch row; see ``simd_kernel``. Nothing is padded or copied in memory. Where the
node's input is a transpose of [B, T, C], a kernel takes that and leaves its output so, and the transposes around the
node vanish: see ``simd_channels``.

Legal: on CPUs, sequence last, with a state (k > 1) that fits in a few vectors. Cost per element: k multiply-adds, one
read, one write. Source: ONNX schema CausalConvWithState-27.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from iree.compiler import ir

from ..emit.dispatch import Kernel, dispatch
from ..emit.kernel_text import Index, KernelText
from ..emit.workers import slowest_share
from ..machines import for_machines
from ..node import Dim, TensorSpec
from ..op import LoweringContext, weight_symbol
from ..select import Legality, No, OtherMachine, Yes
from ..target import Target
from .contract import CausalConv
from .direct import Operands
from .simd_channels import ChannelsBody, Part
from .simd_kernel import Body, write_one_token

_MAX_STATE = 256  # elements of the state of the channels of one vector, and of one channel
_MIN_LANES = 4
_ELEMENTS = 8192  # of the input a workgroup
_MAX_UNROLLED = 16  # tokens of state of which code for rows is made one by one
_MAX_ROW = 512  # channels of a workgroup that takes rows
_STACK_BYTES = 24 << 10  # for their weights and past state
_START = 1000  # elements that would take as long as the start of a workgroup


def is_legal(contract: CausalConv, target: Target) -> Legality:
    """On CPUs, with the sequence last and a short state."""
    if target.is_gpu or not target.vector_bits:
        return (OtherMachine if target.is_gpu else No)("the target is not a CPU with vectors")
    if contract.channels_last:
        return No("channels_last")
    if not contract.state_length:
        return No("a kernel of one tap has no state")
    if contract.state_length > _MAX_STATE or contract.kernel > _MAX_STATE // _MIN_LANES:
        return No(f"the state has {contract.state_length} tokens, more than {_MAX_STATE}")
    if contract.input.shape[2] == 1 and any(_lanes(contract, m) < _MIN_LANES for m in target.machines):
        return No(f"{contract.channels} channels with {contract.state_length} tokens of state do not fill vectors")
    return Yes()


def takes_rows(contract: CausalConv, target: Target) -> bool:
    """Whether there is a kernel for input and output [B, T, C], for nodes that stand between two transposes."""
    c = contract
    cut = all(_row_sizes(c, _row_lanes(c, machine)) for machine in target.machines)
    fits = c.state_length <= _MAX_UNROLLED and c.channels >= _MIN_LANES and cut
    return isinstance(is_legal(c, target), Yes) and fits and c.input.shape[2] != 1


def emit_causal_conv_fused_simd(context: LoweringContext, contract: CausalConv, x: Operands) -> list[ir.Value]:
    """Emit output and present state."""
    kernel = for_machines(context.target, lambda machine: causal_conv_kernel(contract, machine))
    return _emit(context, contract, kernel, x)


def emit_causal_conv_rows(
    context: LoweringContext, contract: CausalConv, x: Operands, parts: Sequence[Part] = ()
) -> list[ir.Value]:
    """Emit output and present state for ``x.input`` [B, T, C]; the output is [B, T, C] too, or its parts."""
    kernel = for_machines(context.target, lambda machine: rows_kernel(contract, machine, parts))
    return _emit(context, contract, kernel, x)


def _emit(context: LoweringContext, c: CausalConv, kernel: Kernel, x: Operands) -> list[ir.Value]:
    b = context.builder
    flat, flat_state = (spec.rank == 2 for spec in (kernel.outputs[0], kernel.outputs[-1]))
    batch = b.dim(x.input, 0)
    value = b.collapse(x.input, 1, 2) if flat else x.input
    operands = [value, _taps(context, x.weight), *([x.bias] if x.bias is not None else [])]
    operands += [b.collapse(x.past, 1, 2) if flat_state else x.past] if c.has_past else []
    *outputs, state = dispatch(b, kernel, operands, batch, x.tokens)
    if flat:
        outputs = [b.expand(outputs[0], 1, [c.channels, 1])]
    if flat_state:
        state = b.expand(state, 1, [c.channels, c.state_length])
    return [*outputs, state]


def _taps(context: LoweringContext, weight: ir.Value) -> ir.Value:
    """The weight as [C * k], stored so where it can be: IREE compiles and runs what there is to do with weights."""
    symbol = weight_symbol(weight)
    if symbol is None or context.weights is None:
        return context.builder.collapse(weight, 0, 2)
    return context.weights.repacked(symbol, "flat", lambda array: array.reshape(-1))


def causal_conv_kernel(contract: CausalConv, target: Target) -> Kernel:
    """The kernel of a contract."""
    c, dtype = contract, contract.input.dtype
    batch, _, tokens = c.input.shape
    one = tokens == 1
    lanes = _lanes(c, target)
    channels = _channels(c, lanes)

    def write(k: KernelText, batch: Index, tokens: Index, memrefs: Sequence[str]) -> None:
        del batch
        if one:
            write_one_token(k, c, channels, lanes, memrefs)
        else:
            Body(k, c, channels, lanes, tokens, memrefs).write()

    if one:
        value, state = (TensorSpec((batch, c.channels), dtype), "B_"), (_flat_state(c), "B_")
    else:
        value, state = (c.input, "B_T"), (c.state_spec, "B__")
    return _kernel(c, _symbol(c, target), (value, [value]), state, channels, write)


def rows_kernel(contract: CausalConv, target: Target, parts: Sequence[Part] = ()) -> Kernel:
    """The kernel of a contract for input and output [B, T, C], or some parts of that."""
    c, lanes = contract, _row_lanes(contract, target)
    batch, _, tokens = c.input.shape
    channels = min(
        _part_sizes(c, lanes, parts),
        key=lambda size: slowest_share(-(-c.channels // size), size * (tokens or 256) + _START),
    )

    def write(k: KernelText, batch: Index, tokens: Index, memrefs: Sequence[str]) -> None:
        del batch
        ChannelsBody(k, c, parts or [Part(0, c.channels)], channels, lanes, tokens, memrefs).write()

    value = TensorSpec((batch, tokens, c.channels), c.input.dtype), "BT_"
    outputs = [(TensorSpec((batch, tokens, part.size), c.input.dtype), "BT_") for part in parts] or [value]
    kinds = [f"{part.size}" + (f"n{part.head}x{part.factor.hex()}" if part.head else "") for part in parts]
    name = "_".join([f"{_symbol(c, target)}_rows", *kinds]).replace(".", "p").replace("-", "m").replace("+", "")
    return _kernel(c, name, (value, outputs), (_flat_state(c), "B_"), channels, write)


def _part_sizes(c: CausalConv, lanes: int, parts: Sequence[Part]) -> list[int]:
    """Channels that a workgroup may have: whole heads of one part, or of none in particular where there are none."""
    sizes = _row_sizes(c, lanes)
    if not parts:
        return sizes
    whole = [size for size in sizes if all(part.start % size == part.size % size == 0 for part in parts)]
    return [size for size in whole if all(not part.head or size % part.head == 0 for part in parts)]


def takes_parts(contract: CausalConv, parts: Sequence[Part], target: Target) -> bool:
    """Whether there is a kernel for input [B, T, C] and such parts of the output, one after the other."""
    if not takes_rows(contract, target):
        return False
    lanes = {_row_lanes(contract, machine) for machine in target.machines}
    heads = [part.head for part in parts if part.head]
    return all(_part_sizes(contract, n, parts) and all(head % n == 0 for head in heads) for n in lanes)


def _row_lanes(c: CausalConv, target: Target) -> int:
    """Lanes of a vector of channels: as many as there are, and no more than there are channels."""
    return min(max(target.vector_bits // 32, _MIN_LANES), 1 << (c.channels.bit_length() - 1))


def _row_sizes(c: CausalConv, lanes: int) -> list[int]:
    """Channels that a workgroup over rows may have: whole vectors and equal shares if possible.

    Else the last workgroup gets what is left, which must fill a vector, or one workgroup does them all.
    """
    most = min(_MAX_ROW, _STACK_BYTES // (4 * (c.kernel + c.state_length)), c.channels)
    whole = range(lanes, most + 1, lanes)
    equal = [size for size in whole if c.channels % size == 0]
    rest = [size for size in whole if c.channels % size >= lanes]
    return equal or rest + ([c.channels] if c.channels == most else [])


def _kernel(
    c: CausalConv,
    name: str,
    values: tuple[tuple[TensorSpec, str], Sequence[tuple[TensorSpec, str]]],
    state: tuple[TensorSpec, str],
    channels: int,
    write: Callable[[KernelText, Index, Index, Sequence[str]], None],
) -> Kernel:
    value, outputs = values
    given = [value, (TensorSpec((c.channels * c.kernel,), c.input.dtype), "_")]
    given += [(TensorSpec((c.channels,), c.input.dtype), "_")] if c.has_bias else []
    given += [state] if c.has_past else []
    return Kernel(
        name=name,
        inputs=tuple(spec for spec, _ in given),
        outputs=(*(spec for spec, _ in outputs), state[0]),
        axes=(*(term for _, term in given), *(term for _, term in outputs), state[1]),
        workgroups=(-(-c.channels // channels), 1),
        write=write,
    )


def _flat_state(c: CausalConv) -> TensorSpec:
    return TensorSpec((c.input.shape[0], c.channels * c.state_length), c.input.dtype)


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
