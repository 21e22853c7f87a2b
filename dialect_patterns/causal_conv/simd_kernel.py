"""The bodies of strategy ``fused_simd`` of CausalConvWithState: some channels of one batch row, all tokens of a call.

L = (k - 1) * dilation tokens of state; padded = past state followed by the input.

    y_t = act(bias + sum_j w_j padded[t + j * dilation])          present state = padded[T : T + L]

Tokens lie next to each other, so a vector holds tokens of one channel. The first vectors read a copy on the stack of
past state and input, the others the input itself; the last one starts at T - lanes, whatever it computes twice. A call
of one token has a vector of channels instead, whose states and weights are taken apart with shuffles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..emit.kernel_text import Index, KernelText
from .contract import CausalConv


def activate(k: KernelText, c: CausalConv, value: str) -> str:
    """The activation of a vector."""
    if c.activation != "silu":
        return value
    lanes = k.lanes(value)
    one = k.constant(1.0, f"vector<{lanes}xf32>")
    return k.divf(value, k.addf(one, k.exp(k.negate(value))))


def own_channels(k: KernelText, channels: int) -> tuple[Index, Index]:
    """The batch row of this workgroup and its first channel."""
    batch = k.op("hal.interface.workgroup.id[1] : index", "index")
    group = k.op("hal.interface.workgroup.id[0] : index", "index")
    return batch, k.mul(group, channels)


def write_one_token(k: KernelText, c: CausalConv, channels: int, lanes: int, memrefs: Sequence[str]) -> None:
    """T = 1; input and output [B, C], states [B, C * L], weight [C * k]."""
    given = iter(memrefs)
    x, weight = next(given), next(given)
    bias = next(given) if c.has_bias else None
    past = next(given) if c.has_past else None
    output, state = next(given), next(given)
    batch, first = own_channels(k, channels)
    length, dtype = c.state_length, c.input.dtype

    def strided(vector: str, start: int, step: int) -> str:
        return k.widen(k.shuffle(vector, vector, [start + step * i for i in range(lanes)]))

    def body(offset: str, _: list[str]) -> list[str]:
        at = k.add(first, offset)
        new = k.load(x, [batch, at], lanes, raw=True)
        weights = k.load(weight, [k.mul(at, c.kernel)], lanes * c.kernel, raw=True)
        place = [batch, k.mul(at, length)]
        if past is not None:
            old = k.load(past, place, lanes * length, raw=True)
        else:
            old = k.constant(0.0, f"vector<{lanes * length}x{dtype}>")
        total = k.load(bias, [at], lanes) if bias is not None else None
        for j in range(c.kernel):
            tap = strided(old, j * c.dilation, length) if j + 1 < c.kernel else k.widen(new)
            factor = strided(weights, j, c.kernel)
            total = k.mulf(tap, factor) if total is None else k.fma(tap, factor, total)
        assert total is not None
        k.store(activate(k, c, total), output, [batch, at])
        moved = [
            lanes * length + i if j + 1 == length else i * length + j + 1 for i in range(lanes) for j in range(length)
        ]
        k.store(k.shuffle(old, new, moved), state, place)
        return []

    k.loop(channels, [], body, step=lanes)


class Body:
    """Any T; input and output [B, C, T], states [B, C, L], weight [C * k]."""

    def __init__(
        self, k: KernelText, c: CausalConv, channels: int, lanes: int, tokens: Index, memrefs: Sequence[str]
    ) -> None:
        self.k, self.c, self.channels, self.lanes, self.tokens = k, c, channels, lanes, tokens
        given = iter(memrefs)
        self.x, self.weight = next(given), next(given)
        self.bias = next(given) if c.has_bias else None
        self.past = next(given) if c.has_past else None
        self.output, self.state = next(given), next(given)
        self.batch, self.first = own_channels(k, channels)
        self.head = -(-c.state_length // lanes) * lanes  # tokens whose vectors need the past state
        self.copy = k.alloca([c.state_length + self.head + lanes])
        self.result = k.alloca([self.head])

    def write(self) -> None:
        """The whole body."""
        k, size = self.k, self.c.state_length + self.head + self.lanes
        zero = k.constant(0.0, "f32")

        def clear(i: str, _: list[str]) -> list[str]:
            k.store(zero, self.copy, [i])
            return []

        def channel(offset: str, _: list[str]) -> list[str]:
            self._channel(k.add(self.first, offset))
            return []

        k.loop(size, [], clear)
        k.loop(self.channels, [], channel)

    def _channel(self, at: Index) -> None:
        k, c, lanes, head = self.k, self.c, self.lanes, self.head
        zero = k.constant(0.0, "f32")
        base = k.mul(at, c.kernel)
        weights = [k.splat(k.load(self.weight, [k.add(base, j)]), lanes) for j in range(c.kernel)]
        bias = None if self.bias is None else k.splat(k.load(self.bias, [at]), lanes)
        past = [zero if self.past is None else k.load(self.past, [self.batch, at, i]) for i in range(c.state_length)]
        for i, element in enumerate(past):
            k.store(element, self.copy, [i])

        def compute(read: Callable[[int], str]) -> str:
            total = bias
            for j, weight in enumerate(weights):
                tap = read(j * c.dilation)
                total = k.mulf(tap, weight) if total is None else k.fma(tap, weight, total)
            assert total is not None
            return activate(k, c, total)

        def from_copy(t: Index) -> str:
            return compute(lambda shift: k.load(self.copy, [k.add(t, shift)], lanes))

        def from_input(t: Index) -> str:
            start = k.sub(t, c.state_length)
            return compute(lambda shift: k.load(self.x, [self.batch, at, k.add(start, shift)], lanes))

        def copy_elements(start: Index, stop: Index) -> None:
            def element(t: str, _: list[str]) -> list[str]:
                k.store(k.load(self.x, [self.batch, at, t]), self.copy, [k.add(t, c.state_length)])
                return []

            k.loop(stop, [], element, start=start)

        def put(t: Index, value: str) -> None:
            k.store(value, self.output, [self.batch, at, t])

        def long() -> list[str]:
            for t in range(0, head, lanes):
                k.store(k.load(self.x, [self.batch, at, t], lanes), self.copy, [c.state_length + t])
            for t in range(0, head, lanes):
                put(t, from_copy(t))

            def vector(t: str, _: list[str]) -> list[str]:
                put(t, from_input(t))
                return []

            whole = k.mul(k.div(self.tokens, lanes), lanes)
            k.loop(whole, [], vector, start=head, step=lanes)
            last = k.sub(self.tokens, lanes)

            def rest() -> list[str]:
                def near() -> list[str]:
                    copy_elements(head, self.tokens)
                    put(last, from_copy(last))
                    return []

                def far() -> list[str]:
                    put(last, from_input(last))
                    return []

                k.when(k.less(last, c.state_length), [], near, far)
                return []

            if whole != self.tokens:
                k.when(k.less(whole, self.tokens), [], rest, lambda: [])
            return []

        def short() -> list[str]:
            copy_elements(0, self.tokens)
            for t in range(0, head, lanes):
                k.store(from_copy(t), self.result, [t])

            def element(t: str, _: list[str]) -> list[str]:
                put(t, k.load(self.result, [t]))
                return []

            k.loop(self.tokens, [], element)
            return []

        if isinstance(self.tokens, int):
            (short if self.tokens < head else long)()
        else:
            k.when(k.less(self.tokens, head), [], short, long)
        self._next_state(at)

    def _next_state(self, at: Index) -> None:
        """The last L of past state and input."""
        k, length = self.k, self.c.state_length

        def element(i: int) -> str:
            place = k.add(self.tokens, i)

            def old() -> list[str]:
                return [k.constant(0.0, "f32") if self.past is None else k.load(self.past, [self.batch, at, place])]

            def new() -> list[str]:
                return [k.load(self.x, [self.batch, at, k.sub(place, length)])]

            if isinstance(place, int):
                return (old if place < length else new)()[0]
            return k.when(k.less(place, length), ["f32"], old, new)[0]

        for i in range(length):
            k.store(element(i), self.state, [self.batch, at, i])
