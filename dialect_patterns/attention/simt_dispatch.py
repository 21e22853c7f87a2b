"""The dispatch of GPU kernels that go over the keys tile by tile: their operands, and the join of parts of the keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from iree.compiler import ir

from ..emit.builder import Builder, Size, spec_of, tensor_type
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Group, Kernel, dispatch
from ..node import TensorSpec
from ..target import Target
from .core import join_heads
from .simt_call import Call, Sizes
from .simt_join import emit_join

_ENOUGH_GROUPS = 128  # workgroups that keep a large GPU busy
_PART_KEYS = 128  # of the capacity, at least, for each part


@dataclass(frozen=True)
class Tiled:
    """A call as such a kernel has it: bindings of queries, keys, values, bias and sinks where there are, then results.

    Attributes:
        c: What is computed, but for T: calls of several sizes share the kernel.
        n: Its sizes.
        whole: Whether a workgroup of a block of rows goes over all keys; else each over a part of them.
        sink_type: Of the sinks that come in memory, if they do.
        result: Element type of the outputs.
        flat: Whether queries are [B, T, Hq * dk], and the outputs of one part [B, T, Hq * dv].
    """

    c: Call
    n: Sizes
    whole: bool
    sink_type: str
    result: str
    flat: bool = False

    @property
    def sink(self) -> int:
        """Binding of the sinks."""
        return 3 if self.c.bias_dims is None else 4

    @property
    def output(self) -> int:
        """Binding of the first result: the outputs, or maxima and sums of the parts and then their weighted values."""
        return self.sink + bool(self.sink_type)


def emit_tiled(
    kind: str, group: Group, rows: int, body: Callable[[Kernel, Tiled, Scalar], None],
    b: Builder, target: Target, q: ir.Value, k: ir.Value, v: ir.Value, *,
    first: Size, scale: float, softcap: float, left: int | None, sink: ir.Value | None,
    bias: ir.Value | None, heads: int | None = None,
) -> ir.Value:  # fmt: skip
    """[B, Hq, T, dv] from q [B, Hq, T, dk] and the cache k, v [B, Hkv, S, d]; query i sees the keys up to first + i.

    Args:
        kind: The kernel's word.
        group: Its threads.
        rows: Rows of a key head (its query heads and their tokens) of a workgroup.
        body: Emits it, of the call and the position of the first query.
        b: The builder.
        target: To compile for.
        q: Queries.
        k: Keys.
        v: Values.
        first: Position of the first query.
        scale: Factor on q . k.
        softcap: c in c * tanh(s / c), 0 for none.
        left: How many keys before its own position a query sees, None for all.
        sink: What the softmax of each query head sees beside its keys [Hq], or None.
        bias: What a mask adds to scores, or None.
        heads: Hq of queries [B, T, Hq * dk], whose result is [B, T, Hq * dv]; None for others.
    """
    c, flat = Call.of(q, k, v, scale, softcap, left, bias, heads), heads is not None
    key_heads, result = c.batch * c.kv_heads, spec_of(q).dtype
    blocks = -(-c.rows // rows)
    parts = max(1, min(_ENOUGH_GROUPS // (key_heads * blocks), c.keys // _PART_KEYS))
    sink_type = spec_of(sink).dtype if sink is not None and parts == 1 else ""

    def emit(kernel: Kernel) -> None:
        n = Sizes(*(kernel.number(i) for i in range(3)))
        position = Scalar.constant(first, "index") if isinstance(first, int) else kernel.number(3)
        body(kernel, Tiled(c, n, parts == 1, sink_type, result, flat), position)

    inputs = [b.cast(q, c.dtype), k, v, *([] if bias is None else [bias])]
    inputs += [sink] if sink is not None and sink_type else []
    lead = (f"at{first}_" if isinstance(first, int) else "") + (f"sink{sink_type}_" if sink_type else "")
    lead += "flat_" if flat else ""
    y = TensorSpec(c.shape, result)
    whole = TensorSpec((c.batch, c.tokens, c.kv_heads * c.group * c.dv), result) if flat else y
    specs = [whole] if parts == 1 else [TensorSpec((key_heads, parts, c.rows, size), "f32") for size in (2, c.dv)]
    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [(tensor_type(s.shape, s.dtype), []) for s in specs]
    numbers = [b.index(size) for size in (c.tokens, c.rows, parts)] + ([] if isinstance(first, int) else [first])
    name = f"attention_{kind}_{lead}{c.named('n')}{'' if parts == 1 else '_parts'}_{result}"
    found = dispatch(name, group, b.index(blocks * parts), b.index(key_heads), numbers, inputs, outputs, emit)
    if parts == 1:
        return found[0]
    y = emit_join(b, target, c, parts, found, sink, y)
    return join_heads(b, y) if flat else y
