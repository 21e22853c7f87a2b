"""The two dispatches of LinearAttention by chunks on GPUs, which their strategies fill.

%factors = flow.dispatch @..._factors_...[%chunks](sizes, %query, %key, %decay, %beta)   all chunks at once
%output, %present = flow.dispatch @..._chunks_...[%streams](sizes, %query, %key, %value, %past, %factors)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from iree.compiler import ir

from ..emit.builder import Size, tensor_type
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Group, Kernel, dispatch
from ..op import LoweringContext
from .contract import LinearAttention, output_specs
from .operands import Operands

Emit = Callable[[Kernel, Scalar, Scalar], None]
"""Emits a kernel, given its streams and T."""


@dataclass(frozen=True)
class ChunkKernels:
    """What a strategy puts into the dispatches.

    Attributes:
        name: What their names begin with.
        chunk: Tokens of a chunk.
        record: f32 numbers that the first leaves of a chunk.
        factors_group: The first's workgroup, of which each takes a chunk.
        factors: The first.
        group: The second's workgroup.
        tiles: Its workgroups a stream.
        chunks: The second.
        reads_decay: Whether the second reads the decays, too.
    """

    name: str
    chunk: int
    record: int
    factors_group: Group
    factors: Emit
    group: Group
    tiles: int
    chunks: Emit
    reads_decay: bool = False


def emit_chunks(
    context: LoweringContext, c: LinearAttention, x: Operands, streams: Size, tokens: Size, kernels: ChunkKernels
) -> list[ir.Value]:
    """Emit output and present state.

    Args:
        context: Where.
        c: The operator.
        x: Its operands.
        streams: Which the second kernel goes through one by one.
        tokens: T; an int is written into the kernels, a value is a number that they are given, known or not.
        kernels: The kernels.
    """
    b, n = context.builder, kernels
    numbers = [size for size in (streams, tokens) if not isinstance(size, int)]

    def sizes(k: Kernel) -> tuple[Scalar, Scalar]:
        given = iter(range(len(numbers)))
        first, second = (
            Scalar.constant(size, "index") if isinstance(size, int) else k.number(next(given))
            for size in (streams, tokens)
        )
        return first, second

    def output(shape: list[Size], dtype: str) -> tuple[ir.RankedTensorType, list[ir.Value]]:
        static = [size if isinstance(size, int) else None for size in shape]
        return tensor_type(static, dtype), [size for size in shape if not isinstance(size, int)]

    items = b.mul(streams, b.ceil_div(x.tokens, n.chunk))
    inputs = [value for value in (x.query, x.key, x.decay, x.beta) if value is not None]
    (factors,) = dispatch(
        f"{n.name}_factors", n.factors_group, 1, b.index(items), numbers, inputs, [output([items, n.record], "f32")],
        lambda k: n.factors(k, *sizes(k)),
    )  # fmt: skip
    result, present = output_specs(c)
    outputs = [
        output([x.batch, x.tokens, c.out_heads * c.dv], result.dtype),
        output([x.batch, c.kv_heads, c.dk, c.dv], present.dtype),
    ]
    decay = x.decay if n.reads_decay else None
    inputs = [value for value in (x.query, x.key, x.value, x.past, decay, factors) if value is not None]
    return dispatch(
        f"{n.name}_chunks", n.group, n.tiles, b.index(streams), numbers, inputs, outputs,
        lambda k: n.chunks(k, *sizes(k)),
    )  # fmt: skip
