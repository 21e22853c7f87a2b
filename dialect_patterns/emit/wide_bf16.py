"""bf16 to f32 and back by integer operations, for IREE's own kernels on GPUs that have no bf16.

IREE 3.13 turns bf16 into 16-bit integers late. What it had made of loads and stores of vectors by then is no legal
SPIR-V ("failed to legalize operation 'vector.bitcast'"): products, and reductions whose result is stored as bf16. Here
kernels see integers in memory, and their numbers are f32.

    %bits = flow.tensor.bitcast %x : bf16 -> i16
    %y = flow.tensor.bitcast (extui(%bits) << 16) : i32 -> f32

A kernel of its own makes the words: fused into a product of 8 heads of 32 it took more memory than a workgroup has.
"""

from __future__ import annotations

from iree.compiler import ir
from iree.compiler.dialects import arith

from .builder import LETTERS, Builder, spec_of, tensor_type
from .scalar import Scalar, element_type

_HALF = 16


def widened(b: Builder, value: ir.Value) -> ir.Value:
    """A tensor of bf16 as f32; others as they are."""
    spec = spec_of(value)
    if spec.dtype != "bf16":
        return value

    def widen(bits: Scalar) -> Scalar:
        return Scalar(arith.ShLIOp(bits.to("i32", unsigned=True).value, b.constant(_HALF, "i32").value).result)

    letters = LETTERS[: spec.rank]
    words = b.map(f"{letters}->{letters}", widen, _view(b, value, "i16"), dtype="i32")
    return _view(b, words, "f32")


def narrowed(b: Builder, value: ir.Value) -> ir.Value:
    """A tensor of f32 as bf16, rounded as `rounded_bits` does."""
    letters = LETTERS[: spec_of(value).rank]
    return _view(b, b.map(f"{letters}->{letters}", rounded_bits, value, dtype="i16"), "bf16")


def rounded_bits(x: Scalar) -> Scalar:
    """The bits of the bf16 next to an f32, halves to even, as i16; NaN stays NaN."""
    bits = Scalar(arith.BitcastOp(element_type("i32"), x.value).result)
    high = bits.shift_right(_HALF)
    rounded = (bits + (high & 1) + 0x7FFF).shift_right(_HALF)
    return x.equals(x).select(rounded, high | 0x40).to("i16")


def _view(b: Builder, value: ir.Value, dtype: str) -> ir.Value:
    """The same bytes as elements of another type of as many bits."""
    shape = spec_of(value).shape
    sizes = [b.index(b.dim(value, axis)) for axis, size in enumerate(shape) if size is None]
    attributes = {"operandSegmentSizes": ir.DenseI32ArrayAttr.get([1, len(sizes), len(sizes)])}
    return ir.Operation.create(
        "flow.tensor.bitcast",
        results=[tensor_type(shape, dtype)],
        operands=[value, *sizes, *sizes],
        attributes=attributes,
    ).result
