"""Softmax attention (Attention, GroupQueryAttention): which strategy lowers a node, and lowering with it."""

from __future__ import annotations

from dataclasses import replace

from iree.compiler import ir

from ..emit.wide_bf16 import narrowed, widened
from ..op import Choice, LoweringContext, LoweringOptions
from ..select import Legality, No, Strategy, Yes, always, not_emitted, select, wherever_legal
from ..target import Target
from . import fused_amx
from .core import AttentionShape, Visibility, as_bias, emit_attention, join_heads, split_heads
from .fused_mma import emit_attention_fused_mma
from .fused_mma import is_legal as mma_is_legal
from .fused_simd import emit_attention_fused_simd
from .fused_simd import is_legal as simd_is_legal
from .fused_simt import emit_attention_fused_simt
from .fused_simt import is_legal as simt_is_legal
from .simt_tiles import emit_attention_fused_simt_tiles
from .simt_tiles import is_legal as tiles_is_legal


def _tiles_are_preferred(shape: AttentionShape, target: Target, options: LoweringOptions) -> Legality:
    """Unless IREE has matrix units for the products; see ``attention_simt_tiles`` for the times."""
    del options
    if target.matrix_units and shape.dtype != "f32":
        return No("IREE's products on the matrix units are faster over a long cache")
    return Yes("one kernel over tiles of the keys that are seen")


STRATEGIES = (
    Strategy(
        "fused_amx", fused_amx.is_legal, wherever_legal("one kernel over the keys that are seen, on the matrix unit")
    ),
    Strategy("fused_simd", simd_is_legal, wherever_legal("one kernel over the keys that are seen")),
    Strategy("fused_simt", simt_is_legal, wherever_legal("two kernels over the filled rows")),
    Strategy("fused_mma", mma_is_legal, wherever_legal("one kernel on the matrix units over tiles of the keys seen")),
    Strategy("fused_simt_tiles", tiles_is_legal, _tiles_are_preferred),
    Strategy("linalg", always, wherever_legal("portable, over all rows")),
)

GPU_KERNELS = {"fused_simt": emit_attention_fused_simt, "fused_simt_tiles": emit_attention_fused_simt_tiles}


def choose(shape: AttentionShape, where: str, target: Target) -> Choice:
    """The strategy for a node; what is forced for the state operators says nothing here."""
    heads = shape.heads
    choice = select(STRATEGIES, shape, target, LoweringOptions(), where)
    return replace(choice, rule="softmax", heads=f"{heads.q}/{heads.kv} x {heads.dk}x{heads.dv}")


def emit_softmax_attention(
    context: LoweringContext,
    shape: AttentionShape,
    where: str,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    *,
    scale: float,
    softcap: float,
    visibility: Visibility,
    mask: ir.Value | None,
    sink: ir.Value | None = None,
    flat: bool = True,
) -> ir.Value:
    """Attention of ``q`` over the visible rows of ``k`` and ``v`` with the chosen strategy.

    Args:
        context: Builder and target.
        shape: What the strategy is chosen by.
        where: The node, as errors name it.
        q: [B, T, Hq * dk], or [B, Hq, T, dk] if not ``flat``.
        k: [B, Hkv, S, dk].
        v: [B, Hkv, S, dv].
        scale: Factor on q . k.
        softcap: c in c * tanh(s / c), 0 for none.
        visibility: Which keys are visible by position.
        mask: From :func:`~.core.align_mask`, or None.
        sink: What the softmax of each query head sees beside its keys [Hq], or None.
        flat: The layout of ``q`` and of the result.

    Returns:
        [B, T, Hq * dv], or [B, Hq, T, dv]; of the type of ``q``. A query that sees no key gives zeros.
    """
    b, target, heads = context.builder, context.target, shape.heads
    strategy = choose(shape, where, target).strategy
    if strategy in ("fused_simd", "fused_amx"):
        rows, kernel_of = (fused_amx.UNIT_ROWS, fused_amx.kernel) if strategy == "fused_amx" else (None, None)
        y = emit_attention_fused_simd(
            b, target, q if flat else join_heads(b, q), k, v, heads,
            scale=scale, softcap=softcap, visibility=visibility, mask=mask, sink=sink,
            rows=rows, kernel_of=kernel_of,
        )  # fmt: skip
        return y if flat else split_heads(b, y, heads.q)
    if strategy == "fused_mma":
        return emit_attention_fused_mma(
            b, target, q, k, v, first=visibility.first, scale=scale, softcap=softcap, left=visibility.left, sink=sink,
            bias=None if mask is None else as_bias(b, mask), heads=heads.q if flat else None,
        )  # fmt: skip
    q = split_heads(b, q, heads.q) if flat else q
    if strategy in GPU_KERNELS:
        y = GPU_KERNELS[strategy](
            b, target, q, k, v, first=visibility.first, scale=scale, softcap=softcap, left=visibility.left, sink=sink,
            bias=None if mask is None else as_bias(b, mask),
        )  # fmt: skip
    elif strategy == "linalg":
        wide = target.is_gpu and not target.matrix_units  # IREE's own products in bf16 compile for units only
        if wide:
            q, k, v = (widened(b, value) for value in (q, k, v))
            mask, sink = (None if value is None else widened(b, value) for value in (mask, sink))
        most = target.limits.counts[0] if target.is_gpu else None
        y = emit_attention(
            b, q, k, v, heads, scale=scale, softcap=softcap, visibility=visibility, mask=mask, sink=sink, most=most
        )
        y = narrowed(b, y) if wide and shape.dtype == "bf16" else y
    else:
        raise not_emitted(strategy)
    return join_heads(b, y) if flat else y
