"""Attention of many queries on the matrix units of a GPU: one kernel that goes over the keys that are seen, by tiles.

    for each tile of 32 keys:  s  = softcap(scale * q k^T), -inf where hidden     32 x 32, by matrices of 16 x 16
                               m' = max(m, max s),  p = exp(s - m'),  l = exp(m - m') l + sum p
                               o  = exp(m - m') o + p v                           by matrices, in registers
    y = o / l

    %y = flow.dispatch @attention_fused_mma_...[%heads](%first, %q, %k, %v, %bias?, %sink?)

A workgroup of four subgroups does 32 of the R rows of a key head (its query heads and their tokens): scores and factors
pass through its memory, where rows are known; a subgroup holds 16 rows of half the outputs' columns. Keys and values
take turns in one tile of the memory, the next ones under way in registers. Queries, keys, values and p are f16, scores,
maxima and all sums f32. Parts of the keys and their join are those of ``fused_simt_tiles``.

A hidden key weighs 0, and 0 times NaN or inf is NaN: of a tile that not all rows see in whole, values that are no
numbers are taken out of the product, and added by themselves to the rows that see them.

Legal: for f16 on GPUs with such products and subgroups of 32, for 9 rows a key head or more, causal at one position, if
16 divides dk and 32 divides dv. Source: FlashAttention-2 (Dao 2023).
"""

from __future__ import annotations

from iree.compiler import ir

from ..emit.builder import Builder, Size
from ..emit.scalar import Scalar
from ..emit.simt_kernel import MAX_GROUPS, Group, Kernel
from ..select import Legality, No, OtherMachine, Yes
from ..target import Target
from .core import AttentionShape
from .mma_kernel import MatrixAttention
from .mma_places import ACROSS, QUERIES, SIDE, SUBGROUP, THREADS, places_of
from .simt_call import why_not_by_position
from .simt_dispatch import Tiled, emit_tiled

_LEAST_ROWS = 9
_MOST_COLUMNS = 256  # a subgroup holds 16 rows of half of them


def is_legal(shape: AttentionShape, target: Target) -> Legality:
    """Where subgroups of 32 multiply matrices, for f16."""
    heads = shape.heads
    if not target.is_gpu:
        return OtherMachine(f"{target.name} is not a GPU")
    if types := {shape.dtype, shape.value_dtype or shape.dtype} - {"f16"}:
        return No(f"{' and '.join(sorted(types))}, not f16")
    if target.matrix_stride is None or target.subgroup_size != SUBGROUP or target.max_threads < THREADS:
        return No(f"{target.name} is compiled for without products of 16x16 matrices by subgroups of {SUBGROUP}")
    if reason := why_not_by_position(shape):
        return No(reason)
    rows = heads.group * (shape.length or 0)
    if rows < _LEAST_ROWS or not heads.batch:
        return No(f"{rows} queries a key head, less than {_LEAST_ROWS}")
    if heads.dk % SIDE or heads.dv % (ACROSS * SIDE) or not heads.dk or not 0 < heads.dv <= _MOST_COLUMNS:
        return No(f"head sizes {heads.dk} and {heads.dv} are not multiples of {SIDE} and {ACROSS * SIDE}, or large")
    if heads.batch * heads.kv > MAX_GROUPS:
        return No(f"more than {MAX_GROUPS} key heads")
    need = 16 * places_of(heads.dk, heads.dv, target).chunks + 4 * (2 * THREADS + 1)
    if need > target.workgroup_memory:
        return No(f"{need} bytes of the workgroup's memory, more than {target.workgroup_memory}")
    return Yes()


def emit_attention_fused_mma(
    b: Builder, target: Target, q: ir.Value, k: ir.Value, v: ir.Value, *,
    first: Size, scale: float, softcap: float, left: int | None, sink: ir.Value | None,
    bias: ir.Value | None, heads: int | None,
) -> ir.Value:  # fmt: skip
    """As :func:`~.simt_dispatch.emit_tiled`, whose parameters these are."""

    def body(kernel: Kernel, call: Tiled, given: Scalar) -> None:
        MatrixAttention(kernel, call, given, places_of(call.c.dk, call.c.dv, target)).emit()

    return emit_tiled(
        "fused_mma", Group(THREADS, SUBGROUP), QUERIES, body, b, target, q, k, v,
        first=first, scale=scale, softcap=softcap, left=left, sink=sink, bias=bias, heads=heads,
    )  # fmt: skip
