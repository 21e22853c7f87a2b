"""Strategy ``fused_simd``: all tokens of a call as one hand-made CPU kernel, the state of some channels in registers.

    S[d, n] <- exp(step[t, d] * rate[d, n]) * S[d, n] + value[t, d] * key[t, n]
    output[t, d] = sum_n query[t, n] * S[d, n]

    hal.executable.source private @selective_scan_fused_simd_...         one for all equal nodes
    %output, %state = flow.dispatch @...[B](B?, T?, %value, %step, %rate, %key, %query, %past)

A workgroup does some channels of a batch row. Where there are many tokens a vector holds channels, see
``simd_tokens``; for one token it holds elements of the state, see ``simd_one_token``. Decays never lie in memory.

Legal: on CPUs, with at least a vector of channels and a state of a multiple of 4 elements. Cost per token: D N
exponentials and 4 D N multiply-adds; 3 D + 2 N numbers of memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir

from ..emit.dispatch import Kernel, dispatch
from ..emit.kernel_text import Index, KernelText
from ..machines import for_machines
from ..node import Dim, TensorSpec
from ..op import LoweringContext
from ..select import Legality, No, OtherMachine, Yes
from ..target import Target
from .contract import SelectiveScan
from .simd_one_token import OneToken
from .simd_tokens import Tokens, adds_in_memory

_LEAST = 4  # lanes of a vector, and what divides the elements of a state
_MAX_STATE = 256  # elements of the state of a channel: they are unrolled
_SHARE = 128  # channels of a workgroup for one token


def is_legal(contract: SelectiveScan, target: Target) -> Legality:
    """On CPUs, where channels and states fill vectors."""
    if target.is_gpu or not target.vector_bits:
        return (OtherMachine if target.is_gpu else No)("the target is not a CPU with vectors")
    if contract.channels < _LEAST or contract.states % _LEAST or contract.states > _MAX_STATE:
        shape = f"{contract.channels} channels with states of {contract.states}"
        return No(f"{shape}: it takes {_LEAST} channels or more and multiples of {_LEAST} up to {_MAX_STATE}")
    return Yes()


def emit_selective_scan_fused_simd(
    context: LoweringContext, contract: SelectiveScan, inputs: list[ir.Value], past: ir.Value | None
) -> list[ir.Value]:
    """Emit output and present state; for the arguments see ``recurrent``."""
    b, c = context.builder, contract
    batch, tokens = b.dim(inputs[0], 0), b.dim(inputs[0], 1)
    value, step, rate, key, query = inputs
    operands = [value, step, b.collapse(rate, 0, 1), key, query]
    operands += [b.collapse(past, 1, 2)] if past is not None else []
    kernel = for_machines(context.target, lambda machine: selective_scan_kernel(c, machine))
    output, state = dispatch(b, kernel, operands, batch, tokens)
    return [output, b.expand(state, 1, [c.channels, c.states])]


def selective_scan_kernel(contract: SelectiveScan, target: Target) -> Kernel:
    """The kernel of a contract."""
    c = contract
    batch, tokens = c.value.shape[:2]
    one = tokens == 1
    widest = max(target.vector_bits // 32, _LEAST)
    if one:
        lanes = min(widest, c.states & -c.states)
        share = min(_SHARE, c.channels)
    else:
        lanes = share = min(widest, 1 << (c.channels.bit_length() - 1))

    def write(k: KernelText, batch: Index, tokens: Index, memrefs: Sequence[str]) -> None:
        del batch
        if one:
            OneToken(k, c, share, lanes, memrefs).write()
        else:
            Tokens(k, c, lanes, tokens, memrefs).write()

    flat = TensorSpec((batch, c.channels * c.states), "f32")
    given = [(c.value, "BT_"), (c.value, "BT_"), (TensorSpec((c.channels * c.states,), "f32"), "_")]
    given += [(c.keys, "BT_"), (c.keys, "BT_"), *([(flat, "B_")] if c.has_past else [])]
    return Kernel(
        name=_symbol(c, batch, tokens, target),
        inputs=tuple(spec for spec, _ in given),
        outputs=(c.value, flat),
        axes=(*(term for _, term in given), "BT_", "B_"),
        workgroups=(c.channels // share if not one and adds_in_memory(c, lanes) else -(-c.channels // share), 1),
        write=write,
    )


def _symbol(c: SelectiveScan, batch: Dim, tokens: Dim, target: Target) -> str:
    shape = f"d{c.channels}n{c.states}_b{batch or 'x'}t{tokens or 'x'}"
    return f"selective_scan_fused_simd_{shape}_{'past' if c.has_past else 'no_past'}_v{target.vector_bits}"
