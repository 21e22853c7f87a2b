"""Strategy ``fused_warp_chunks``: chunks of 32 tokens on NVIDIA GPUs by ``mma.sync``, the state in a warp's registers.

    %factors = flow.dispatch @..._factors_...[%chunks](%streams, %T, %query, %key, %decay, %beta)  all chunks at once
    %output, %present = flow.dispatch @..._chunks_...[%streams](%streams, %T, %query, %key, %value, %past, %factors)

The arithmetic of ``fused_mma_chunks``, which is its portable form; here a warp knows where its elements lie, keeps
eight columns of some rows of the state in registers through all products. What is summed over rows four warps share,
each for eight of the tokens, while the next chunk is being copied (``warp_chunk_state``). Terms are of the type of the
activations, so bf16 has all the range of f32.

Legal: f16 and bf16 on CUDA from sm_80 on, decays per head, a state of 64, 128 or 256 rows whose columns divide into 16.
Cost, a chunk of 32 tokens and 8 columns of 128 rows: 112 products of 16 x 8 x 16, three meetings of four warps.
Source: NUMERICS sections 1, 2 (substitution, then a merge) and 5; PTX ISA, warp-level matrix instructions.
"""

from __future__ import annotations

from dataclasses import replace

from iree.compiler import ir

from ..emit.simt_kernel import Group
from ..emit.warp import LANES
from ..op import LoweringContext
from ..select import Legality, No, OtherMachine, Yes
from ..target import Target
from .chunk_dispatches import ChunkKernels, emit_chunks
from .contract import LinearAttention
from .mma_chunk_factors import THREADS, MmaFactors
from .mma_chunk_operands import CHUNK, SIDE, WORDS, MmaPlan, record, stride_unit, why_not_as_they_are
from .operands import Operands, kernel_name
from .warp_chunk_state import COLUMNS, WarpChunks, WarpPlan

_ROWS = 64  # of the state: eight chunks, whose places xor the token's number are eight
_GROUPS = 2  # of eight columns, in a workgroup
_PARTS = 4  # warps that share those
_SMALL = 128  # rows, of which two chunks of tokens leave memory for what four warps tell each other
_ENOUGH_GROUPS = 100  # workgroups that keep a large GPU busy
_AT_ONCE = 132  # multiprocessors of an H100, of which one has the registers for 16 such warps


def is_legal(contract: LinearAttention, target: Target) -> Legality:
    """Where warps multiply matrices that they hold, for 16 bits."""
    c = contract
    if not target.is_gpu:
        return OtherMachine(f"{target.name} is not a GPU")
    if not target.copy_memory:
        return No(f"{target.name} is compiled for without mma.sync of 16 bits (CUDA, sm_80)")
    if reason := why_not_as_they_are(c):
        return reason
    if c.dk % _ROWS or c.dv % (_GROUPS * COLUMNS):
        return No(f"a {c.dk}x{c.dv} state does not divide into {_ROWS}x{_GROUPS * COLUMNS}")
    need = plan_for(c).all_memory
    if need > target.copy_memory:
        return No(f"{need} bytes of the workgroup's memory, more than {target.copy_memory}")
    need = MmaFactors.memory(c, _factors_plan(c, target))
    if need > target.workgroup_memory:
        return No(f"{need} bytes of the workgroup's memory, more than {target.workgroup_memory}")
    return Yes()


def plan_for(c: LinearAttention) -> WarpPlan:
    """Twice the columns in a workgroup where there are enough of those; they share keys and queries.

    Of more workgroups than run at once with four warps a group, each has two, so that twice as many do. On an H100, us
    of this kernel for T=4096: 16 heads 163 in groups of two and 245 of four, 32 heads 256 and 247; 64 heads of four
    groups 492 by four warps and 376 by two.
    """
    if c.dk > _SMALL:
        return WarpPlan(c.dk, _GROUPS, _PARTS // 2, c.has_delta)
    wide = 2 * _GROUPS * COLUMNS
    count = (c.batch or 1) * c.out_heads * (c.dv // wide)
    is_wide = c.dv % wide == 0 and count >= _ENOUGH_GROUPS
    parts = _PARTS // 2 if is_wide and count > _AT_ONCE else _PARTS
    return WarpPlan(c.dk, 2 * _GROUPS if is_wide else _GROUPS, parts, c.has_delta)


def _factors_plan(c: LinearAttention, target: Target) -> MmaPlan:
    return MmaPlan(c.dk, SIDE, stride_unit(target))


def emit_linear_attention_fused_warp_chunks(
    context: LoweringContext, contract: LinearAttention, x: Operands
) -> list[ir.Value]:
    """Emit output and present state."""
    c, p, first = contract, plan_for(contract), _factors_plan(contract, context.target)
    tokens = context.builder.index(x.tokens)  # a number: entry points of several sizes share the kernels
    kernels = ChunkKernels(
        name=kernel_name(c, replace(x, tokens=tokens), f"warp_{p}"),
        chunk=CHUNK,
        record=record(c) * WORDS,
        factors_group=Group(THREADS, LANES),
        factors=lambda k, streams, tokens: MmaFactors(k, c, first, streams, tokens, half=c.dtype).emit(),
        group=Group(p.threads, LANES),
        tiles=c.dv // (p.groups * COLUMNS),
        chunks=lambda k, streams, tokens: WarpChunks(k, c, p, streams, tokens).emit(),
    )
    return emit_chunks(context, c, x, context.builder.mul(x.batch, c.out_heads), tokens, kernels)
