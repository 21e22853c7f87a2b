"""MRotaryEmbedding (com.microsoft): a rotary embedding whose columns follow positions in time, height or width.

``mrope_section`` says how many columns each stream has; ``mrope_layout`` whether they lie in three runs (0) or
interleaved (1: height at columns 1, 4, 7, ..., width at 2, 5, 8, ..., time elsewhere).
Source: ONNX Runtime 1.32, schema MRotaryEmbedding-1 and contrib_ops/cpu/bert/mrotary_embedding_helper.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from iree.compiler import ir

from ..checks import float_input, only_attributes, require_dtype, require_shape
from ..emit.builder import Builder
from ..emit.scalar import Scalar
from ..node import Node, TensorSpec
from ..op import MICROSOFT, LoweringContext, Op
from .rotary_embedding import (
    Lookup,
    Rotation,
    clamp_position,
    emit_rotation,
    parse_caches,
    parse_rotation,
    refuse_packed_batching,
)

_STREAMS = 3


@dataclass(frozen=True)
class Streams:
    """Which position stream a column follows.

    Attributes:
        sections: Columns of the time, height and width stream.
        interleaved: Whether the streams' columns alternate.
    """

    sections: tuple[int, int, int]
    interleaved: bool

    def __str__(self) -> str:
        return "x".join(map(str, self.sections)) + ("i" if self.interleaved else "")

    def of(self, column: Scalar) -> Scalar:
        """The stream of a column, both as index."""
        time, height, width = (Scalar.constant(i, "index") for i in range(_STREAMS))
        if self.interleaved:
            third = column % _STREAMS
            is_height = third.equals(1) & (column < _STREAMS * self.sections[1])
            is_width = third.equals(2) & (column < _STREAMS * self.sections[2])
            return is_height.select(height, is_width.select(width, time))
        is_time, is_height = column < self.sections[0], column < self.sections[0] + self.sections[1]
        return is_time.select(time, is_height.select(height, width))


@dataclass(frozen=True)
class MRotaryEmbedding:
    """Contract.

    Attributes:
        rotation: What is rotated.
        streams: Which position each column follows.
        scale: Multiplies cosines and sines.
    """

    rotation: Rotation
    streams: Streams
    scale: float


def parse(node: Node) -> MRotaryEmbedding:
    """Check the node; see the contract."""
    only_attributes(
        node,
        "interleaved",
        "is_packed_batching",
        "mrope_layout",
        "mrope_section",
        "num_heads",
        "rotary_embedding_dim",
        "scale",
    )
    refuse_packed_batching(node)
    x = float_input(node, 0, "input")
    position_ids = node.required(1, "position_ids")
    cos = parse_caches(node, 2, 3, x)
    rotation = parse_rotation(node, cos.shape[-1] if cos.rank else None)
    require_shape(node, "cos_cache", cos, (None, rotation.rotated // 2))
    tokens = x.shape[1] if x.rank == 3 else x.shape[2]
    require_dtype(node, "position_ids", position_ids, "i64", "i32")
    require_shape(node, "position_ids", position_ids, (_STREAMS, x.shape[0], tokens))
    sections = tuple(cast("list[int]", node.attr("mrope_section", list[object]())))
    if len(sections) != _STREAMS or min(sections) < 0 or sum(sections) != rotation.rotated // 2:
        expected = f"three counts with sum {rotation.rotated // 2}"
        raise node.error("attribute 'mrope_section'", got=list(sections), expected=expected)
    layout = node.attr("mrope_layout", 0)
    if layout not in (0, 1):
        raise node.error("attribute 'mrope_layout'", got=layout, expected="0 or 1")
    return MRotaryEmbedding(rotation, Streams(sections, layout == 1), node.attr("scale", 1.0))


def output_types(contract: MRotaryEmbedding) -> Sequence[TensorSpec]:
    """The outputs' types."""
    return [contract.rotation.x]


def lookup(
    b: Builder, contract: MRotaryEmbedding, operands: Sequence[ir.Value | None]
) -> tuple[ir.Value, ir.Value, Lookup]:
    """The cosine and sine inputs of a node, and what finds an element of them."""
    _, position_ids, cos, sin = operands
    assert position_ids is not None
    assert cos is not None
    assert sin is not None

    def find(cache: ir.Value, batch: Scalar, token: Scalar, column: Scalar) -> Scalar:
        position = b.load(position_ids, contract.streams.of(column), batch, token)
        value = b.load(cache, clamp_position(b, position, cache), column)
        return value if contract.scale == 1.0 else value.to("f32") * contract.scale

    return cos, sin, find


def lower(context: LoweringContext, contract: MRotaryEmbedding, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Two small tables and one elementwise loop."""
    x, (cos, sin, find) = operands[0], lookup(context.builder, contract, operands)
    assert x is not None
    return [emit_rotation(context.builder, contract.rotation, x, cos, sin, find)]


OPS = (Op(MICROSOFT, "MRotaryEmbedding", 1, parse, output_types, lower),)
