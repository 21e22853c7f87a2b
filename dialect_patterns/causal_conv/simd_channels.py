"""The body of strategy ``fused_simd`` where the channels lie side by side: some channels of one batch row, any T.

L = (k - 1) * dilation tokens of state; padded = past state followed by the input.

    y_t = act(bias + sum_j w_j padded[t + j * dilation])          present state = padded[T : T + L]

So projections leave their rows and attention takes its own; models put a transpose before and behind the operator,
which this form leaves out. A vector holds channels of one token. Weights and past state are turned once, to the stack.
Where vectors do not divide the channels of a workgroup, its last vector ends with them, whatever it computes twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..emit.kernel_text import Index, KernelText
from .contract import CausalConv
from .simd_kernel import activate, own_channels


class ChannelsBody:
    """Input and output [B, T, C], states [B, C * L], weight [C * k].

    Args:
        k: Where to write.
        c: What is computed.
        channels: Of a workgroup; the last one does what is left, at least ``lanes``.
        lanes: Of a vector.
        tokens: T.
        memrefs: Input, weight, bias (if any), past state (if any), output, present state.
    """

    def __init__(
        self, k: KernelText, c: CausalConv, channels: int, lanes: int, tokens: Index, memrefs: Sequence[str]
    ) -> None:
        self.k, self.c, self.lanes, self.tokens = k, c, lanes, tokens
        given = iter(memrefs)
        self.x, self.weight = next(given), next(given)
        self.bias = next(given) if c.has_bias else None
        self.past = next(given) if c.has_past else None
        self.output, self.state = next(given), next(given)
        self.batch, self.first = own_channels(k, channels)
        even = c.channels % channels == 0
        self.count = channels if even else k.minimum(channels, k.sub(c.channels, self.first))
        self.taps = k.alloca([c.kernel, channels])
        self.old = k.alloca([c.state_length, channels])

    def write(self) -> None:
        """The whole body."""
        k, length = self.k, self.c.state_length
        self._each_vector(self._turn)
        for t in range(length if not isinstance(self.tokens, int) else min(length, self.tokens)):
            self._when(k.less(t, self.tokens), isinstance(self.tokens, int), lambda t=t: self._token(t))

        def token(t: str, _: list[str]) -> list[str]:
            self._token(t)
            return []

        if not isinstance(self.tokens, int) or self.tokens > length:
            k.loop(self.tokens, [], token, start=length)
        self._each_vector(self._next_state)

    def _when(self, condition: str, always: bool, body: Callable[[], None]) -> None:
        def then() -> list[str]:
            body()
            return []

        if always:
            body()
        else:
            self.k.when(condition, [], then, lambda: [])

    def _each_vector(self, body: Callable[[Index], None]) -> None:
        def once(offset: Index, _: list[str]) -> list[str]:
            body(offset)
            return []

        k, lanes = self.k, self.lanes
        whole = k.mul(k.div(self.count, lanes), lanes)
        k.loop(whole, [], once, step=lanes)
        if whole != self.count:
            uneven = isinstance(self.count, int)
            self._when("" if uneven else k.less(whole, self.count), uneven, lambda: body(k.sub(self.count, lanes)))

    def _turn(self, offset: Index) -> None:
        """Weights and past state of some channels to the stack."""
        k, c, lanes = self.k, self.c, self.lanes
        at = k.add(self.first, offset)

        def scatter(memref: str, start: Sequence[Index], step: int, target: str) -> None:
            values = k.load(memref, start, lanes * step, raw=True)
            for j in range(step):
                lane = k.shuffle(values, values, [j + step * i for i in range(lanes)])
                k.store(k.widen(lane), target, [j, offset])

        scatter(self.weight, [k.mul(at, c.kernel)], c.kernel, self.taps)
        if self.past is not None:
            scatter(self.past, [self.batch, k.mul(at, c.state_length)], c.state_length, self.old)
            return
        for j in range(c.state_length):
            k.store(k.constant(0.0, f"vector<{lanes}xf32>"), self.old, [j, offset])

    def _token(self, t: Index) -> None:
        """One token; an int, where it needs the past state."""

        def vector(offset: Index) -> None:
            k, c, lanes = self.k, self.c, self.lanes
            at = k.add(self.first, offset)
            k.prefetch(self.x, [self.batch, k.add(t, 2), at])
            total = None if self.bias is None else k.load(self.bias, [at], lanes)
            for j in range(c.kernel):
                tap = self._padded(k.add(t, j * c.dilation), offset, old=isinstance(t, int))
                weight = k.load(self.taps, [j, offset], lanes)
                total = k.mulf(tap, weight) if total is None else k.fma(tap, weight, total)
            assert total is not None
            k.store(activate(k, c, total), self.output, [self.batch, t, at])

        self._each_vector(vector)

    def _padded(self, place: Index, offset: Index, *, old: bool) -> str:
        """Element ``place`` of the padded input of some channels, which may lie in the past state if ``old``."""
        k, length = self.k, self.c.state_length
        if old and isinstance(place, int) and place < length:
            return k.load(self.old, [place, offset], self.lanes)
        return k.load(self.x, [self.batch, k.sub(place, length), k.add(self.first, offset)], self.lanes)

    def _next_state(self, offset: Index) -> None:
        """The last L of past state and input, one channel after the other."""
        k, length, lanes = self.k, self.c.state_length, self.lanes
        joined = ""
        for i in range(length):
            place = k.add(self.tokens, i)
            if isinstance(place, int):
                value = self._padded(place, offset, old=True)
            else:
                value = k.when(
                    k.less(place, length),
                    [f"vector<{lanes}xf32>"],
                    lambda place=place: [k.load(self.old, [place, offset], lanes)],
                    lambda place=place: [self._padded(place, offset, old=False)],
                )[0]
            joined = k.shuffle(joined, value, range((i + 1) * lanes)) if i else value
        order = [i * lanes + lane for lane in range(lanes) for i in range(length)]
        at = k.mul(k.add(self.first, offset), length)
        k.store(k.shuffle(joined, joined, order), self.state, [self.batch, at])
