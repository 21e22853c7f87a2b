"""The loop over the output that both strategies have, as linalg."""

from __future__ import annotations

from collections.abc import Callable

from iree.compiler import ir

from ..emit.builder import Builder, Size
from ..emit.scalar import Scalar
from .contract import GatherColumns


def emit_columns(
    b: Builder, contract: GatherColumns, indices: ir.Value, load: Callable[[Scalar, Scalar], Scalar]
) -> ir.Value:
    """The columns that the indices name, [indices..., K].

    Args:
        b: Emits ops.
        contract: The node.
        indices: The node's indices; clamped to the columns that there are.
        load: The weight at a row and column, both index scalars.
    """
    c, shape = contract, b.shape(indices)
    flat = b.collapse(indices, 0, len(shape) - 1) if len(shape) > 1 else indices

    def element(index: Scalar) -> Scalar:
        counted = (index < 0).select(index + c.columns, index)
        return load(b.loop_index(1), counted.minimum(c.columns - 1).maximum(0).to("index"))

    equation, sizes = ("n->nk", dict[str, Size]()) if shape else ("->nk", dict[str, Size](n=1))
    y = b.map(equation, element, flat, dtype=c.weight.dtype, sizes=sizes | {"k": c.depth})
    if len(shape) == 1:
        return y
    return b.expand(y, 0, shape) if shape else b.collapse(y, 0, 1)
