"""A as the GPU kernels of MatMulNBits want it: in whole blocks, and rounded to int8 where the contract says so.

    %a = flow.dispatch @mat_mul_n_bits_rounded_...(%a)       a thread: the largest value of a block, then its elements

For a block of ``step = max |a| / 127`` an element is round(a * (127 / max |a|)) * step, as ``rounded`` says it in
linalg, whose kernels by IREE take 3 times as long. To round is to add and subtract 1.5 * 2^23: IREE makes some twenty
instructions of ``math.roundeven``.
"""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir
from iree.compiler.dialects import arith

from ..emit.builder import Builder, spec_of, tensor_type
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer, Group, Kernel, dispatch
from ..mat_mul.mma_plan import CHUNK
from .contract import MatMulNBits
from .rounded import inverse_and_step
from .simt_weights import order

_VECTOR = 4
_KEPT = 8  # vectors of a block that stay in registers between the two passes
_THREADS = 128
_SHIFT = 1.5 * 2**23  # numbers from here on have no fraction
_EXPONENT = 0x4B000000  # bits that they all have


def emit_a(b: Builder, contract: MatMulNBits, a: ir.Value, dtype: str) -> ir.Value:
    """``a`` [M, K] as [M, blocks * block size], rounded if the contract does, of ``dtype`` then; else of its own.

    Args:
        b: Emits the ops.
        contract: The node.
        a: [M, K].
        dtype: Element type of rounded values: f32 holds them all, f16 all but for its own rounding.
    """
    c, a, rows = contract, b.pad_end(a, 1, contract.padded_depth), b.dim(a, 0)
    if not c.rounds_a:
        return a
    source = spec_of(a).dtype

    def body(k: Kernel) -> None:
        count = k.number(0) if c.rows is None else Scalar.constant(c.rows, "index")
        blocks = count * c.blocks
        vectors = c.block_size // _VECTOR
        given = k.buffer(0, source, blocks * vectors, _VECTOR)
        result = k.buffer(1, dtype, blocks * vectors, _VECTOR)
        block = k.item() * _THREADS + k.thread()

        def write() -> None:
            _round_block(k, given, result, block * vectors, vectors)

        k.when(block < blocks, write)

    numbers = [] if isinstance(rows, int) else [rows]
    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [
        (tensor_type((c.rows, c.padded_depth), dtype), numbers)
    ]
    items = b.index(b.floordiv(b.add(b.mul(rows, c.blocks), _THREADS - 1), _THREADS))
    shape = f"{'x' if c.rows is None else c.rows}x{c.padded_depth}"
    name = f"mat_mul_n_bits_rounded_{source}_{dtype}_b{c.block_size}_{shape}"
    return dispatch(name, Group(_THREADS, 0), 1, items, numbers, [a], outputs, body)[0]


def emit_whole(b: Builder, contract: MatMulNBits, a: ir.Value) -> list[ir.Value]:
    """``a`` [M, K] rounded to whole numbers of a step for each block.

    Returns:
        The numbers, f16 [M, blocks * block size], in the order in which the weights of a word are taken apart; and the
        steps, f32 [blocks, M], M in whole vectors, as tiles of rows want them.
    """
    c, a = contract, b.pad_end(a, 1, contract.padded_depth)
    source, rows = spec_of(a).dtype, contract.rows
    assert rows is not None
    wide = -(-rows // _VECTOR) * _VECTOR

    def body(k: Kernel) -> None:
        blocks, vectors = k.number(0) * c.blocks, c.block_size // _VECTOR
        across = (k.number(0) + (_VECTOR - 1)).divide_unsigned(_VECTOR)[0] * _VECTOR
        given = k.buffer(0, source, blocks * vectors, _VECTOR)
        result, steps = k.chunks(1, blocks * (c.block_size // CHUNK)), k.buffer(2, "f32", across * c.blocks)
        block = k.item() * _THREADS + k.thread()

        def write() -> None:
            row, inside = block.divide_unsigned(c.blocks)
            step = _round_block(k, given, result, block * vectors, vectors, whole=order(c))
            k.store(step, steps, inside * across + row)

        k.when(block < blocks, write)

    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [
        (tensor_type((rows, c.padded_depth), "f16"), []),
        (tensor_type((c.blocks, wide), "f32"), []),
    ]
    items = b.index(-(-rows * c.blocks // _THREADS))
    name = f"mat_mul_n_bits_rounded_{source}_whole_{c.bits}bit_b{c.block_size}_nx{c.padded_depth}"
    return dispatch(name, Group(_THREADS, 0), 1, items, [b.index(rows)], [a], outputs, body)


def _round_block(
    k: Kernel, given: Buffer, result: Buffer, start: Scalar, vectors: int, *, whole: list[int] | None = None
) -> ir.Value:
    """Write a block's rounded elements, or whole numbers of steps in that order, in chunks; returns the step."""
    share = min(vectors, _KEPT)

    def load(at: Scalar) -> list[list[ir.Value]]:
        stored = [k.load(given, start + at + i) for i in range(share)]
        return [k.elements(k.widen(given, vector)) for vector in stored]

    def largest(at: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
        return [largest_of(carried[0], [e for vector in load(at) for e in vector])]

    def write(values: list[list[ir.Value]], at: Scalar, inverse: ir.Value, step: ir.Value) -> None:
        rounded = [round_even(k, k.mul(e, inverse)) for vector in values for e in vector]
        if whole is None:
            for i in range(0, len(rounded), _VECTOR):
                numbers = [k.mul(number, step) for number in rounded[i : i + _VECTOR]]
                k.store(k.join(numbers), result, start + at + i // _VECTOR)
            return
        ordered = [rounded[i + place] for i in range(0, len(rounded), len(whole)) for place in whole]
        first = (start + at).divide_unsigned(CHUNK // _VECTOR)[0]
        for i in range(0, len(ordered), CHUNK):
            k.store_as_is(k.chunk_of_f16(ordered[i : i + CHUNK]), result, first + i // CHUNK)

    zero = Scalar.constant(0, "index")
    if share == vectors:
        values = load(zero)
        most = largest_of(k.constant(0.0), [e for vector in values for e in vector])
        inverse, step = (factor.value for factor in inverse_and_step(Scalar(most)))
        write(values, zero, inverse, step)
        return step
    stop = Scalar.constant(vectors, "index")
    (most,) = k.loop(zero, stop, share, [k.constant(0.0)], largest)
    inverse, step = (factor.value for factor in inverse_and_step(Scalar(most)))

    def again(at: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
        write(load(at), at, inverse, step)
        return carried

    k.loop(zero, stop, share, [], again)
    return step


def largest_of(so_far: ir.Value, values: Sequence[ir.Value]) -> ir.Value:
    """The largest absolute value of f32 ``values`` and ``so_far``."""
    most = Scalar(so_far)
    for value in values:
        most = most.maximum(Scalar(value).abs())
    return most.value


def round_even(k: Kernel, value: ir.Value) -> ir.Value:
    """The whole number that is nearest to ``value``, |value| < 2^22; halves to the even one."""
    shifted = arith.BitcastOp(k.type(1, "i32"), k.add(value, k.constant(_SHIFT))).result
    # These bits are set anyway; a compiler that does not know it cannot take the sum and the difference for nothing.
    kept = (Scalar(shifted) | _EXPONENT).value
    return k.sub(arith.BitcastOp(k.type(1), kept).result, k.constant(_SHIFT))
