"""SplitColumns (of our own): a value cut along its last axis, as one GPU kernel.

    linattn.SplitColumns(x [..., N]) -> [..., N_1], ..., [..., N_n]        attribute sizes: N_1, ..., N_n, sum N

    part_i / norm of each heads_i columns * factors_i                      where attribute heads_i is not 0

    %parts:n = flow.dispatch @split_columns_...[%groups](%rows, %x)         threads move 16 bytes each

The frontend makes it of Split (``frontend.graph.split_columns``). IREE 3.13 copies each part by a kernel of its own,
2 MiB of f16 in 11 us on an H100 by CUDA and in 23 us by Vulkan, where the memory takes 1.5.

A layer's queries and keys are divided by the Euclidean norm of each head when they are apart; that is done on the way,
in f32, by shuffles among the threads that move a head. A head of zeros stays zeros.

Legal: on GPUs, for parts of whole chunks of 16 bytes; norms of heads whose chunks are a power of two that a subgroup
has threads for, where each begins at a multiple of its size in every row. Cost: x once in and once out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from .checks import float_input
from .emit.builder import tensor_type
from .emit.chunk_words import pack, unpack
from .emit.scalar import FLOAT_BITS, Scalar
from .emit.simt_kernel import Buffer, Group, Kernel, dispatch
from .node import Node, TensorSpec
from .op import INTERNAL, Choice, LoweringContext, LoweringOptions, Op
from .target import Target

SPLIT_COLUMNS = "SplitColumns"
_CHUNK_BITS = 128
_THREADS = 128
_LOADS = 4  # chunks of a thread, under way at once


@dataclass(frozen=True)
class SplitColumns:
    """Contract.

    Attributes:
        x: Of f32, f16 or bf16; all sizes known.
        sizes: Columns of each part.
        heads: Columns of a head of each part that is divided by its norm, 0 where it is not.
        factors: What the others of these are multiplied by then.
    """

    x: TensorSpec
    sizes: tuple[int, ...]
    heads: tuple[int, ...]
    factors: tuple[float, ...]

    @property
    def rows(self) -> int:
        """All but the last axis."""
        return math.prod(size or 0 for size in self.x.shape[:-1])

    @property
    def chunks(self) -> list[int]:
        """Chunks of a row of each part."""
        return [size * FLOAT_BITS[self.x.dtype] // _CHUNK_BITS for size in self.sizes]


def is_splittable(x: TensorSpec, sizes: Sequence[int], target: Target) -> bool:
    """Whether the kernel is for such parts, and saves something.

    Parts of one row are where they are already, and those of one token's heads are read where they are.
    """
    whole = all(size > 0 and size * FLOAT_BITS[x.dtype] % _CHUNK_BITS == 0 for size in sizes)
    known = None not in x.shape and math.prod(size or 0 for size in x.shape[: -1 if x.rank < 4 else -2]) > 1
    return target.is_gpu and whole and known and 2 <= len(sizes) < target.limits.bindings


def can_divide(x: TensorSpec, sizes: Sequence[int], heads: Sequence[int], target: Target) -> bool:
    """Whether parts may be divided by the norms of heads of so many columns, 0 where there are none, on the way.

    The threads that shuffle are neighbours from a multiple of their number on: in each row a head has to begin there.
    """
    each = FLOAT_BITS[x.dtype]
    threads = {head * each // _CHUNK_BITS for head in heads if head}
    whole = all(head * each % _CHUNK_BITS == 0 for head in heads)
    starts = itertools.accumulate(sizes, initial=0)
    in_place = all(
        head == 0 or start % head == sum(sizes) % head == 0 for head, start in zip(heads, starts, strict=False)
    )
    return (
        whole
        and in_place
        and len(threads) == 1
        and all(n & (n - 1) == 0 and n <= target.subgroup_size for n in threads)
    )


def parse(node: Node) -> SplitColumns:
    """View the node."""
    sizes = node.attr("sizes", list[int]())
    heads, factors = node.attr("heads", [0] * len(sizes)), node.attr("factors", [1.0] * len(sizes))
    return SplitColumns(float_input(node, 0, "x"), tuple(sizes), tuple(heads), tuple(factors))


def output_types(contract: SplitColumns) -> Sequence[TensorSpec | None]:
    """The parts' types."""
    return [TensorSpec((*contract.x.shape[:-1], size), contract.x.dtype) for size in contract.sizes]


