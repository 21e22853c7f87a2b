"""Strategy ``fused_simt_chunks``: chunks of 16 tokens on GPUs, in two kernels.

    %factors = flow.dispatch @..._factors_...[%chunks](%states, %T, %query, %key, %decay, %beta)   all chunks at once
    %output, %present = flow.dispatch @..._chunks_...[%states](%states, %T, %query, %key, %value, %past, %factors)

The recurrence waits for a sum over threads at every token, or every few; here a chunk waits once, and what does not
depend on the state is computed beforehand, in parallel (``simt_chunk_factors``, then ``simt_chunk_state`` with the
maths). All arithmetic is f32 and decays are multiplied, never divided, so it is as exact as the recurrence. Decays that
grow by more than e^80 in a chunk make it go through token by token.

Legal: on GPUs with subgroups of 8 threads or more, decays per head, one query head a state, dk a multiple of 32 and dv
of 16, and where the workgroup's memory holds a chunk. Cost: 3 dk dv + 32 dv multiply-adds a token and head, every input
once a tile of 16 columns. Source: NUMERICS sections 1 and 2 (substitution).

T is a number that the kernels are given, known or not: entry points of several sizes share them. All that they know of
it is whether it is a number of whole chunks, so that nothing has to be cut short.
"""

from __future__ import annotations

from dataclasses import replace

from iree.compiler import ir

from ..emit.simt_kernel import Group
from ..op import LoweringContext
from ..select import Legality, No, OtherMachine, Yes
from ..target import Target
from .chunk_dispatches import ChunkKernels, emit_chunks
from .contract import LinearAttention
from .operands import Operands, kernel_name
from .simt_chunk_factors import LANES, THREADS, Factors
from .simt_chunk_operands import CHUNK, COLUMNS, VECTORS, WIDTH, ChunkPlan, matrices
from .simt_chunk_state import Chunks

_MAX_VALUES = 64  # of the state for a thread
_PLAN_COLUMNS = 2  # a load from the workgroup's memory costs as much as several multiply-adds


def is_legal(contract: LinearAttention, target: Target) -> Legality:
    """Where a column lies over 8 threads of a subgroup."""
    c = contract
    if not target.is_gpu:
        return OtherMachine(f"{target.name} is not a GPU")
    if target.subgroup_size < LANES or target.subgroup_size > THREADS:
        return No(f"{target.name} is compiled for without subgroups of {LANES} threads or more")
    if c.decay == "key":
        return No("decays per key cannot be applied to sums")
    if c.rows > 1:
        return No(f"{c.rows} query heads read one state")
    if c.dk % (WIDTH * LANES) or c.dv % COLUMNS:
        return No(f"a {c.dk}x{c.dv} state does not divide into {WIDTH * LANES}x{COLUMNS}")
    p = plan_for(c, target)
    if c.dk // p.lanes * p.columns > _MAX_VALUES or p.threads % p.subgroup:
        return No(f"{p.threads} threads, {p.subgroup} a subgroup, cannot hold {COLUMNS} columns of {c.dk}")
    if _memory(c) > target.workgroup_memory:
        return No(f"{_memory(c)} bytes of the workgroup's memory, more than {target.workgroup_memory}")
    return Yes()


def plan_for(c: LinearAttention, target: Target) -> ChunkPlan:
    """As many threads a column as divide it."""
    lanes = 2 * LANES if target.subgroup_size >= 2 * LANES and c.dk % (WIDTH * 2 * LANES) == 0 else LANES
    return ChunkPlan(lanes, _PLAN_COLUMNS, target.subgroup_size)


def _memory(c: LinearAttention) -> int:
    """Bytes of the workgroup's memory of the second kernel."""
    updates = CHUNK * (COLUMNS + 1) * (2 if c.has_delta else 1)
    return 4 * (2 * CHUNK * c.dk + matrices(c) + VECTORS + updates)


def emit_linear_attention_fused_simt_chunks(
    context: LoweringContext, contract: LinearAttention, x: Operands
) -> list[ir.Value]:
    """Emit output and present state."""
    b, c, p = context.builder, contract, plan_for(contract, context.target)
    whole = isinstance(x.tokens, int) and x.tokens > 0 and x.tokens % CHUNK == 0
    tokens = b.index(x.tokens)
    kernels = ChunkKernels(
        name=kernel_name(c, replace(x, tokens=tokens), f"g{p.subgroup}" + ("_whole" if whole else "")),
        chunk=CHUNK,
        record=matrices(c) + VECTORS,
        factors_group=Group(THREADS, p.subgroup),
        factors=lambda k, states, given: Factors(k, c, states, given, whole=whole).emit(),
        group=Group(p.threads, p.subgroup),
        tiles=c.dv // COLUMNS,
        chunks=lambda k, states, given: Chunks(k, c, p, states, given, whole=whole).emit(),
    )
    return emit_chunks(context, c, x, b.mul(x.batch, c.kv_heads), tokens, kernels)
