"""The packed weights inside a GPU kernel: how they are bound, loaded, and turned into numbers.

They are read as words of 32 bits in the model's own order, [N, words of K]: threads that follow K read whole sectors,
and so does a tile of columns, so that no second layout has to be kept. Zero points are read as words too, since not
every device loads bytes.

A field becomes a number without a conversion, which GPUs do at a quarter of the rate of other instructions: with its
bits in the mantissa of 2^23, ``(word & mask) | bits(2^23)`` is 2^23 + q 2^s, and one multiply-add makes that exactly
q - (default zero point).
"""

from __future__ import annotations

from dataclasses import dataclass

from iree.compiler import ir
from iree.compiler.dialects import arith

from ..emit.builder import tensor_type
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Kernel
from ..mat_mul.mma_plan import CHUNK
from ..select import Legality, No, Yes
from .contract import WORD, MatMulNBits
from .operands import Operands

_MANTISSA = 23
_TWO_TO_23 = 0x4B000000  # as bits
_HALF = 16  # fields that start here are shifted down first, so that they fit in a mantissa
_TWO_1024 = 0x64006400  # as bits; of f16, whose last bit counts 1 there
_FIRST = 1  # binding after A


def readable(contract: MatMulNBits) -> Legality:
    """Whether all of the weights are whole words."""
    c = contract
    if c.zero_points == "packed" and c.columns * _zero_row_bits(c) % WORD:
        return No(f"the zero points, {c.columns} x {_zero_row_bits(c) // 8} bytes, are not whole words")
    return Yes()


