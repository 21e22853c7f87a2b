"""MatMulNBits (com.microsoft): A x dequantised(B)^T (+ bias), B packed in 2, 4 or 8 bits with one scale a block.

B is [N, blocks, block_size * bits / 8] bytes, low bits first; a weight is (q - zero_point) * scale. The weights stay
packed in the module and on the device, viewed as words of 32 bits: IREE 3.13 silently miscompiles loads of i4 and i8
vectors for Vulkan devices without 8-bit storage, and on the CPU words are as fast. With one row in A:

    %q = flow.tensor.bitcast %bytes : [N, blocks, bytes]xi8 -> [N, blocks, words]xi32
    %p = linalg.generic ins(%a, %q, %shifts) {sum += a * (((q >> shift) & 15) - 8)}  // "kwp,nkw,p->nk"
    %y = linalg.generic ins(%p, %scales) {sum += p * scale}                          // "nk,nk->n"

With more rows, the weights of this one product are dequantised to scratch first, since IREE compiles no good fused
form (of CPU forms measured at 64 rows, the others were 20 to 80 times slower, or ran out of stack):

    %w = linalg.generic ins(%q, %shifts, %scales) {(((q >> shift) & 15) - 8) * scale}
    %y = linalg.matmul(%a, %w)  // "mk,nk->mn", sums in f32

With ``accuracy_level`` 4, ONNX Runtime's CPU kernels round A to int8, one scale a block; so do we, since models are
published and judged with that. The other levels only name a type that products may use; ours is never worse.
Source: ONNX Runtime 1.32, schema MatMulNBits-1 and contrib_ops/cpu/quantization/matmul_nbits_helper.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from iree.compiler import ir
from iree.compiler.dialects import arith

from ..builder import Builder, spec_of, tensor_type
from ..node import FLOATS, Node, TensorSpec
from ..op import MICROSOFT, LoweringContext, Op
from ..scalar import Scalar
from .checks import float_input, only_attributes, require_dtype, require_shape

_WORD = 32
_INT8_ACCURACY = 4
_INT8_MAX = 127.0


@dataclass(frozen=True)
class MatMulNBits:
    """Contract.

    Attributes:
        a: [..., K] of f32, f16 or bf16.
        columns: N.
        depth: K.
        bits: Bits of a weight.
        block_size: Weights along K that share a scale.
        zero_points: ``default`` (2 ** (bits - 1)), ``packed`` like the weights, or ``float``.
        with_bias: Whether input 5 is there.
        rounds_a: Whether A is rounded to int8 block by block first.
    """

    a: TensorSpec
    columns: int
    depth: int
    bits: int
    block_size: int
    zero_points: str
    with_bias: bool
    rounds_a: bool

    @property
    def blocks(self) -> int:
        """Blocks along K, the last one padded."""
        return -(-self.depth // self.block_size)

    @property
    def default_zero(self) -> float:
        """The zero point where the node has none."""
        return float(1 << (self.bits - 1))


@dataclass(frozen=True)
class _Weights:
    """The quantised weights.

    Attributes:
        words: [N, blocks, words of a block], i32.
        shifts: Where in a word each weight starts, i32 [weights of a word].
        scales: [N, blocks].
        zeros: Zero points, f32 [N, blocks], None for the default one.
    """

    words: ir.Value
    shifts: ir.Value
    scales: ir.Value
    zeros: ir.Value | None


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
        raise node.error("input 'g_idx' is not supported", hint="quantise without reordering (act-order, desc_act)")
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
    return MatMulNBits(
        a=a,
        columns=columns,
        depth=depth,
        bits=bits,
        block_size=block_size,
        zero_points=_zero_points(node, columns, blocks, bits),
        with_bias=bias is not None,
        rounds_a=node.attr("accuracy_level", 0) == _INT8_ACCURACY,
    )


def _zero_points(node: Node, columns: int, blocks: int, bits: int) -> str:
    spec = node.input(3)
    if spec is None:
        return "default"
    require_dtype(node, "zero_points", spec, "i8", *FLOATS)
    width = -(-blocks * bits // 8) if spec.dtype == "i8" else blocks
    require_shape(node, "zero_points", spec, (columns, width), (columns * width,))
    return "packed" if spec.dtype == "i8" else "float"


def output_types(contract: MatMulNBits) -> Sequence[TensorSpec]:
    """The outputs' types."""
    return [TensorSpec((*contract.a.shape[:-1], contract.columns), contract.a.dtype)]


