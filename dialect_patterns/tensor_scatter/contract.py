"""The contract of TensorScatter (ai.onnx 24): a cache with the rows of an update in it.

    output[b, ..., s, ...] = update[b, ..., s - write_indices[b], ...]      where that is a row of the update
                             past_cache[b, ..., s, ...]                     elsewhere

In mode ``circular``, s - write_indices[b] is taken modulo the cache's rows; in mode ``linear`` an update has to fit,
and what does not is not written.
Source: ONNX schema TensorScatter-24.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import only_attributes, require_dtype, require_shape
from ..node import Node, TensorSpec


@dataclass(frozen=True)
class TensorScatter:
    """Contract.

    Attributes:
        where: The node, as errors name it.
        cache: [B, ..., S, ...] of any type.
        update: The same but for its T rows.
        axis: Where S and T are; not 0.
        circular: Whether rows beyond the end are the first ones.
        with_indices: Whether input 2 is there; from row 0 on if not.
    """

    where: str
    cache: TensorSpec
    update: TensorSpec
    axis: int
    circular: bool
    with_indices: bool


def parse(node: Node) -> TensorScatter:
    """Check the node; see the contract."""
    only_attributes(node, "axis", "mode")
    cache, update, indices = node.required(0, "past_cache"), node.required(1, "update"), node.input(2)
    axis, mode = node.attr("axis", -2), node.attr("mode", "linear")
    if not -cache.rank <= axis < cache.rank or axis % cache.rank == 0:
        raise node.error("attribute 'axis'", got=axis, expected=f"an axis of {cache}, not the first")
    if mode not in ("linear", "circular"):
        raise node.error("attribute 'mode'", got=repr(mode), expected="'linear' or 'circular'")
    axis %= cache.rank
    require_dtype(node, "update", update, cache.dtype)
    require_shape(node, "update", update, (*cache.shape[:axis], None, *cache.shape[axis + 1 :]))
    rows, new = cache.shape[axis], update.shape[axis]
    if rows is not None and new is not None and new > rows:
        raise node.error("input 'update' has more rows than the cache", got=new, expected=f"at most {rows}")
    if indices is not None:
        require_dtype(node, "write_indices", indices, "i64")
        require_shape(node, "write_indices", indices, (cache.shape[0],))
    return TensorScatter(node.where, cache, update, axis, mode == "circular", indices is not None)


def output_types(contract: TensorScatter) -> Sequence[TensorSpec]:
    """The output's type."""
    return [contract.cache]
