"""The body of strategy ``fused_simd`` of SelectiveScan for many tokens: a vector of channels, token after token.

    for t:  for n:  S_n = exp(step_t * rate_n) * S_n + value_t * key_tn;   output_t = sum_n query_tn * S_n

Step, value, output and each S_n are vectors over channels; keys and queries are numbers that all lanes share. A group
of elements of the state stays in registers over all tokens; where there are more of them, the next group adds its part
to the output. States and rates lie in memory element after element, channel after channel, so they are transposed on
the way in and out. Where vectors do not divide the channels, the last one ends with them, whatever it computes twice;
where outputs are added up in memory that is the same workgroup's as the vector before, or the two would add to one sum.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..emit.kernel_text import Index, KernelText
from .contract import SelectiveScan

_GROUP = 16  # elements of a state in registers
_SUMS = 4  # partial sums of an output, so that they do not wait for each other


def adds_in_memory(contract: SelectiveScan, lanes: int) -> bool:
    """Whether sums of channels that two vectors share pass through memory."""
    return contract.channels % lanes != 0 and contract.states > _GROUP


class Tokens:
    """Value, step and output [B, T, D], keys and queries [B, T, N], rates [D * N], states [B, D * N].

    Args:
        k: Where to write.
        c: What is computed.
        lanes: Channels of a vector, and of a workgroup.
        tokens: T.
        memrefs: Operands and results.
    """

    def __init__(self, k: KernelText, c: SelectiveScan, lanes: int, tokens: Index, memrefs: Sequence[str]) -> None:
        self.k, self.c, self.lanes, self.tokens = k, c, lanes, tokens
        self.value, self.step, self.rate, self.key, self.query, *rest = memrefs
        self.past = rest.pop(0) if c.has_past else None
        self.output, self.state = rest

    def write(self) -> None:
        """The whole body."""
        k, c, lanes = self.k, self.c, self.lanes
        self.batch = k.op("hal.interface.workgroup.id[1] : index", "index")
        group = k.op("hal.interface.workgroup.id[0] : index", "index")
        self.rates = k.alloca([c.states, lanes])

        def vector(i: Index, _: list[str]) -> list[str]:
            self._vector(k.minimum(k.mul(k.add(group, i), lanes), c.channels - lanes))
            return []

        if adds_in_memory(c, lanes):
            last = c.channels // lanes - 1
            k.loop(k.add(k.div(group, last), 1) if last else 2, [], vector)
        else:
            vector(0, [])

    def _vector(self, first: Index) -> None:
        """All tokens of some channels, from ``first`` on."""
        k, c, lanes = self.k, self.c, self.lanes
        self.first = first
        base = k.mul(first, c.states)
        for n, vector in enumerate(self._by_element(self._loaded(self.rate, [], base))):
            k.store(vector, self.rates, [n, 0])
        if self.past is not None:
            state = self._by_element(self._loaded(self.past, [self.batch], base))
        else:
            state = [k.constant(0.0, f"vector<{lanes}xf32>")] * c.states
        last: list[str] = []
        for start in range(0, c.states, _GROUP):
            last += self._group(start, state[start : start + _GROUP])
        for i, vector in enumerate(self._by_channel(last)):
            k.store(vector, self.state, [self.batch, k.add(base, i * lanes)])

    def _group(self, start: int, state: list[str]) -> list[str]:
        """All tokens for some elements of the state; these after the last token."""
        k, lanes = self.k, self.lanes

        def token(t: str, carried: list[str]) -> list[str]:
            place = [self.batch, t, self.first]
            step, value = k.load(self.step, place, lanes), k.load(self.value, place, lanes)
            sums = [k.load(self.output, place, lanes)] if start else []
            following: list[str] = []
            for i, old in enumerate(carried):
                n = start + i
                decay = k.exp(k.mulf(step, k.load(self.rates, [n, 0], lanes)))
                key = k.splat(k.load(self.key, [self.batch, t, n]), lanes)
                new = k.fma(decay, old, k.mulf(value, key))
                query = k.splat(k.load(self.query, [self.batch, t, n]), lanes)
                if len(sums) < _SUMS:
                    sums.append(k.mulf(query, new))
                else:
                    sums[i % _SUMS] = k.fma(query, new, sums[i % _SUMS])
                following.append(new)
            while len(sums) > 1:
                sums = [k.addf(*sums[:2]), *sums[2:]]
            k.store(sums[0], self.output, place)
            return following

        return k.loop(self.tokens, state, token)

    # ---- from channel after channel to element after element, and back ----------------------------------------------
    def _loaded(self, memref: str, lead: Sequence[Index], base: Index) -> list[str]:
        k, lanes = self.k, self.lanes
        return [k.load(memref, [*lead, k.add(base, i * lanes)], lanes) for i in range(self.c.states)]

    def _by_element(self, vectors: list[str]) -> list[str]:
        """Vectors that hold the states of ``lanes`` channels one after the other, as vectors of one element each.

        Each turn shuffles the second half of all numbers into the first: the highest bit of a channel's number becomes
        the lowest bit of the place.
        """
        k, lanes, half = self.k, self.lanes, len(vectors) // 2
        low = [i // 2 + lanes * (i % 2) for i in range(lanes)]
        high = [place + lanes // 2 for place in low]
        for _ in range(lanes.bit_length() - 1):
            vectors = [
                k.shuffle(one, other, mask)
                for one, other in zip(vectors[:half], vectors[half:], strict=True)
                for mask in (low, high)
            ]
        return vectors

    def _by_channel(self, vectors: list[str]) -> list[str]:
        """The inverse of :meth:`_by_element`."""
        k, lanes = self.k, self.lanes
        even = [2 * i for i in range(lanes)]
        odd = [place + 1 for place in even]
        for _ in range(lanes.bit_length() - 1):
            pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
            vectors = [k.shuffle(one, other, mask) for mask in (even, odd) for one, other in pairs]
        return vectors