def _emit_weights(
    b: Builder, contract: MatMulNBits, packed: ir.Value, scales: ir.Value, zeros: ir.Value | None
) -> _Weights:
    """The inputs as the products want them; no weight is computed yet."""
    per_word = _WORD // contract.bits
    view = tensor_type((contract.columns, contract.blocks, contract.block_size // per_word), "i32")
    no_dims = {"operandSegmentSizes": ir.DenseI32ArrayAttr.get([1, 0, 0])}
    words = ir.Operation.create("flow.tensor.bitcast", results=[view], operands=[packed], attributes=no_dims).result
    # Without a barrier IREE dequantises constant weights at compile time wherever that adds less than 1 MiB each.
    words = b.barrier(words)
    starts = ir.DenseElementsAttr.get(np.arange(0, _WORD, contract.bits, dtype=np.int32))
    shifts = arith.ConstantOp(tensor_type((per_word,), "i32"), starts).result
    zeros = None if zeros is None else _emit_zero_points(b, contract, _as_rows(b, zeros, contract.columns))
    return _Weights(words, shifts, _as_rows(b, scales, contract.columns), zeros)


def _emit_zero_points(b: Builder, contract: MatMulNBits, rows: ir.Value) -> ir.Value:
    """Zero points [N, packed or not] as f32 [N, blocks]."""
    if contract.zero_points == "float":
        return b.cast(rows, "f32")
    per_byte = 8 // contract.bits

    def unpack() -> Scalar:
        row, block = b.loop_index(0), b.loop_index(1)
        byte = b.load(rows, row, block // per_byte).to("i32", unsigned=True)
        return _field(contract, byte, (block % per_byte).to("i32") * contract.bits)

    return b.map("->nk", unpack, dtype="f32", sizes={"n": contract.columns, "k": contract.blocks})


def _field(contract: MatMulNBits, word: Scalar, shift: Scalar) -> Scalar:
    """The quantised value that starts at bit ``shift`` of ``word``, f32."""
    return (word.shift_right(shift) & ((1 << contract.bits) - 1)).to("f32")


def _as_rows(b: Builder, value: ir.Value, rows: int) -> ir.Value:
    """[rows * n] or [rows, n] as [rows, n]."""
    return value if spec_of(value).rank == 2 else b.expand(value, 0, [rows, b.floordiv(b.dim(value, 0), rows)])


def _emit_block_products(b: Builder, contract: MatMulNBits, a: ir.Value, weights: _Weights) -> ir.Value:
    """One row: the product [1, N] in f32, summed block by block, from packed weights."""

    def add(total: Scalar, value: Scalar, word: Scalar, shift: Scalar, zero: Scalar | None = None) -> Scalar:
        offset = zero if zero is not None else contract.default_zero
        return total + value.to("f32") * (_field(contract, word, shift) - offset)

    def add_scaled(total: Scalar, value: Scalar, scale: Scalar) -> Scalar:
        return total + value * scale.to("f32")

    per_word = _WORD // contract.bits
    split = [contract.blocks, contract.block_size // per_word, per_word]
    operands = [b.expand(b.collapse(a, 0, 1), 0, split), weights.words, weights.shifts]
    equation = "kwp,nkw,p"
    if weights.zeros is not None:
        operands.append(weights.zeros)
        equation += ",nk"
    partial = b.reduce(f"{equation}->nk", add, *operands, initial=0.0)
    return b.expand(b.reduce("nk,nk->n", add_scaled, partial, weights.scales, initial=0.0), 0, [1, contract.columns])


def _emit_dequantised(b: Builder, contract: MatMulNBits, weights: _Weights, dtype: str) -> ir.Value:
    """The weights as [N, blocks * block_size] of ``dtype``."""

    def dequantise(word: Scalar, shift: Scalar, scale: Scalar, zero: Scalar | None = None) -> Scalar:
        offset = zero if zero is not None else contract.default_zero
        return (_field(contract, word, shift) - offset) * scale.to("f32")

    operands, equation = [weights.words, weights.shifts, weights.scales], "nkw,p,nk"
    if weights.zeros is not None:
        operands.append(weights.zeros)
        equation += ",nk"
    return b.collapse(b.map(f"{equation}->nkwp", dequantise, *operands, dtype=dtype), 1, 3)


def _emit_rounded(b: Builder, a: ir.Value, block_size: int) -> ir.Value:
    """``a`` [M, K], K a multiple of the block size, rounded to 127 steps a side in each block, f32."""
    depth = spec_of(a).shape[1]
    assert depth is not None
    blocks = b.expand(a, 1, [depth // block_size, block_size])

    def largest(so_far: Scalar, value: Scalar) -> Scalar:
        return so_far.maximum(value.to("f32").abs())

    def round_to_step(value: Scalar, bound: Scalar) -> Scalar:
        step = bound / _INT8_MAX
        inverse = step.equals(0.0).select(b.constant(0.0, "f32"), 1.0 / step)
        return (value.to("f32") * inverse).round_even() * step

    bound = b.reduce("mkj->mk", largest, blocks, initial=0.0)
    return b.collapse(b.map("mkj,mk->mkj", round_to_step, blocks, bound, dtype="f32"), 1, 2)


def lower(context: LoweringContext, contract: MatMulNBits, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """The product with packed weights for one row, with dequantised ones for more."""
    b = context.builder
    a, packed, scales = operands[:3]
    assert a is not None
    assert packed is not None
    assert scales is not None
    leading = b.shape(a)[:-1]
    a = b.refine(a, TensorSpec((*spec_of(a).shape[:-1], contract.depth), contract.a.dtype))
    a = b.collapse(a, 0, len(leading) - 1) if leading else b.expand(a, 0, [1, contract.depth])
    a = b.pad_end(a, 1, contract.blocks * contract.block_size)
    if contract.rounds_a:
        a = _emit_rounded(b, a, contract.block_size)
    zeros = operands[3] if contract.zero_points != "default" else None
    weights = _emit_weights(b, contract, packed, scales, zeros)
    if b.dim(a, 0) == 1:
        y = _emit_block_products(b, contract, a, weights)
    else:
        # Units for 16-bit products want 16-bit operands; elsewhere the weights are not rounded a second time.
        dtype = contract.a.dtype if context.target.matrix_units and not contract.rounds_a else "f32"
        y = b.contract("mk,nk->mn", a, _emit_dequantised(b, contract, weights, dtype))
    if contract.with_bias:
        bias = operands[5]
        assert bias is not None

        def add(value: Scalar, offset: Scalar) -> Scalar:
            return value + offset.to("f32")

        y = b.map("mn,n->mn", add, y, bias, dtype=contract.a.dtype)
    y = b.cast(y, contract.a.dtype)
    return [b.expand(y, 0, leading) if leading else b.collapse(y, 0, 1)]


OPS = (Op(MICROSOFT, "MatMulNBits", 1, parse, output_types, lower),)
