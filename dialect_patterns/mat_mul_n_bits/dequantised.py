"""Strategy ``dequantised``: the portable form, as linalg.

The weights stay packed in the module and on the device, viewed as words of 32 bits: IREE 3.13 silently miscompiles
loads of i4 and i8 vectors for Vulkan devices without 8-bit storage, and on the CPU words are as fast. With one row:

    %q = flow.tensor.bitcast %bytes : [N, blocks, bytes]xi8 -> [N, blocks, words]xi32
    %p = linalg.generic ins(%a, %q, %shifts) {sum += a * (((q >> shift) & 15) - 8)}  // "kwp,nkw,p->nk"
    %y = linalg.generic ins(%p, %scales) {sum += p * scale}                          // "nk,nk->n"

With more rows, the weights of this one product are dequantised to scratch first, since IREE compiles no good fused
form (of CPU forms measured at 64 rows, the others were 20 to 80 times slower, or ran out of stack):

    %w = linalg.generic ins(%q, %shifts, %scales) {(((q >> shift) & 15) - 8) * scale}
    %y = linalg.matmul(%a, %w)  // "mk,nk->mn", sums in f32

Legal: always. Cost with more than one row: the weights in f32 are written and read once a call.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from iree.compiler import ir
from iree.compiler.dialects import arith

from ..emit.builder import Builder, tensor_type
from ..emit.scalar import Scalar
from ..op import LoweringContext
from ..select import Legality, Yes
from ..target import Target
from .contract import WORD, MatMulNBits
from .operands import Operands
from .rounded import emit_a


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


def is_legal(contract: MatMulNBits, target: Target) -> Legality:
    """Everywhere."""
    del contract, target
    return Yes()


def _emit_weights(b: Builder, contract: MatMulNBits, x: Operands) -> _Weights:
    """The inputs as the products want them; no weight is computed yet."""
    words = b.expand(x.words, 1, [contract.blocks, contract.block_words])
    # Without a barrier IREE dequantises constant weights at compile time wherever that adds less than 1 MiB each.
    words = b.barrier(words)
    starts = ir.DenseElementsAttr.get(np.arange(0, WORD, contract.bits, dtype=np.int32))
    shifts = arith.ConstantOp(tensor_type((contract.per_word,), "i32"), starts).result
    zeros = None if x.zeros is None else _emit_zero_points(b, contract, x.zeros)
    return _Weights(words, shifts, x.scales, zeros)


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


def _emit_block_products(b: Builder, contract: MatMulNBits, a: ir.Value, weights: _Weights) -> ir.Value:
    """One row: the product [1, N] in f32, summed block by block, from packed weights."""

    def add(total: Scalar, value: Scalar, word: Scalar, shift: Scalar, zero: Scalar | None = None) -> Scalar:
        offset = zero if zero is not None else contract.default_zero
        return total + value.to("f32") * (_field(contract, word, shift) - offset)

    def add_scaled(total: Scalar, value: Scalar, scale: Scalar) -> Scalar:
        return total + value * scale.to("f32")

    split = [contract.blocks, contract.block_words, contract.per_word]
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


def emit_mat_mul_n_bits_dequantised(context: LoweringContext, contract: MatMulNBits, x: Operands) -> ir.Value:
    """Emit the product [M, N]: from packed weights for one row, from dequantised ones for more."""
    b = context.builder
    a = emit_a(b, contract, x.a)
    weights = _emit_weights(b, contract, x)
    if b.dim(a, 0) == 1:
        y = _emit_block_products(b, contract, a, weights)
    else:
        # Units for 16-bit products want 16-bit operands; elsewhere the weights are not rounded a second time.
        dtype = contract.a.dtype if context.target.matrix_units and not contract.rounds_a else "f32"
        y = b.contract("mk,nk->mn", a, _emit_dequantised(b, contract, weights, dtype))
    if x.bias is not None:

        def add(value: Scalar, offset: Scalar) -> Scalar:
            return value + offset.to("f32")

        y = b.map("mn,n->mn", add, y, x.bias, dtype=contract.a.dtype)
    return b.cast(y, contract.a.dtype)