def _zero_row_bits(c: MatMulNBits) -> int:
    """Bits of a column's packed zero points, in whole bytes."""
    return -(-c.blocks * c.bits // 8) * 8


def bound(contract: MatMulNBits, x: Operands) -> list[ir.Value]:
    """The operands after A of a kernel that reads them by :class:`PackedWeights`."""
    zeros = x.zeros
    if zeros is not None and contract.zero_points == "packed":
        words = contract.columns * _zero_row_bits(contract) // WORD
        no_dims = {"operandSegmentSizes": ir.DenseI32ArrayAttr.get([1, 0, 0])}
        zeros = ir.Operation.create(
            "flow.tensor.bitcast", results=[tensor_type((words,), "i32")], operands=[zeros], attributes=no_dims
        ).result
    return [value for value in (x.words, x.scales, zeros, x.bias) if value is not None]


def order(contract: MatMulNBits) -> list[int]:
    """Which weights of a word follow each other where words are taken apart by their halves, two fields at a time."""
    half = contract.per_word // 2
    return [start + which for start in range(half) for which in (0, half)]


@dataclass(frozen=True)
class Part:
    """Weights that share a block.

    Attributes:
        values: q - (default zero point) of each, f32.
        scale: Of the block, f32.
        offset: The zero point less the default one, f32; None where all are the default.
    """

    values: list[ir.Value]
    scale: ir.Value
    offset: ir.Value | None


class PackedWeights:
    """Emits loads and unpacking.

    Args:
        k: Emits instructions.
        contract: The node.
        width: Words of one load, along K; must divide the words of a column.
        first: Binding of the words; scales, zero points and bias follow.

    Attributes:
        width: Words of one load.
        per_load: Weights of one load.
        output: The first binding after the weights.
    """

    def __init__(self, k: Kernel, contract: MatMulNBits, width: int, first: int = _FIRST) -> None:
        c = contract
        self.k, self.c, self.width, self.per_load = k, c, width, width * c.per_word
        self._blocks = max(1, width // c.block_words)  # of one load
        self._words = k.buffer(first, "i32", _count(c.columns * c.row_words // width), width)
        self._scales = k.buffer(first + 1, c.a.dtype, _count(c.columns * c.blocks))
        self.output = first + 2
        if c.zero_points == "packed":
            self._zeros = k.buffer(self.output, "i32", _count(c.columns * _zero_row_bits(c) // WORD))
            self.output += 1
        elif c.zero_points == "float":
            self._zeros = k.buffer(self.output, c.a.dtype, _count(c.columns * c.blocks))
            self.output += 1
        if c.with_bias:
            self._bias = k.buffer(self.output, c.a.dtype, _count(c.columns))
            self.output += 1

    def load(self, column: Scalar, place: Scalar) -> list[ir.Value]:
        """Load ``place`` of a column and what it takes to unpack it, as stored."""
        k, c = self.k, self.c
        loads = [k.load(self._words, column * (c.row_words // self.width) + place)]
        blocks = [column * c.blocks + block for block in self._blocks_of(place)]
        loads += [k.load(self._scales, at) for at in blocks]
        if c.zero_points == "packed":
            loads += [k.load(self._zeros, self._zero_bit(column, block)[0]) for block in self._blocks_of(place)]
        elif c.zero_points == "float":
            loads += [k.load(self._zeros, at) for at in blocks]
        return loads

    def unpack(self, loads: list[ir.Value], column: Scalar, place: Scalar) -> list[Part]:
        """What :meth:`load` loaded, block by block."""
        k, blocks = self.k, self._blocks
        words, scales, zeros = k.elements(loads[0]), loads[1 : 1 + blocks], loads[1 + blocks :]
        share = self.width // blocks
        parts: list[Part] = []
        for i, block in enumerate(self._blocks_of(place)):
            values = [value for word in words[i * share : (i + 1) * share] for value in self._fields(Scalar(word))]
            offset = self._offset(zeros[i], column, block) if zeros else None
            parts.append(Part(values, k.widen(self._scales, scales[i]), offset))
        return parts

    def whole(self, loads: list[ir.Value], column: Scalar, place: Scalar) -> list[ir.Value]:
        """The weights that :meth:`load` loaded without their scales, as chunks of f16, in the order of :func:`order`.

        Of each half of a word a field at a time: with its bits in the mantissa of 1024, which f16 ends with, it is
        1024 + q, two of which one subtraction makes whole numbers less their zero points.
        """
        k, c, blocks = self.k, self.c, self._blocks
        words, zeros = k.elements(loads[0]), loads[1 + blocks :]
        share = self.width // blocks
        pairs: list[ir.Value] = []
        for i, block in enumerate(self._blocks_of(place)):
            if zeros:
                field = Scalar(zeros[i]).shift_right(self._zero_bit(column, block)[1].to("i32")) & ((1 << c.bits) - 1)
            else:
                field = Scalar.constant(int(c.default_zero), "i32")
            zero = k.pair_of_f16((field * ((1 << _HALF) + 1)) | _TWO_1024)
            for word in words[i * share : (i + 1) * share]:
                for start in range(0, _HALF, c.bits):
                    bits = Scalar(word) if start == 0 else Scalar(word).shift_right(start)
                    field = (bits & (((1 << c.bits) - 1) * ((1 << _HALF) + 1))) | _TWO_1024
                    pairs.append(k.sub(k.pair_of_f16(field), zero))
        return [k.chunk_of_pairs(pairs[i : i + CHUNK // 2]) for i in range(0, len(pairs), CHUNK // 2)]

    def load_scale(self, column: Scalar, block: Scalar) -> ir.Value:
        """The scale of a column's block, as stored."""
        return self.k.load(self._scales, column * self.c.blocks + block)

    def scale(self, stored: ir.Value) -> ir.Value:
        """What that is in f32."""
        return self.k.widen(self._scales, stored)

    def dequantise(self, loads: list[ir.Value], column: Scalar, place: Scalar) -> list[ir.Value]:
        """The weights that :meth:`load` loaded, f32."""
        k = self.k
        weights: list[ir.Value] = []
        for part in self.unpack(loads, column, place):
            values = part.values if part.offset is None else [k.sub(value, part.offset) for value in part.values]
            weights += [k.mul(value, part.scale) for value in values]
        return weights

    def bias(self, column: Scalar) -> ir.Value:
        """The bias of a column, f32."""
        return self.k.widen(self._bias, self.k.load(self._bias, column))

    def _blocks_of(self, place: Scalar) -> list[Scalar]:
        """The blocks of load number ``place`` of a column."""
        if self._blocks > 1:
            return [place * self._blocks + i for i in range(self._blocks)]
        return [place.divide_unsigned(self.c.block_words // self.width)[0]]

    def _fields(self, word: Scalar) -> list[ir.Value]:
        c = self.c
        high = word.shift_right(_HALF)
        values: list[ir.Value] = []
        for start in range(0, WORD, c.bits):
            half, shift = (word, start) if start < _HALF else (high, start - _HALF)
            bits = (half & (((1 << c.bits) - 1) << shift)) | _TWO_TO_23
            number = arith.BitcastOp(self.k.type(1), bits.value).result
            step = 2.0**-shift
            zero = self.k.constant(-step * 2**_MANTISSA - c.default_zero)
            values.append(self.k.fma(number, self.k.constant(step), zero))
        return values

    def _zero_bit(self, column: Scalar, block: Scalar) -> tuple[Scalar, Scalar]:
        """Word and bit at which a packed zero point starts."""
        bit = column * _zero_row_bits(self.c) + block * self.c.bits
        return bit.divide_unsigned(WORD)

    def _offset(self, stored: ir.Value, column: Scalar, block: Scalar) -> ir.Value:
        c = self.c
        if c.zero_points == "float":
            zero = Scalar(self.k.widen(self._zeros, stored))
        else:
            field = Scalar(stored).shift_right(self._zero_bit(column, block)[1].to("i32"))
            zero = (field & ((1 << c.bits) - 1)).to("f32", unsigned=True)
        return (zero - c.default_zero).value


def _count(elements: int) -> Scalar:
    return Scalar.constant(elements, "index")
