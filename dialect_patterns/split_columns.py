"""SplitColumns (of our own): a value cut along its last axis, as one GPU kernel.

    linattn.SplitColumns(x [..., N]) -> [..., N_1], ..., [..., N_n]        attribute sizes: N_1, ..., N_n, sum N

    %parts:n = flow.dispatch @split_columns_...[%groups](%rows, %x)         threads move 16 bytes each

The frontend makes it of Split (``frontend.graph.split_columns``). IREE 3.13 copies each part by a kernel of its own,
2 MiB of f16 in 11 us on an H100 by CUDA and in 23 us by Vulkan, where the memory takes 1.5.

Legal: on GPUs, for parts of whole chunks of 16 bytes. Cost: x once in and once out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from .checks import float_input
from .emit.builder import tensor_type
from .emit.scalar import FLOAT_BITS
from .emit.simt_kernel import Group, Kernel, dispatch
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
    """

    x: TensorSpec
    sizes: tuple[int, ...]

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


def parse(node: Node) -> SplitColumns:
    """View the node."""
    sizes = node.attr("sizes", list[int]())
    return SplitColumns(float_input(node, 0, "x"), tuple(sizes))


def output_types(contract: SplitColumns) -> Sequence[TensorSpec | None]:
    """The parts' types."""
    return [TensorSpec((*contract.x.shape[:-1], size), contract.x.dtype) for size in contract.sizes]


def choose(contract: SplitColumns, target: Target, options: LoweringOptions) -> Choice:
    """There is one way."""
    del target, options
    return Choice("fused_simt", f"{len(contract.sizes)} parts in one kernel")


def lower(context: LoweringContext, contract: SplitColumns, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Emit the kernel."""
    (x,) = operands
    assert x is not None
    c, b = contract, context.builder

    def body(k: Kernel) -> None:
        _emit(k, c.chunks)

    name = "split_columns_" + "_".join(map(str, c.chunks))
    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [
        (tensor_type([size or 0 for size in spec.shape], spec.dtype), []) for spec in output_types(c) if spec
    ]
    groups = -(-c.rows * sum(c.chunks) // (_THREADS * _LOADS))
    return dispatch(name, Group(_THREADS, 0), 1, b.index(groups), [b.index(c.rows)], [x], outputs, body)


def _emit(k: Kernel, chunks: Sequence[int]) -> None:
    rows, width = k.number(0), sum(chunks)
    x = k.chunks(0, rows * width)
    parts = [k.chunks(1 + i, rows * count) for i, count in enumerate(chunks)]
    starts = [0, *itertools.accumulate(chunks)]
    first, last = k.item() * (_THREADS * _LOADS) + k.thread(), rows * width - 1
    places = [(first + i * _THREADS).minimum(last) for i in range(_LOADS)]
    for place, value in zip(places, [k.load(x, place) for place in places], strict=True):
        row, column = place.divide_unsigned(width)
        for part, start, count in zip(parts, starts, chunks, strict=False):
            at = row * count + (column - start)
            inside = (column >= start) & (column < start + count)
            k.when(inside, lambda value=value, part=part, at=at: k.store_as_is(value, part, at))


OPS = (Op(INTERNAL, SPLIT_COLUMNS, 1, parse, output_types, lower, choose),)
