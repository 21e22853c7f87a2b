"""The operator entry of TensorScatter: one loop over the cache, as linalg, on every target.

    %y = linalg.generic ins(%past, %write_indices) {
      %t = s - %index;  0 <= %t < T ? tensor.extract %update[..., %t, ...] : %past }

No index leaves the update, whatever the write indices are. Cost: the cache once; a state is written to another buffer
than it is read from all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir

from ..emit.builder import LETTERS
from ..emit.scalar import Scalar
from ..op import Choice, LoweringContext, LoweringOptions, Op
from ..select import Strategy, always, select, wherever_legal
from ..target import Target
from .contract import TensorScatter, output_types, parse

_MOST = (1 << 31) - 1

STRATEGIES = (Strategy("direct", always, wherever_legal("one loop over the cache")),)


def choose(contract: TensorScatter, target: Target, options: LoweringOptions) -> Choice:
    """There is one way; what is forced on the state operators says nothing here."""
    return select(STRATEGIES, contract, target, LoweringOptions(chunk_size=options.chunk_size), contract.where)


def lower(context: LoweringContext, contract: TensorScatter, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Emit the node."""
    b, c = context.builder, contract
    past, update = operands[:2]
    indices = operands[2] if c.with_indices else None
    assert past is not None
    assert update is not None
    if c.cache.shape.count(0) or c.update.shape[c.axis] == 0:
        return [past]
    letters = LETTERS[: c.cache.rank]
    rows, new = (Scalar(b.index(b.dim(value, c.axis))).to("i64") for value in (past, update))

    def element(old: Scalar, index: Scalar | None = None) -> Scalar:
        place = b.loop_index(c.axis).to("i64")
        if index is not None and c.circular:
            # Devices without 64-bit integers have no remainder of them; no cache has seen 2^31 tokens.
            start = index.minimum(_MOST).maximum(-_MOST).to("i32") % rows.to("i32")
            start = start.to("i64")
            place = place - (start < 0).select(start + rows, start)
            place = (place < 0).select(place + rows, place)
        elif index is not None:
            place = place - index
        inside = (place >= 0) & (place < new)
        places = [b.loop_index(axis) for axis in range(c.cache.rank)]
        places[c.axis] = place.minimum(new - 1).maximum(0).to("index")
        return inside.select(b.load(update, *places), old)

    if indices is None:
        return [b.map(f"{letters}->{letters}", lambda old: element(old), past)]
    return [b.map(f"{letters},{letters[0]}->{letters}", lambda old, index: element(old, index), past, indices)]


OPS = (Op("", "TensorScatter", 24, parse, output_types, lower, choose),)
