"""Strategy ``fused_mma_chunks``: chunks of 32 tokens on GPUs with the products on matrix units, in two kernels.

    %factors = flow.dispatch @..._factors_...[%chunks](%streams, %T, %query, %key, %decay, %beta)  all chunks at once
    %output, %present = flow.dispatch @..._mma_...[%streams](%streams, %T, %query, %key, %value, %past, %factors)

``mma_chunk_factors`` and ``mma_chunk_state`` have the maths. Keys and queries enter the products exactly; what is
computed does so in two terms of f16 (but ``mix``, in one), which keeps beta = 2 and equal keys within the tolerances of
f16: one term gives errors of 1.2e-3 and more (NUMERICS section 5, and a prototype of this arithmetic). State, decays,
inverse and sums are f32. A chunk that f16 has no range for goes through token by token, in f32. Where several query
heads read one state, each computes it: with few heads that fills the device, too.

Legal: f16 and bf16 on GPUs with matrix units, decays per head, a state of 64 or 128 rows whose columns divide into 16.
Cost, a chunk of 32 tokens and 32 columns of 128 rows: 180 products of 16 x 16 x 16, 27 KB of loads, 9 barriers.
Source: NUMERICS sections 1, 2 (substitution, then a merge) and 5.
"""

from __future__ import annotations

from dataclasses import replace

from iree.compiler import ir

from ..emit.simt_kernel import Group
from ..op import LoweringContext
from ..select import Legality, No, Yes
from ..target import Target
from .chunk_dispatches import ChunkKernels, emit_chunks
from .contract import LinearAttention
from .mma_chunk_factors import THREADS, MmaFactors
from .mma_chunk_operands import (
    CHUNK,
    SIDE,
    SUBGROUP,
    WORDS,
    MmaPlan,
    record,
    stride_unit,
    why_no_matrices,
    why_not_as_they_are,
)
from .mma_chunk_state import MmaChunks
from .operands import Operands, kernel_name

_ROWS = 64  # of the state: whole matrices for every subgroup
_ENOUGH_GROUPS = 100  # workgroups that keep a large GPU busy


def is_legal(contract: LinearAttention, target: Target) -> Legality:
    """Where subgroups multiply matrices, for 16 bits."""
    c = contract
    if reason := why_no_matrices(target) or why_not_as_they_are(c):
        return reason
    if c.dk % _ROWS or c.dv % SIDE:
        return No(f"a {c.dk}x{c.dv} state does not divide into {_ROWS}x{SIDE}")
    p = plan_for(c, target)
    need = max(p.memory(c), MmaFactors.memory(c, p))
    if need > target.workgroup_memory:
        return No(f"{need} bytes of the workgroup's memory, more than {target.workgroup_memory}")
    if max(p.threads, THREADS) > target.max_threads:
        return No(f"{max(p.threads, THREADS)} threads, more than {target.max_threads}")
    return Yes()


def plan_for(c: LinearAttention, target: Target) -> MmaPlan:
    """Wide parts of the state where there are enough of them; they read keys and queries less often."""
    unit = stride_unit(target)
    wide = MmaPlan(c.dk, 2 * SIDE, unit)
    groups = (c.batch or 1) * c.out_heads * (c.dv // wide.columns)
    fits = c.dv % wide.columns == 0 and wide.memory(c) <= target.workgroup_memory
    return wide if fits and groups >= _ENOUGH_GROUPS else MmaPlan(c.dk, SIDE, unit)


def emit_linear_attention_fused_mma_chunks(
    context: LoweringContext, contract: LinearAttention, x: Operands
) -> list[ir.Value]:
    """Emit output and present state."""
    c, p = contract, plan_for(contract, context.target)
    tokens = context.builder.index(x.tokens)  # a number: entry points of several sizes share the kernels
    kernels = ChunkKernels(
        name=kernel_name(c, replace(x, tokens=tokens), f"mma_{p}"),
        chunk=CHUNK,
        record=record(c) * WORDS,
        factors_group=Group(THREADS, SUBGROUP),
        factors=lambda k, streams, tokens: MmaFactors(k, c, p, streams, tokens).emit(),
        group=Group(p.threads, SUBGROUP),
        tiles=c.dv // p.columns,
        chunks=lambda k, streams, tokens: MmaChunks(k, c, p, streams, tokens).emit(),
    )
    return emit_chunks(context, c, x, context.builder.mul(x.batch, c.out_heads), tokens, kernels)
