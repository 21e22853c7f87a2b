"""Chunks of 16 bytes as eight numbers of 16 bits, and numbers as two terms of f16.

A chunk is moved as four f32 (``Kernel.chunks``), since vectors of eight are not legal everywhere and vectors of i16 are
slow (see ``Kernel.buffer``); here are the numbers in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir
from iree.compiler.dialects import arith, vector

from .scalar import Scalar
from .simt_kernel import Kernel

NUMBERS = 8
"""Numbers of a chunk."""
_LEAST = 2.0**-14  # the least f16 with all its bits

LOW = 2048.0
"""What the second of two terms is multiplied with, so that it is no smaller than the first one's last bit can be."""


def unpack(k: Kernel, chunk: ir.Value, dtype: str) -> list[ir.Value]:
    """The eight numbers (f16 or bf16) in f32."""
    found: list[ir.Value] = []
    for word in k.elements(chunk):
        if dtype == "f16":
            single = vector.BroadcastOp(ir.Type.parse("vector<1xf32>"), word).result
            halves = _bitcast(single, "vector<2xf16>")
            found += k.elements(arith.ExtFOp(k.type(2), halves).result)
        else:
            bits = arith.BitcastOp(k.type(1, "i32"), word).result
            low = arith.ShLIOp(bits, Scalar.constant(16, "i32").value).result
            high = arith.AndIOp(bits, Scalar.constant(-(1 << 16), "i32").value).result
            found += [arith.BitcastOp(k.type(1), half).result for half in (low, high)]
    return found


def pack(k: Kernel, values: Sequence[ir.Value], dtype: str) -> ir.Value:
    """Eight f32 numbers, rounded, as a chunk."""
    if dtype == "f16":
        return k.chunk_of_f16(values)
    words: list[ir.Value] = []
    for low, high in zip(values[::2], values[1::2], strict=True):
        upper = arith.ShLIOp(k.bf16_bits(high), Scalar.constant(16, "i32").value).result
        words.append(arith.BitcastOp(k.type(1), arith.OrIOp(k.bf16_bits(low), upper).result).result)
    return k.join(words)


def split(k: Kernel, values: Sequence[ir.Value], zero: Scalar, dtype: str = "f16") -> tuple[ir.Value, ir.Value]:
    """Eight f32 numbers as two terms of 16 bits, the second one times ``LOW``; a chunk of each.

    Args:
        k: Emits instructions.
        values: The numbers.
        zero: An i32 that is 0, which no compiler knows: NVIDIA's Vulkan driver takes converting there and back for
            nothing to do, and second terms were zero.
        dtype: The terms' type.
    """
    first = pack(k, values, dtype)
    words = [k.from_bits(Scalar(arith.BitcastOp(k.type(1, "i32"), word).result) ^ zero) for word in k.elements(first)]
    kept = unpack(k, k.join(words), dtype)
    rest = [k.mul(k.sub(x, y), k.constant(LOW)) for x, y in zip(values, kept, strict=True)]
    return first, pack(k, rest, dtype)


def first_term(k: Kernel, value: ir.Value) -> ir.Value:
    """What f16 holds of an f32, cut off; of a small one by adding, with its sign, what makes its last bit f16's."""
    sign = k.bits(value) & Scalar.constant(-(1 << 31), "i32")
    least = k.from_bits(sign ^ k.bits(k.constant(_LEAST)))
    return k.select(_is_small(k, value), k.sub(_cut(k, k.add(value, least)), least), _cut(k, value))


def _is_small(k: Kernel, value: ir.Value) -> Scalar:
    return Scalar(k.magnitude(value)) < _LEAST


def _cut(k: Kernel, value: ir.Value) -> ir.Value:
    """As many bits as f16 has.

    Not by converting there and back: NVIDIA's Vulkan driver takes that for nothing to do, and second terms were zero.
    """
    return k.from_bits(k.bits(value) & Scalar.constant(-(1 << 13), "i32"))


def _bitcast(value: ir.Value, to: str) -> ir.Value:
    return ir.Operation.create("vector.bitcast", results=[ir.Type.parse(to)], operands=[value]).result
