"""The convolution before LinearAttention of one token, by the threads of the workgroup that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer, Kernel
from .contract import LinearAttention
from .fused_simt_plan import Plan

CHANNELS = 4
"""Of a thread at once."""


@dataclass(frozen=True)
class Convolution:
    """The convolution that queries, keys and values are the columns of (``convolved.py``).

    Attributes:
        taps: Of it.
        is_silu: Whether SiLU comes after it.
        has_bias: Whether there is a bias.
        channels: Of queries, keys and values.
    """

    taps: int
    is_silu: bool
    has_bias: bool
    channels: int

    def __str__(self) -> str:
        return f"_conv{self.taps}{'s' if self.is_silu else ''}{'b' if self.has_bias else ''}"


class Convolved:
    """Emits it.

    Args:
        k: Emits instructions.
        contract: What reads it.
        plan: The work of a thread.
        convolution: What is computed.
        buffers: Input, weight, bias where there is one, past and present state.
    """

    def __init__(
        self, k: Kernel, contract: LinearAttention, plan: Plan, convolution: Convolution, buffers: Sequence[Buffer]
    ) -> None:
        self.k, self.c, self.p, self.convolution = k, contract, plan, convolution
        self.input, self.weight, *bias, self.past, self.present = buffers
        self.bias = bias[0] if bias else None
        self.each, self.columns = contract.dk // CHANNELS, plan.tile // CHANNELS
        self.rows = k.shared_chunks((contract.rows + 1) * self.each)  # of queries, then of the key
        self.row = k.shared(plan.tile)  # of values

    @property
    def found(self) -> list[Buffer]:
        """Where queries, keys and values are: as f32, in the workgroup's memory."""
        return [self.rows, self.rows, Buffer(self.row.value, "f32", self.p.columns)]

    def emit(self, batch: Scalar, head: Scalar) -> None:
        """Convolve what the workgroup needs, and write its part of the convolution's state."""
        k, c, each = self.k, self.c, self.each
        units = (c.rows + 1) * each + self.columns
        share, heads_of_key = c.out_heads // c.q_heads, c.kv_heads // c.k_heads
        is_first, values = k.tile().equals(0), (c.q_heads + c.k_heads) * each
        key, rest = head.divide_unsigned(heads_of_key)
        own_key = is_first & rest.equals(0)
        for start in range(0, units, self.p.threads):
            unit = k.thread() + start
            valid, unit = unit < units, unit.minimum(units - 1)
            member, part = unit.divide_unsigned(each)
            query, other = (head * c.rows + member.minimum(c.rows - 1)).divide_unsigned(share)
            is_query, is_key = member < c.rows, member.equals(c.rows)
            column = (k.tile() * self.columns + (unit - (c.rows + 1) * each)).maximum(0)
            inside = column < c.dv // CHANNELS
            of_value = values + head * (c.dv // CHANNELS) + column.minimum(c.dv // CHANNELS - 1)
            of_key = (key + c.q_heads) * each + part
            channel = is_query.select(query * each + part, is_key.select(of_key, of_value))
            owns = (is_query & is_first & other.equals(0)) | (is_key & own_key)
            owns = owns | (unit >= (c.rows + 1) * each) & inside
            self._four(batch, channel, unit, valid, owns)
        k.barrier()

    def values(self, lane: Scalar, place: Scalar) -> tuple[list[list[ir.Value]], list[ir.Value], ir.Value]:
        """What a thread needs of queries, key and values."""
        k, p = self.k, self.p

        def part(row: int) -> list[ir.Value]:
            return [k.load(self.rows, lane + (row * self.each + i * p.lanes)) for i in range(p.loads)]

        value = k.join([k.load(self.row, place * p.columns + i) for i in range(p.columns)])
        return [part(row) for row in range(self.c.rows)], part(self.c.rows), value

    def _four(self, batch: Scalar, channel: Scalar, unit: Scalar, valid: Scalar, owns: Scalar) -> None:
        """Four channels, of which ``channel`` is the number: into the memory, and their state."""
        k, taps, before = self.k, self.convolution.taps, self.convolution.taps - 1
        chunks = self.convolution.channels // CHANNELS

        def elements(buffer: Buffer, first: Scalar, count: int) -> list[ir.Value]:
            stored = [k.load(buffer, first + i) for i in range(count)]
            return [element for one in stored for element in k.elements(k.widen(buffer, one))]

        new = elements(self.input, batch * chunks + channel, 1)
        weights = elements(self.weight, channel * taps, taps)
        state = (batch * chunks + channel) * before
        past = elements(self.past, state, before)
        totals = elements(self.bias, channel, 1) if self.bias is not None else [None] * CHANNELS
        kept: list[ir.Value] = []
        found: list[ir.Value] = []
        for i, bias in enumerate(totals):
            window, total = [*past[i * before : (i + 1) * before], new[i]], bias
            for value, weight in zip(window, weights[i * taps : (i + 1) * taps], strict=True):
                total = k.mul(value, weight) if total is None else k.fma(value, weight, total)
            assert total is not None
            if self.convolution.is_silu:
                total = k.div(total, k.add(k.exp(k.neg(total)), k.constant(1.0)))
            found.append(total)
            kept += window[1:]
        rows = (self.c.rows + 1) * self.each

        def put_value() -> None:
            for i, value in enumerate(found):
                k.store(value, self.row, (unit - rows) * CHANNELS + i)

        def keep() -> None:
            for i in range(before):
                k.store(k.join(kept[i * CHANNELS : (i + 1) * CHANNELS]), self.present, state + i)

        k.when(valid & (unit < rows), lambda: k.store(k.join(found), self.rows, unit))
        k.when(valid & (unit >= rows), put_value)
        k.when(valid & owns, keep)
