"""Strategy ``fused_term_chunks``: chunks of 32 tokens on matrix units where keys and queries enter in terms of f16.

    %factors = flow.dispatch @..._factors_...[%chunks](%streams, %T, %query, %key, %decay, %beta)  all chunks at once
    %output, %present = flow.dispatch @..._chunks_...[%streams](%streams, %T, %query, %key, %value, %past, %decay,
                                                                %factors)

Decays of a key dimension cannot be applied to sums over the key dimensions, as ``fused_mma_chunks`` applies those of a
head: keys and queries are multiplied with them first (``term_chunk_factors``, by halving, so that nothing overflows),
and what comes of it no longer is a number of 16 bits. So it enters the products in two terms of f16, queries, which
lead to outputs only, in one. The same does for activations of f32, whatever their decays: two terms of all of it, where
``--math fast`` allows that. State, decays, inverse and sums are f32. A chunk that f16 has no range for goes through
token by token, in f32.

Legal: on GPUs with matrix units, decays per key or f32 with ``--math fast``, a state of 64 or 128 rows whose columns
divide into 16. Cost, a chunk of 32 tokens and 16 columns of 128 rows: 136 products of 16 x 16 x 16, 47 KB of loads.
Source: NUMERICS sections 1, 2 (substitution, then a merge), 3 (halving) and 5.
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
from .mma_chunk_operands import CHUNK, SIDE, SUBGROUP, WORDS, stride_unit, why_no_matrices
from .operands import Operands, kernel_name
from .term_chunk_factors import TermFactors
from .term_chunk_operands import plan_for
from .term_chunk_state import TermChunks
from .term_head_factors import TermHeadFactors

_ROWS = (64, 128)  # of the state: two or four tokens a thread of the first kernel


def is_legal(contract: LinearAttention, target: Target) -> Legality:
    """Where subgroups multiply matrices, and whole keys and queries do not do as factors."""
    c = contract
    if reason := why_no_matrices(target):
        return reason
    if c.dtype == "f32" and not target.fast_math:
        return No("f32 by terms of 16 bits is for --math fast")
    if c.dtype != "f32" and c.decay != "key":
        return No(f"keys and queries of {c.dtype} without decays of their own are factors as they are")
    if c.dk not in _ROWS or c.dv % SIDE:
        return No(f"a {c.dk}x{c.dv} state is not one of {' or '.join(map(str, _ROWS))} x whole {SIDE}s")
    p = plan_for(c, stride_unit(target))
    need = max(p.memory(c), _factors(c).bytes_of(p))
    if need > target.workgroup_memory:
        return No(f"{need} bytes of the workgroup's memory, more than {target.workgroup_memory}")
    if max(p.threads, p.factor_threads) > target.max_threads:
        return No(f"{max(p.threads, p.factor_threads)} threads, more than {target.max_threads}")
    return Yes()


def _factors(c: LinearAttention) -> type[TermFactors] | type[TermHeadFactors]:
    """What emits the first kernel."""
    return TermFactors if c.decay == "key" else TermHeadFactors


def emit_linear_attention_fused_term_chunks(
    context: LoweringContext, contract: LinearAttention, x: Operands
) -> list[ir.Value]:
    """Emit output and present state."""
    b, c, p = context.builder, contract, plan_for(contract, stride_unit(context.target))
    tokens = b.index(x.tokens)
    kernels = ChunkKernels(
        name=kernel_name(c, replace(x, tokens=tokens), f"term_{p}"),
        chunk=CHUNK,
        record=p.record * WORDS,
        factors_group=Group(p.factor_threads, SUBGROUP),
        factors=lambda k, streams, given: _factors(c)(k, c, p, streams, given).emit(),
        group=Group(p.threads, SUBGROUP),
        tiles=c.dv // p.columns,
        chunks=lambda k, streams, given: TermChunks(k, c, p, streams, given).emit(),
        reads_decay=c.decay == "key",
    )
    return emit_chunks(context, c, x, b.mul(x.batch, c.out_heads), tokens, kernels)
