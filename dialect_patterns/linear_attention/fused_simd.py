"""Strategy ``fused_simd``: the whole operator as one hand-made CPU kernel.

    u  = beta * (v - k a S),  S <- a S + k^T u,  o = scale * q S         a = exp(g)

    hal.executable.source private @linear_attention_gated_delta_fused_simd_...      one for all equal nodes
    %out, %state = flow.dispatch @...[B](B?, T?, %query, %key, %value, %past, %decay, %beta)

A workgroup does one key/value head, or some of its columns where heads are few. A call of up to four tokens reads the
past state and writes the present one (``simd_direct``); a longer one keeps the state in the caches and goes over it in
chunks of up to 16 tokens (``simd_blocks``, with the maths), in one kernel for all sizes. ``simd_tiling`` has the sizes.

Legal: on CPUs, for head sizes that are multiples of 4 and keys and queries that fit on the stack. Cost per token and
head: 3.4 dk dv multiply-adds (gated_delta, d=128), state read and written once a call. Source: NUMERICS sections 1, 6.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from iree.compiler import ir

from ..emit.builder import Size
from ..emit.dispatch import Kernel, dispatch
from ..emit.kernel_text import Index, KernelText
from ..machines import for_machines
from ..node import Dim, TensorSpec
from ..op import LoweringContext
from ..select import Legality, No, OtherMachine, Yes
from ..target import Target
from .contract import LinearAttention, output_specs
from .simd_blocks import BlocksBody
from .simd_direct import DirectBody
from .simd_tiling import PAIR_TOKENS, Blocks, Direct, tiling


def is_legal(contract: LinearAttention, target: Target) -> Legality:
    """On CPUs, for head sizes that vectors divide."""
    if target.is_gpu or not target.vector_bits:
        return (OtherMachine if target.is_gpu else No)("the target is not a CPU with vectors")
    for found in (tiling(_shared(contract), machine.vector_bits) for machine in target.machines):
        if isinstance(found, str):
            return No(found)
    return Yes()


def describe(contract: LinearAttention, target: Target) -> str:
    """What the report says about it."""
    x = tiling(_shared(contract), target.machines[0].vector_bits)
    assert isinstance(x, Direct | Blocks)
    return f"one kernel: {x.tokens} tokens a pass over {x.columns} columns, vectors of {x.lanes}"


def emit_linear_attention_fused_simd(
    context: LoweringContext, contract: LinearAttention, inputs: list[ir.Value | None], batch: Size, tokens: Size
) -> list[ir.Value]:
    """Emit output and present state; ``inputs`` have the contract's types."""
    shared = _shared(contract)
    kernel = for_machines(context.target, lambda machine: linear_attention_kernel(shared, machine))
    given = [value for value in inputs if value is not None]
    return dispatch(context.builder, kernel, given, batch, tokens)[:2]


def _shared(contract: LinearAttention) -> LinearAttention:
    """The contract without its number of tokens, where calls of all sizes take one kernel."""
    few = contract.tokens is not None and contract.tokens <= PAIR_TOKENS
    return contract if few else replace(contract, tokens=None)


def linear_attention_kernel(contract: LinearAttention, target: Target) -> Kernel:
    """The kernel of a contract; where it has a third result, that is scratch memory."""
    x = tiling(contract, target.vector_bits)
    assert isinstance(x, Direct | Blocks)
    groups = contract.dv // x.columns
    outputs, output_axes = list[TensorSpec](output_specs(contract)), ["BT_", "B___"]
    if isinstance(x, Blocks):
        shape = (contract.batch, contract.kv_heads * groups, x.scratch_rows(contract), x.width)
        outputs.append(TensorSpec(shape, "f32"))
        output_axes.append("B___")

    def write(k: KernelText, batch: Index, tokens: Index, memrefs: Sequence[str]) -> None:
        del batch
        if isinstance(x, Blocks):
            BlocksBody(k, contract, x, tokens, memrefs).write()
        else:
            DirectBody(k, contract, x, memrefs).write()

    axes = ("BT_", "BT_", "BT_", "B___", "BT_", "BT_")
    given = [(s, a) for s, a in zip(contract.input_specs, axes, strict=True) if s is not None]
    return Kernel(
        name=_symbol(contract, target),
        inputs=tuple(spec for spec, _ in given),
        outputs=tuple(outputs),
        axes=(*(term for _, term in given), *output_axes),
        workgroups=(groups, contract.kv_heads),
        write=write,
    )


def _symbol(c: LinearAttention, target: Target) -> str:
    def dim(size: Dim) -> str:
        return "x" if size is None else str(size)

    state = f"{c.state_dtype}_state" if c.has_past else f"no_{c.state_dtype}_state"
    gates = "".join(f"_{kind}_{name}" for kind, name in ((c.decay, "decay"), (c.beta, "beta")) if kind != "none")
    heads = f"q{c.q_heads}k{c.k_heads}v{c.kv_heads}_{c.dk}x{c.dv}"
    lead = f"b{dim(c.batch)}t{dim(c.tokens)}"
    ends = f"{heads}_{lead}_s{c.scale:.9g}_v{target.vector_bits}"
    return re.sub(r"\W", "_", f"linear_attention_{c.rule}_fused_simd_{c.dtype}_{state}{gates}_{ends}")
