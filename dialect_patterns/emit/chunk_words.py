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


def split(k: Kernel, values: Sequence[ir.Value], dtype: str = "f16") -> tuple[ir.Value, ir.Value]:
    """Eight f32 numbers as two terms of 16 bits, the second one times ``LOW``; a chunk of each."""
    if dtype != "f16":
        first = pack(k, values, dtype)
        rest = [k.mul(k.sub(x, y), k.constant(LOW)) for x, y in zip(values, unpack(k, first, dtype), strict=True)]
        return first, pack(k, rest, dtype)
    high, low = [list[ir.Value]() for _ in range(2)]
    for pair in zip(values[::2], values[1::2], strict=True):
        both = k.join(pair)
        rounded = arith.TruncFOp(k.type(2, "f16"), both).result
        rest = k.sub(both, arith.ExtFOp(k.type(2), rounded).result)
        small = arith.TruncFOp(k.type(2, "f16"), k.mul(rest, k.constant(LOW, 2))).result
        high.append(_word(rounded))
        low.append(_word(small))
    return k.join(high), k.join(low)


def _word(pair: ir.Value) -> ir.Value:
    return vector.ExtractOp(_bitcast(pair, "vector<1xf32>"), [], [0]).result


def _bitcast(value: ir.Value, to: str) -> ir.Value:
    return ir.Operation.create("vector.bitcast", results=[ir.Type.parse(to)], operands=[value]).result
