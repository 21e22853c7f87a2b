"""The contract of MatMulNBits (com.microsoft): A x dequantised(B)^T (+ bias).

With ``accuracy_level`` 4, ONNX Runtime's CPU kernels round A to int8, one scale a block; so do we, since models are
published and judged with that. The other levels only name a type that products may use; ours is never worse.

B is [N, blocks, block_size * bits / 8] bytes, low bits first; a weight is (q - zero_point) * scale, one scale a block.
Source: ONNX Runtime 1.32, schema MatMulNBits-1 and contrib_ops/cpu/quantization/matmul_nbits_helper.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import float_input, only_attributes, require_dtype, require_shape
from ..node import FLOATS, Dim, Node, TensorSpec

WORD = 32
"""Bits of the words in which kernels read the packed weights."""

INT8_MAX = 127.0
"""Steps to each side of zero that A is rounded to."""

_INT8_ACCURACY = 4
_REORDERED = "quantise without reordering (act-order, desc_act)"
_INT8_BLOCKS_OF_2_BITS = (32, 64, 128)


@dataclass(frozen=True)
class MatMulNBits:
    """Contract.

    Attributes:
        where: The node, as errors name it.
        a: [..., K] of f32, f16 or bf16.
        columns: N.
        depth: K.
        bits: Bits of a weight.
        block_size: Weights along K that share a scale.
        zero_points: ``default`` (2 ** (bits - 1)), ``packed`` like the weights, or ``float``.
        with_bias: Whether input 5 is there.
        rounds_a: Whether A is rounded to int8 block by block first.
    """

    where: str
    a: TensorSpec
    columns: int
    depth: int
    bits: int
    block_size: int
    zero_points: str
    with_bias: bool
    rounds_a: bool

    @property
    def rows(self) -> Dim:
        """M, the rows of A in all; None where open."""
        rows = 1
        for size in self.a.shape[:-1]:
            if size is None:
                return None
            rows *= size
        return rows

    @property
    def blocks(self) -> int:
        """Blocks along K, the last one padded."""
        return -(-self.depth // self.block_size)

    @property
    def per_word(self) -> int:
        """Weights of a word."""
        return WORD // self.bits

    @property
    def block_words(self) -> int:
        """Words of a block."""
        return self.block_size // self.per_word

    @property
    def key(self) -> str:
        """What the names of kernels say of the weights."""
        bias = "_bias" if self.with_bias else ""
        return f"{self.a.dtype}_{self.bits}bit_b{self.block_size}_z{self.zero_points}{bias}"

    @property
    def row_words(self) -> int:
        """Words of a column's weights, the padding of the last block included."""
        return self.blocks * self.block_words

    @property
    def padded_depth(self) -> int:
        """K in whole blocks."""
        return self.blocks * self.block_size

    @property
    def default_zero(self) -> float:
        """The zero point where the node has none."""
        return float(1 << (self.bits - 1))


def parse(node: Node) -> MatMulNBits:
    """Check the node; see the contract."""
    only_attributes(node, "K", "N", "accuracy_level", "bits", "block_size", "weight_prepacked")
    a = float_input(node, 0, "A")
    weights, scales = node.required(1, "B"), float_input(node, 2, "scales")
    depth, columns = node.attr("K", 0), node.attr("N", 0)
    bits, block_size = node.attr("bits", 4), node.attr("block_size", 0)
    if depth < 1 or columns < 1:
        raise node.error("attributes 'K' and 'N'", got=f"{depth} and {columns}", expected="positive numbers")
    if bits not in (2, 4, 8):
        raise node.error("attribute 'bits'", got=bits, expected="2, 4 or 8")
    if block_size < 16 or block_size & (block_size - 1):
        raise node.error("attribute 'block_size'", got=block_size, expected="a power of two from 16 on")
    if node.attr("weight_prepacked", 0):
        raise node.error(
            "attribute 'weight_prepacked'",
            got=node.attributes["weight_prepacked"],
            expected=0,
            hint="weights packed for one CUDA device are not portable; export without it",
        )
    if node.input(4) is not None:
        raise node.error("input 'g_idx' is not supported", hint=_REORDERED)
    if a.rank == 0 or a.shape[-1] not in (None, depth):
        raise node.error("the last dimension of input 'A'", got=a, expected=f"K = {depth}")
    blocks = -(-depth // block_size)
    require_dtype(node, "B", weights, "i8")
    require_shape(node, "B", weights, (columns, blocks, block_size * bits // 8))
    require_dtype(node, "scales", scales, a.dtype)
    require_shape(node, "scales", scales, (columns, blocks), (columns * blocks,))
    bias = node.input(5)
    if bias is not None:
        require_dtype(node, "bias", bias, a.dtype)
        require_shape(node, "bias", bias, (columns,))
    zero_points = _zero_points(node, columns, blocks, bits)
    return MatMulNBits(
        where=node.where,
        a=a,
        columns=columns,
        depth=depth,
        bits=bits,
        block_size=block_size,
        zero_points=zero_points,
        with_bias=bias is not None,
        rounds_a=node.attr("accuracy_level", 0) == _INT8_ACCURACY and _has_int8_kernel(bits, block_size, zero_points),
    )


def _has_int8_kernel(bits: int, block_size: int, zero_points: str) -> bool:
    """Whether ONNX Runtime 1.32 computes in int8 where it may (found out by running it on an x86-64 CPU)."""
    return zero_points != "float" and (bits != 2 or block_size in _INT8_BLOCKS_OF_2_BITS)


def _zero_points(node: Node, columns: int, blocks: int, bits: int) -> str:
    spec = node.input(3)
    if spec is None:
        return "default"
    if spec.dtype in ("i32", "i64"):  # some exporters leave no gap where there are no zero points
        raise node.error(
            "input 3 is no 'zero_points' but a 'g_idx', the group of each row of K, and not supported",
            got=spec,
            hint=_REORDERED,
        )
    require_dtype(node, "zero_points", spec, "i8", *FLOATS)
    width = -(-blocks * bits // 8) if spec.dtype == "i8" else blocks
    require_shape(node, "zero_points", spec, (columns, width), (columns * width,))
    return "packed" if spec.dtype == "i8" else "float"


def output_types(contract: MatMulNBits) -> Sequence[TensorSpec]:
    """The outputs' types."""
    return [TensorSpec((*contract.a.shape[:-1], contract.columns), contract.a.dtype)]
