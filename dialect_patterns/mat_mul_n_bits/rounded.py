"""A as MatMulNBits computes with it: filled up to whole blocks and, where the contract says so, rounded to int8.

    %bound = linalg.generic {max |a| of each block}                          // "mkj->mk"
    %a     = linalg.generic {round(a * (127 / bound)) * (bound / 127)}       // "mkj,mk->mkj"

This is the portable form; ``rounded_simt`` is the GPU kernels' own.
"""

from __future__ import annotations

from iree.compiler import ir

from ..emit.builder import Builder, spec_of
from ..emit.scalar import Scalar
from .contract import INT8_MAX, MatMulNBits


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
        step = bound / INT8_MAX
        inverse = step.equals(0.0).select(b.constant(0.0, "f32"), INT8_MAX / bound)
        return (value.to("f32") * inverse).round_even() * step

    bound = b.reduce("mkj->mk", largest, blocks, initial=0.0)
    return b.collapse(b.map("mkj,mk->mkj", round_to_step, blocks, bound, dtype="f32"), 1, 2)
