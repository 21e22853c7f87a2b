"""NearIds (of our own): token ids or positions, copied to where the device reads them fast.

    linattn.NearIds(ids) -> ids, the same        i64 or i32, whole chunks of 16 bytes

What a call brings lies in the host's memory (``linattn.runtime``'s host buffers), which a GPU reads over its bus at
every use: on an H100 the rotary embedding of 512 tokens by 8 heads took 43 us, since each of its threads asked for a
position, those of 2048 tokens 89, and looking up their rows 27. Read once by a kernel that only copies, all kernels of
512 tokens took 724 us for 771. The frontend puts it behind such inputs of prompts (``frontend.graph.near_ids``).

    %near = flow.dispatch @near_ids[%groups](%chunks, %ids)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from .emit.builder import tensor_type
from .emit.simt_kernel import Group, Kernel, dispatch
from .node import Node, TensorSpec
from .op import INTERNAL, LoweringContext, Op

NEAR_IDS = "NearIds"
_CHUNK = 16
_BYTES = {"i64": 8, "i32": 4}
_THREADS = 128


@dataclass(frozen=True)
class NearIds:
    """Contract.

    Attributes:
        ids: All sizes known.
    """

    ids: TensorSpec


def chunks_of(ids: TensorSpec) -> int:
    """How many chunks ids are; 0 where they are not whole ones, or their sizes are open."""
    if None in ids.shape or ids.dtype not in _BYTES:
        return 0
    count = math.prod(size or 0 for size in ids.shape) * _BYTES[ids.dtype]
    return 0 if count % _CHUNK else count // _CHUNK


def parse(node: Node) -> NearIds:
    """View the node."""
    return NearIds(node.required(0, "ids"))


def output_types(contract: NearIds) -> Sequence[TensorSpec]:
    """The output's type."""
    return [contract.ids]


def lower(context: LoweringContext, contract: NearIds, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Emit the kernel."""
    b, (ids,), chunks = context.builder, operands, chunks_of(contract.ids)
    assert ids is not None

    def body(k: Kernel) -> None:
        count = k.number(0)
        place = (k.item() * _THREADS + k.thread()).minimum(count - 1)
        k.store_as_is(k.load(k.chunks(0, count), place), k.chunks(1, count), place)

    shape = [size or 0 for size in contract.ids.shape]
    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [(tensor_type(shape, contract.ids.dtype), [])]
    groups = b.index(-(-chunks // _THREADS))
    return dispatch("near_ids", Group(_THREADS, 0), 1, groups, [b.index(chunks)], [ids], outputs, body)


OPS = (Op(INTERNAL, NEAR_IDS, 1, parse, output_types, lower),)
