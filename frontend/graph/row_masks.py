"""Whether the rows of a batch may be of different lengths: whether the attention mask hides a row's columns from it."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from .schema import domain_of
from .states import StatePair

_SIZES = frozenset({"Shape", "Size"})
_MASK_PORT = 3


def has_row_masks(graph: onnx.GraphProto, pairs: Sequence[StatePair]) -> bool:
    """Whether a shorter row can stand at the end of the columns, behind masked ones, and be as if it were alone.

    That is so without KV caches, unless positions are given by the number of tokens. With caches, every node that reads
    one must be an ``Attention`` with a mask that is computed from the values of ``attention_mask``, and positions must
    be an input: GroupQueryAttention has no mask, its rows are all as long as the cache is filled.

    Args:
        graph: The model's.
        pairs: Its states.
    """
    inputs = {value.name for value in graph.input}
    caches = {pair.past for pair in pairs if pair.kind == "kv_cache"}
    if not caches:
        return "position_ids" not in inputs or "attention_mask" in inputs
    if not {"attention_mask", "position_ids"} <= inputs:
        return False
    masks = {"attention_mask"}
    for node in graph.node:
        if node.op_type not in _SIZES and not masks.isdisjoint(node.input):
            masks.update(node.output)
    readers = [node for node in graph.node if not caches.isdisjoint(node.input)]
    return all(
        node.op_type == "Attention" and domain_of(node) == "" and len(node.input) > _MASK_PORT
        and node.input[_MASK_PORT] in masks
        for node in readers
    )  # fmt: skip
