"""A as MatMulNBits computes with it: filled up to whole blocks and, where the contract says so, rounded to int8.

    %bound = linalg.generic {max |a| of each block}                          // "mkj->mk"
    %a     = linalg.generic {round(a * (127 / bound)) * (bound / 127)}       // "mkj,mk->mkj"

This is the portable form; ``rounded_simt`` is the GPU kernels' own. The product is rounded to f32 before it is rounded
to a whole number, as in ONNX Runtime: all targets have the same whole numbers.
"""

from __future__ import annotations

from iree.compiler import ir

from ..emit.builder import Builder, spec_of
from ..emit.quotient import rest
from ..emit.scalar import Scalar
from .contract import INT8_MAX, MatMulNBits

_LEAST = 1e-30  # blocks of smaller numbers are taken for zero


def emit_a(b: Builder, contract: MatMulNBits, a: ir.Value) -> ir.Value:
    """``a`` [M, K] as [M, blocks * block size], rounded if the contract does, f32 then; else of its own type."""
    a = b.pad_end(a, 1, contract.padded_depth)
    return _emit_rounded(b, a, contract.block_size) if contract.rounds_a else a


def _emit_rounded(b: Builder, a: ir.Value, block_size: int) -> ir.Value:
    """``a`` [M, K], K a multiple of the block size, rounded to 127 steps a side in each block."""
    depth = spec_of(a).shape[1]
    assert depth is not None
    blocks = b.expand(a, 1, [depth // block_size, block_size])

    def largest(so_far: Scalar, value: Scalar) -> Scalar:
        return so_far.maximum(value.to("f32").abs())

    def round_to_step(value: Scalar, bound: Scalar) -> Scalar:
        inverse, step = inverse_and_step(bound)
        return (value.to("f32") * inverse).round_even() * step

    bound = b.reduce("mkj->mk", largest, blocks, initial=0.0)
    return b.collapse(b.map("mkj,mk->mkj", round_to_step, blocks, bound, dtype="f32"), 1, 2)


def inverse_and_step(bound: Scalar) -> tuple[Scalar, Scalar]:
    """What elements of a block are multiplied by to be whole numbers, and what these count, both f32.

    Vulkan's division may be off by 2.5 units in the last place, which moves an element to the next whole number now and
    then (5e-4 of the result of 512 rows on an H100); so the quotient is corrected by what it leaves.

    Args:
        bound: The block's largest absolute value.
    """
    quotient = INT8_MAX / bound
    corrected = quotient + rest(INT8_MAX, quotient, bound) * (quotient * (1 / INT8_MAX))
    # The quotient is infinite for subnormal numbers, and what it leaves is no number then.
    usable = bound > _LEAST
    return usable.select(corrected, Scalar.constant(0.0, "f32")), bound * (1 / INT8_MAX)
