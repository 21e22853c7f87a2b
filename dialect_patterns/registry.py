"""All operators that our patterns lower, by domain and name."""

from __future__ import annotations

from functools import cache

from . import choose, gated_columns, near_ids, next_token, not_finite, split_columns
from .attention import group_query as group_query_attention
from .attention import op as attention
from .attention import step as attention_step
from .causal_conv import op as causal_conv
from .causal_conv import parts as causal_conv_parts
from .draw_token import op as draw_token
from .experts import gated_add
from .experts import op as experts
from .gather_block_quantized import op as gather_block_quantized
from .gather_columns import op as gather_columns
from .linear_attention import convolved as convolved_linear_attention
from .linear_attention import gate as linear_attention_gate
from .linear_attention import gated as gated_linear_attention
from .linear_attention import op as linear_attention
from .mat_mul import head_normed, joined, normed
from .mat_mul import op as mat_mul
from .mat_mul_n_bits import joined as joined_mat_mul_n_bits
from .mat_mul_n_bits import op as mat_mul_n_bits
from .norms import (
    gated_rms_norm,
    lp_normalization,
    rms_normalization,
    simplified_layer_normalization,
    skip_simplified_layer_normalization,
    softmax,
)
from .op import Op
from .rotary import m_rotary_embedding, rotary_embedding, rotated_heads
from .selective_scan import op as selective_scan
from .tensor_scatter import op as tensor_scatter

OPS: tuple[Op, ...] = (
    *linear_attention.OPS,
    *causal_conv.OPS,
    *causal_conv_parts.OPS,
    *attention.OPS,
    *group_query_attention.OPS,
    *attention_step.OPS,
    *experts.OPS,
    *gated_add.OPS,
    *gated_rms_norm.OPS,
    *gather_block_quantized.OPS,
    *gather_columns.OPS,
    *linear_attention_gate.OPS,
    *gated_linear_attention.OPS,
    *convolved_linear_attention.OPS,
    *lp_normalization.OPS,
    *m_rotary_embedding.OPS,
    *mat_mul_n_bits.OPS,
    *joined_mat_mul_n_bits.OPS,
    *rotary_embedding.OPS,
    *rotated_heads.OPS,
    *simplified_layer_normalization.OPS,
    *skip_simplified_layer_normalization.OPS,
    *rms_normalization.OPS,
    *selective_scan.OPS,
    *tensor_scatter.OPS,
    *softmax.OPS,
    *mat_mul.OPS,
    *joined.OPS,
    *normed.OPS,
    *head_normed.OPS,
    *choose.OPS,
    *near_ids.OPS,
    *next_token.OPS,
    *not_finite.OPS,
    *draw_token.OPS,
    *split_columns.OPS,
    *gated_columns.OPS,
)


@cache
def find_op(domain: str, op_type: str, version: int) -> Op | None:
    """The module for an operator: the newest entry not newer than ``version``, or None."""
    entries = [op for op in OPS if op.domain == domain and op.op_type == op_type and op.since <= version]
    return max(entries, key=lambda op: op.since, default=None)
