"""The contract of GatherBlockQuantized (com.microsoft): rows of a table whose weights are quantised block by block.

    output[i..., l..., k] = (q[indices[i...], l..., k] - zero_point) * scale      one scale a block of K; else 0

The table is [D, L..., K * bits / 8] bytes, low bits first: with one L of blocks, a MatMulNBits weight in another shape.
ONNX's 4-bit types and other axes do not come here: the frontend rewrites the former (``pack_int4``).
Source: ONNX Runtime 1.32, schema GatherBlockQuantized-1 and contrib_ops/cpu/quantization/gather_block_quantized.cc.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import float_input, only_attributes, require_dtype, require_shape
from ..node import Node, TensorSpec


@dataclass(frozen=True)
class GatherBlockQuantized:
    """Contract.

    Attributes:
        where: The node, as errors name it.
        data: [D, L..., bytes] of i8, static.
        indices: Of any shape, i32 or i64; negative ones count from the end.
        dtype: Type of the scales and of the output.
        bits: Bits of a weight.
        block_size: Weights along the last axis that share a scale.
        with_zero_points: Whether input 3 is there, packed like the weights; the default is 2 ** (bits - 1).
    """

    where: str
    data: TensorSpec
    indices: TensorSpec
    dtype: str
    bits: int
    block_size: int
    with_zero_points: bool

    @property
    def rows(self) -> int:
        """D, what the indices count."""
        return self.data.shape[0] or 0

    @property
    def inner(self) -> int:
        """Rows of K weights that one index stands for."""
        return math.prod(size or 0 for size in self.data.shape[1:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of K weights."""
        return self.data.shape[-1] or 0

    @property
    def depth(self) -> int:
        """K."""
        return self.row_bytes * 8 // self.bits

    @property
    def blocks(self) -> int:
        """Scales of K weights."""
        return -(-self.depth // self.block_size)

    @property
    def default_zero(self) -> float:
        """The zero point where the node has none."""
        return float(1 << (self.bits - 1))


def parse(node: Node) -> GatherBlockQuantized:
    """Check the node; see the contract."""
    only_attributes(node, "bits", "block_size", "gather_axis", "quantize_axis")
    data, indices, scales = node.required(0, "data"), node.required(1, "indices"), float_input(node, 2, "scales")
    bits, block_size = node.attr("bits", 4), node.attr("block_size", 128)
    require_dtype(node, "data", data, "i8")
    require_dtype(node, "indices", indices, "i64", "i32")
    if bits not in (2, 4, 8):
        raise node.error("attribute 'bits'", got=bits, expected="2, 4 or 8")
    if block_size < 16 or block_size & (block_size - 1):
        raise node.error("attribute 'block_size'", got=block_size, expected="a power of two from 16 on")
    if data.rank < 2 or None in data.shape or 0 in data.shape:
        raise node.error("input 'data'", got=data, expected="a table of two axes or more, its sizes known and not 0")
    _check_axis(node, "gather_axis", 0, 0, data.rank)
    _check_axis(node, "quantize_axis", 1, data.rank - 1, data.rank)
    lead = data.shape[:-1]
    blocks = -(-((data.shape[-1] or 0) * 8 // bits) // block_size)
    require_shape(node, "scales", scales, (*lead, blocks))
    zeros = node.input(3)
    if zeros is not None:
        require_dtype(node, "zero_points", zeros, "i8")
        require_shape(node, "zero_points", zeros, (*lead, -(-blocks * bits // 8)))
    return GatherBlockQuantized(
        where=node.where,
        data=data,
        indices=indices,
        dtype=scales.dtype,
        bits=bits,
        block_size=block_size,
        with_zero_points=zeros is not None,
    )


def _check_axis(node: Node, name: str, default: int, wanted: int, rank: int) -> None:
    axis = node.attr(name, default)
    if not -rank <= axis < rank or axis % rank != wanted:
        raise node.error(
            f"attribute '{name}'",
            got=axis,
            expected=wanted,
            hint="rows are gathered along the first axis and quantised along the last, as exporters write it",
        )


def output_types(contract: GatherBlockQuantized) -> Sequence[TensorSpec]:
    """The output's type."""
    return [TensorSpec((*contract.indices.shape, *contract.data.shape[1:-1], contract.depth), contract.dtype)]
