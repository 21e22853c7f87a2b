"""The body of strategy ``fused_simd`` of SelectiveScan for one token: vectors of elements of a channel's state.

    S = exp(step * rate) * S + value * key;   output = the sum over the lanes of query * S

Rates and states are read and written as they lie in memory. The sums over the lanes of some channels are taken at once.
Where groups of channels do not divide those of a workgroup, its last one ends with them, whatever it computes twice.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..emit.kernel_text import Index, KernelText
from .contract import SelectiveScan

_MOST = 8  # channels at once


class OneToken:
    """Value, step and output [B, 1, D], keys and queries [B, 1, N], rates [D * N], states [B, D * N].

    Args:
        k: Where to write.
        c: What is computed.
        share: Channels of a workgroup.
        lanes: Elements of a vector; they divide N.
        memrefs: Operands and results.
    """

    def __init__(self, k: KernelText, c: SelectiveScan, share: int, lanes: int, memrefs: Sequence[str]) -> None:
        self.k, self.c, self.share, self.lanes = k, c, share, lanes
        self.value, self.step, self.rate, self.key, self.query, *rest = memrefs
        self.past = rest.pop(0) if c.has_past else None
        self.output, self.state = rest
        self.together = min(_MOST, lanes, 1 << (share.bit_length() - 1))

    def write(self) -> None:
        """The whole body."""
        k, c, together = self.k, self.c, self.together
        self.batch = k.op("hal.interface.workgroup.id[1] : index", "index")
        group = k.op("hal.interface.workgroup.id[0] : index", "index")
        first = k.minimum(k.mul(group, self.share), c.channels - self.share)
        parts = range(0, c.states, self.lanes)
        self.keys = [k.load(self.key, [self.batch, 0, n], self.lanes) for n in parts]
        self.queries = [k.load(self.query, [self.batch, 0, n], self.lanes) for n in parts]

        def body(offset: str, _: list[str]) -> list[str]:
            start = k.minimum(offset, self.share - together) if self.share % together else offset
            at = [k.add(k.add(first, start), i) for i in range(together)]
            for channel, total in zip(at, k.sum_lanes([self._channel(channel) for channel in at]), strict=True):
                k.store(total, self.output, [self.batch, 0, channel])
            return []

        k.loop(self.share, [], body, step=together)

    def _channel(self, channel: Index) -> str:
        """Writes a channel's state; the products whose sum is its output."""
        k, lanes = self.k, self.lanes
        place = [self.batch, 0, channel]
        step, value = (k.splat(k.load(memref, place), lanes) for memref in (self.step, self.value))
        base = k.mul(channel, self.c.states)
        total = ""
        for i, (key, query) in enumerate(zip(self.keys, self.queries, strict=True)):
            at = k.add(base, i * lanes)
            new = k.mulf(value, key)
            if self.past is not None:
                decay = k.exp(k.mulf(step, k.load(self.rate, [at], lanes)))
                new = k.fma(decay, k.load(self.past, [self.batch, at], lanes), new)
            k.store(new, self.state, [self.batch, at])
            total = k.fma(query, new, total) if total else k.mulf(query, new)
        return total