def choose(contract: SplitColumns, target: Target, options: LoweringOptions) -> Choice:
    """There is one way."""
    del target, options
    normed = sum(1 for head in contract.heads if head)
    how = f", {normed} of them divided by the norms of their heads" if normed else ""
    return Choice("fused_simt", f"{len(contract.sizes)} parts in one kernel{how}")


def lower(context: LoweringContext, contract: SplitColumns, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Emit the kernel."""
    (x,) = operands
    assert x is not None
    c, b = contract, context.builder

    def body(k: Kernel) -> None:
        _emit(k, c)

    name = "split_columns_" + "_".join(map(str, c.chunks))
    subgroup = 0
    if any(c.heads):
        subgroup = context.target.subgroup_size
        parts = [f"{head}x{factor.hex()}" if head else "0" for head, factor in zip(c.heads, c.factors, strict=True)]
        name += f"_{c.x.dtype}_by_{'_'.join(parts)}".replace(".", "p").replace("-", "m").replace("+", "")
    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [
        (tensor_type([size or 0 for size in spec.shape], spec.dtype), []) for spec in output_types(c) if spec
    ]
    groups = -(-c.rows * sum(c.chunks) // (_THREADS * _LOADS))
    return dispatch(name, Group(_THREADS, subgroup), 1, b.index(groups), [b.index(c.rows)], [x], outputs, body)


def _emit(k: Kernel, c: SplitColumns) -> None:
    chunks, rows, width = c.chunks, k.number(0), sum(c.chunks)
    x = k.chunks(0, rows * width)
    parts = [k.chunks(1 + i, rows * count) for i, count in enumerate(chunks)]
    starts = [0, *itertools.accumulate(chunks)]
    first, last = k.item() * (_THREADS * _LOADS) + k.thread(), rows * width - 1
    places = [first + i * _THREADS for i in range(_LOADS)]
    for place, value in zip(places, [k.load(x, place.minimum(last)) for place in places], strict=True):
        row, column = place.divide_unsigned(width)
        divided = _divided(k, c, value) if any(c.heads) else []
        for i, (part, start, count) in enumerate(zip(parts, starts, chunks, strict=False)):
            at = row * count + (column - start)
            inside = (place <= last) & (column >= start) & (column < start + count)

            scaled = [k.mul(number, k.constant(c.factors[i])) for number in divided] if c.heads[i] else []

            def write(
                part: Buffer = part, at: Scalar = at, value: ir.Value = value, scaled: list[ir.Value] = scaled
            ) -> None:
                if scaled:
                    value = k.join(scaled) if c.x.dtype == "f32" else pack(k, scaled, c.x.dtype)
                k.store_as_is(value, part, at)

            k.when(inside, write)


def _divided(k: Kernel, c: SplitColumns, chunk: ir.Value) -> list[ir.Value]:
    """The numbers of a chunk over the norm of their head; for all threads, since all take part in shuffles."""
    numbers = k.elements(chunk) if c.x.dtype == "f32" else unpack(k, chunk, c.x.dtype)
    total = k.mul(numbers[0], numbers[0])
    for number in numbers[1:]:
        total = k.fma(number, number, total)
    offset, threads = 1, max(c.heads) // len(numbers)
    while offset < threads:
        total = k.add(total, k.shuffle_xor(total, offset))
        offset *= 2
    inverse = k.select(Scalar(total).equals(0.0), k.constant(0.0), k.rsqrt(total))
    return [k.mul(number, inverse) for number in numbers]


OPS = (Op(INTERNAL, SPLIT_COLUMNS, 1, parse, output_types, lower, choose),)
