"""The body of strategy ``fused_simd`` where the channels lie side by side: some channels of one batch row, any T.

L = (k - 1) * dilation tokens of state; padded = past state followed by the input.

    y_t = act(bias + sum_j w_j padded[t + j * dilation])          present state = padded[T : T + L]

So projections leave their rows and attention takes its own; models put a transpose before and behind the operator,
which this form leaves out. A vector holds channels of one token; four tokens are done at once, which need seven rows of
the input instead of 16. Weights and past state are turned once, to the stack. Where vectors do not divide the channels
of a workgroup, its last vector ends with them, whatever it computes twice.

What reads the output by parts of its channels gets each from here, divided by the norms of its heads if it wants that:

    part_t = y_t / sqrt(sum over the head of y_t^2) * factor          a head of zeros stays zeros
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..emit.kernel_text import Index, KernelText
from .contract import CausalConv
from .simd_kernel import activate, own_channels

_AT_ONCE = 4  # tokens


@dataclass(frozen=True)
class Part:
    """Some channels of the output, which are a result of their own.

    Attributes:
        start: The first one.
        size: How many.
        head: Channels that are divided by their Euclidean norm together; 0: none are.
        factor: What they are multiplied by then.
    """

    start: int
    size: int
    head: int = 0
    factor: float = 1.0


class ChannelsBody:
    """Input [B, T, C], states [B, C * L], weight [C * k], for each part an output [B, T, size].

    Args:
        k: Where to write.
        c: What is computed.
        parts: Of the output; where there are several, a workgroup's channels are of one.
        channels: Of a workgroup; the last one does what is left, at least ``lanes``.
        lanes: Of a vector.
        tokens: T.
        memrefs: Input, weight, bias (if any), past state (if any), outputs, present state.
    """

    def __init__(
        self,
        k: KernelText,
        c: CausalConv,
        parts: Sequence[Part],
        channels: int,
        lanes: int,
        tokens: Index,
        memrefs: Sequence[str],
    ) -> None:
        self.k, self.c, self.parts, self.lanes, self.tokens = k, c, parts, lanes, tokens
        given = iter(memrefs)
        self.x, self.weight = next(given), next(given)
        self.bias = next(given) if c.has_bias else None
        self.past = next(given) if c.has_past else None
        *self.outputs, self.state = given
        self.batch, self.first = own_channels(k, channels)
        even = c.channels % channels == 0
        self.count = channels if even else k.minimum(channels, k.sub(c.channels, self.first))
        self.taps = k.alloca([c.kernel, channels])
        self.old = k.alloca([c.state_length, channels])
        most = max(part.head for part in parts)
        self.convolved = k.alloca([_AT_ONCE, most]) if most else ""

    def write(self) -> None:
        """The whole body."""
        self._each_vector(self._turn)
        for part, output in zip(self.parts, self.outputs, strict=True):
            inside = "" if len(self.parts) == 1 else self._is_in(part)
            self._when(inside, not inside, lambda part=part, output=output: self._part(part, output))
        self._each_vector(self._next_state)

    def _is_in(self, part: Part) -> str:
        """Whether this workgroup's channels are of a part; unsigned, so that those before it are far beyond it."""
        k = self.k
        return k.less(k.sub(self.first, part.start), part.size)

    def _part(self, part: Part, output: str) -> None:
        """All tokens of the workgroup's channels."""
        k, length, tokens = self.k, self.c.state_length, self.tokens
        for t in range(length if not isinstance(tokens, int) else min(length, tokens)):
            known = isinstance(tokens, int)
            self._when("" if known else k.less(t, tokens), known, lambda t=t: self._tokens(t, 1, part, output))
        if isinstance(tokens, int) and tokens <= length:
            return

        def some(count: int) -> Callable[[str, list[str]], list[str]]:
            def body(t: str, _: list[str]) -> list[str]:
                self._tokens(t, count, part, output)
                return [k.index(k.add(t, count))]

            return body

        (rest,) = k.loop(k.sub(tokens, _AT_ONCE - 1), [k.index(length)], some(_AT_ONCE), start=length, step=_AT_ONCE)
        k.loop(tokens, [rest], some(1), start=rest)

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

    def _tokens(self, t: Index, count: int, part: Part, output: str) -> None:
        """Some tokens from ``t`` on; an int, where they need the past state."""
        k = self.k
        if part.head:

            def head(offset: str, _: list[str]) -> list[str]:
                self._normed(t, count, offset, part, output)
                return []

            k.loop(self.count, [], head, step=part.head)
            return

        def vector(offset: Index) -> None:
            at = k.sub(k.add(self.first, offset), part.start)
            self._ask(output, t, count, at)
            for i, value in enumerate(self._values(t, count, offset)):
                k.store(value, output, [self.batch, k.add(t, i), at])

        self._each_vector(vector)

    def _normed(self, t: Index, count: int, offset: Index, part: Part, output: str) -> None:
        """One head of some tokens, over its norm."""
        k, lanes = self.k, self.lanes
        nothing, zero, one = k.constant(0.0, f"vector<{lanes}xf32>"), k.constant(0.0, "f32"), k.constant(1.0, "f32")

        def square(d: str, sums: list[str]) -> list[str]:
            self._ask(output, t, count, k.sub(k.add(k.add(self.first, offset), d), part.start))
            values = self._values(t, count, k.add(offset, d))
            for i, value in enumerate(values):
                k.store(value, self.convolved, [i, d])
            return [k.fma(value, value, total) for value, total in zip(values, sums, strict=True)]

        factors: list[str] = []
        for total in k.sum_lanes(k.loop(part.head, [nothing] * count, square, step=lanes)):
            is_zero = k.op(f"arith.cmpf oeq, {total}, {zero} : f32", "i1")
            inverse = k.divf(one, k.op(f"math.sqrt {total} : f32", "f32"))
            factors.append(k.mulf(k.select(is_zero, zero, inverse), k.constant(part.factor, "f32")))

        def scale(d: str, _: list[str]) -> list[str]:
            at = k.sub(k.add(k.add(self.first, offset), d), part.start)
            for i, factor in enumerate(factors):
                value = k.mulf(k.load(self.convolved, [i, d], lanes), factor)
                k.store(value, output, [self.batch, k.add(t, i), at])
            return []

        k.loop(part.head, [], scale, step=lanes)

    def _ask(self, output: str, t: Index, count: int, at: Index) -> None:
        """Asks for the lines that the next tokens are written to, which stores would wait for."""
        for i in range(count):
            self.k.prefetch(output, [self.batch, self.k.add(t, count + i), at], write=True)

    def _values(self, t: Index, count: int, offset: Index) -> list[str]:
        """The convolution of some channels of some tokens."""
        k, c, lanes = self.k, self.c, self.lanes
        at, old = k.add(self.first, offset), isinstance(t, int)
        for i in range(count):
            k.prefetch(self.x, [self.batch, k.add(t, count + i), at])
        bias = None if self.bias is None else k.load(self.bias, [at], lanes)
        weights = [k.load(self.taps, [j, offset], lanes) for j in range(c.kernel)]
        places = sorted({i + j * c.dilation for i in range(count) for j in range(c.kernel)})
        taps = {place: self._padded(k.add(t, place), offset, old=old) for place in places}
        values: list[str] = []
        for i in range(count):
            total = bias
            for j, weight in enumerate(weights):
                tap = taps[i + j * c.dilation]
                total = k.mulf(tap, weight) if total is None else k.fma(tap, weight, total)
            assert total is not None
            values.append(activate(k, c, total))
        return values

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
