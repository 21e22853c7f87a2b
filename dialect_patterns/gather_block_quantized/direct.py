"""Strategy ``direct``: one loop over the output, as linalg, on every target.

    %words = flow.tensor.bitcast %data : [D, L..., bytes]xi8 -> [words]xi32
    %y = linalg.generic ins(%indices) {                           // over indices, L, K
      %row = clamp(%index) * L + l;  %word = tensor.extract %words[...];  %scale = tensor.extract %scales[%row, ...]
      (((%word >> shift) & 15) - 8) * %scale }

The table stays packed, in the layout of MatMulNBits: a table that a product reads too is stored once. Words of 32 bits,
since IREE 3.13 miscompiles loads of bytes for Vulkan devices without 8-bit storage.
No index leaves the table: reads are clamped, and what an index outside it would read is 0, as in ONNX Runtime.

Legal: always. Cost: the rows asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from iree.compiler import ir

from ..emit.builder import Builder, Size, spec_of, tensor_type
from ..emit.scalar import Scalar
from ..emit.torch_values import before_reshape
from ..op import LoweringContext
from ..select import Legality, Yes
from ..target import Target
from .contract import GatherBlockQuantized

_WORD = 32


def is_legal(contract: GatherBlockQuantized, target: Target) -> Legality:
    """Everywhere."""
    del contract, target
    return Yes()


def emit_gather_block_quantized_direct(
    context: LoweringContext, contract: GatherBlockQuantized, operands: Sequence[ir.Value | None]
) -> ir.Value:
    """Emit the rows [indices..., L..., K]."""
    b, c = context.builder, contract
    data, indices, scales, *rest = operands
    assert data is not None
    assert indices is not None
    assert scales is not None
    zeros = rest[0] if c.with_zero_points else None
    words, scale_rows = _words(b, data), _rows(b, scales)
    zero_words = None if zeros is None else _words(b, zeros)
    shape = b.shape(indices)
    flat = b.collapse(indices, 0, len(shape) - 1) if len(shape) > 1 else indices

    def element(index: Scalar) -> Scalar:
        row, inside = _row(b, c, index)
        k = b.loop_index(2)
        block = k.divide_unsigned(c.block_size)[0]
        zero = b.constant(c.default_zero, "f32")
        if zero_words is not None:
            zero = _field(b, c, zero_words, row, -(-c.blocks * c.bits // 8), block)
        value = _field(b, c, words, row, c.row_bytes, k) - zero
        value = value * b.load(scale_rows, row, block).to("f32")
        return inside.select(value, b.constant(0.0, "f32"))

    equation, sizes = ("n->nlk", dict[str, Size]()) if shape else ("->nlk", dict[str, Size](n=1))
    y = b.map(equation, element, flat, dtype=c.dtype, sizes=sizes | {"l": c.inner, "k": c.depth})
    return _shaped(b, y, [*shape, *(size or 0 for size in c.data.shape[1:-1])], c.depth)


def _words(b: Builder, packed: ir.Value) -> ir.Value:
    """Packed rows [D, L..., bytes] as words [words], all of them one after the other.

    A Reshape before is passed over, and nothing but the bitcast added: of any other view of a weight IREE 3.13 stores
    the result as a second weight.
    """
    packed = before_reshape(packed) or packed
    count = math.prod(size or 0 for size in spec_of(packed).shape)
    if count % 4:
        flat = b.collapse(packed, 0, spec_of(packed).rank - 1)
        packed = b.pad_end(flat, 0, -(-count // 4) * 4, 0)
    view = tensor_type((-(-count // 4),), "i32")
    no_dims = {"operandSegmentSizes": ir.DenseI32ArrayAttr.get([1, 0, 0])}
    return ir.Operation.create("flow.tensor.bitcast", results=[view], operands=[packed], attributes=no_dims).result


def _rows(b: Builder, value: ir.Value) -> ir.Value:
    """[D, L..., n] as [D * L, n]."""
    return b.collapse(value, 0, spec_of(value).rank - 2) if spec_of(value).rank > 2 else value


def _row(b: Builder, c: GatherBlockQuantized, index: Scalar) -> tuple[Scalar, Scalar]:
    """The row of an index, clamped, and whether it is in the table."""
    counted = (index < 0).select(index + c.rows, index)
    clamped = counted.minimum(c.rows - 1).maximum(0)
    row = clamped.to("index") * c.inner + b.loop_index(1)
    return row, counted.equals(clamped)


def _field(b: Builder, c: GatherBlockQuantized, words: ir.Value, row: Scalar, row_bytes: int, number: Scalar) -> Scalar:
    """Field ``number`` of a row of so many bytes, f32."""
    if row_bytes % 4 == 0:  # so that numbers of words fit in 32 bits where those of weights do not
        word, place = number.divide_unsigned(_WORD // c.bits)
        word = row * (row_bytes // 4) + word
    else:
        word, place = (row * (row_bytes * 8 // c.bits) + number).divide_unsigned(_WORD // c.bits)
    shifted = b.load(words, word).shift_right((place * c.bits).to("i32"))
    return (shifted & ((1 << c.bits) - 1)).to("f32")


def _shaped(b: Builder, y: ir.Value, lead: Sequence[Size], depth: int) -> ir.Value:
    """[n, L, K] as [lead..., K]."""
    flat = b.collapse(y, 0, 1)
    if len(lead) == 1:
        return flat
    return b.expand(flat, 0, lead) if lead else b.expand(b.collapse(flat, 0, 1), 0, [depth])
