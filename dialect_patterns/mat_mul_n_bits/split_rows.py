"""A of f32 as two terms of f16 an element, for the matrix units: x = p (x1 + 2^-11 x2), p a power of two for each row.

    %terms, %p = flow.dispatch @mat_mul_n_bits_split_...(%a)       a workgroup: the largest of a row, then its elements

Divided by p, a row's elements are below 2 and f16 holds them; x2 is what x1 leaves, with as many bits. An element that
is 2^-36 of the row's largest one is lost.
"""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir
from iree.compiler.dialects import arith

from ..emit.builder import Builder, spec_of, tensor_type
from ..emit.chunk_words import first_term
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Group, Kernel, dispatch
from ..mat_mul.mma_kernel import REST
from .rounded_simt import largest_of

_VECTOR = 4
_THREADS, _SHARES = 128, 16
_EXPONENT, _ONE = 0x7F800000, 1 << 23  # bits of an f32's exponent, and what it counts by
_LARGEST = 253 * _ONE  # so that 1 / p is a normal number too


def emit_split(b: Builder, a: ir.Value) -> list[ir.Value]:
    """The terms [M, 2 K] in f16, those of a row one after the other, and p [M] in f32, of ``a`` [M, K] with 4 | K."""
    rows, depth = (size or 0 for size in spec_of(a).shape)

    def body(k: Kernel) -> None:
        _split(k, k.number(0), depth // _VECTOR)

    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [
        (tensor_type((rows, 2 * depth), "f16"), []),
        (tensor_type((rows,), "f32"), []),
    ]
    name, index = f"mat_mul_n_bits_split_f32_nx{depth}", b.index(rows)
    return dispatch(name, Group(_THREADS, 0), 1, index, [index], [a], outputs, body)


def two_terms(k: Kernel, values: Sequence[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
    """The two terms of each f32, in f32; the first is one that f16 holds."""
    first = [first_term(k, value) for value in values]
    rest = [k.mul(k.sub(value, kept), k.constant(1 / REST)) for value, kept in zip(values, first, strict=True)]
    return first, rest


def _split(k: Kernel, rows: Scalar, vectors: int) -> None:
    given = k.buffer(0, "f32", rows * vectors, _VECTOR)
    terms, factors = k.buffer(1, "f16", rows * (2 * vectors), _VECTOR), k.buffer(2, "f32", rows)
    row, thread, stop = k.item(), k.thread(), Scalar.constant(vectors, "index")
    values, shares = k.shared(_THREADS), k.shared(_SHARES)
    row = row.minimum(rows - 1)  # the same numbers again

    def largest(at: Scalar, so_far: list[ir.Value]) -> list[ir.Value]:
        return [largest_of(so_far[0], k.elements(k.load(given, row * vectors + at)))]

    (most,) = k.loop(thread, stop, _THREADS, [k.constant(0.0)], largest)
    k.store(most, values, thread)
    k.barrier()
    part = thread & (_SHARES - 1)
    share = largest_of(k.constant(0.0), [k.load(values, part + i) for i in range(0, _THREADS, _SHARES)])
    k.when(thread < _SHARES, lambda: k.store(share, shares, thread))
    k.barrier()
    most = largest_of(k.constant(0.0), [k.load(shares, Scalar.constant(i, "index")) for i in range(_SHARES)])
    bits = Scalar(arith.BitcastOp(k.type(1, "i32"), most).result) & _EXPONENT
    power = bits.maximum(Scalar.constant(_ONE, "i32")).minimum(Scalar.constant(_LARGEST, "i32"))
    factor = arith.BitcastOp(k.type(1), power.value).result
    inverse = arith.BitcastOp(k.type(1), (254 * _ONE - power).value).result
    k.when(thread.equals(0), lambda: k.store(factor, factors, row))

    def write(at: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
        divided = [k.mul(value, inverse) for value in k.elements(k.load(given, row * vectors + at))]
        for term, numbers in enumerate(two_terms(k, divided)):
            k.store(k.join(numbers), terms, row * (2 * vectors) + term * vectors + at)
        return carried

    k.loop(thread, stop, _THREADS, [], write)
