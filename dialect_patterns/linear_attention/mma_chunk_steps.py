"""A chunk of strategy ``fused_mma_chunks`` token by token, in f32: where a number of it is not one that f16 holds.

The state lies in the workgroup's memory meanwhile, eight rows of eight columns a thread; so do the sums over the rows.
It is rare, so it is to be little code and to need few registers before it is to be fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from iree.compiler import ir

from ..emit.chunk_words import NUMBERS
from ..emit.scalar import Scalar
from .mma_chunk_operands import CHUNK, RATE, WORDS

if TYPE_CHECKING:
    from .mma_chunk_state import MmaChunks

_PAIR = NUMBERS // WORDS


class Steps:
    """Emits the loop over a chunk's tokens.

    Args:
        of: The kernel that it is part of.
    """

    def __init__(self, of: MmaChunks) -> None:
        self.of, self.k, self.p, self.o = of, of.k, of.p, of.o
        self.parts = of.p.dk // NUMBERS
        """Threads that share a column."""

    def emit(self, t: Scalar, state: list[ir.Value]) -> list[ir.Value]:
        """Write the outputs of the tokens from ``t`` on; the next state."""
        k, of, p = self.k, self.of, self.p
        lines = [row * p.stride_f + vector * _PAIR + i for row, vector in of.places for i in range(_PAIR)]
        for line, value in zip(lines, state, strict=True):
            k.store_as_is(value, of.rows, line)
        k.barrier()
        self.part, self.vector = of.thread.divide_unsigned(p.vectors)

        def step(i: Scalar, nothing: list[ir.Value]) -> list[ir.Value]:
            self._step(t + i, i)
            return nothing

        k.loop(Scalar.constant(0, "index"), (of.tokens - t).minimum(CHUNK), 1, [], step)
        return [k.load(of.rows, line) for line in lines]

    def _step(self, t: Scalar, i: Scalar) -> None:
        """One token."""
        k, of, c = self.k, self.of, self.of.c
        first, second = 0, self.parts * self.p.stride_f

        def number(start: int) -> ir.Value:
            return k.splat(k.load(of.vectors, i + start), WORDS)

        def decay() -> None:
            factors = of.decays(t, i, self.part)
            self._pass(lambda state, n: k.mul(factors[n // _PAIR], state), self._key(t), first)

        def update(new: list[ir.Value]) -> None:
            key = self._key(t)
            query = self.o.eight_of(self.o.query_eight(t, self.part))
            self._pass(lambda state, n: k.fma(k.splat(key[n // _PAIR], WORDS), new[n % _PAIR], state), query, second)

        is_active = self.part < self.parts
        k.when(is_active, decay)
        k.barrier()
        new = list(of.eight(self.o.eight_of(of.load_value(t, self.vector))))
        if c.has_delta:
            rate = number(RATE)
            known = self._total(first)
            new = [k.mul(rate, k.sub(value, found)) for value, found in zip(new, known, strict=True)]
        k.when(is_active, lambda: update(new))
        k.barrier()

        def write() -> None:
            scale, read = k.constant(c.scale), self._total(second)
            of.write_output(t, self.vector, [k.mul(scale, e) for value in read for e in k.elements(value)])

        k.when(of.thread < self.p.vectors, write)

    def _key(self, t: Scalar) -> list[ir.Value]:
        """This thread's eight of a key."""
        return self.o.eight_of(self.o.key_eight(t, self.part))

    def _pass(self, change: Callable[[ir.Value, int], ir.Value], elements: list[ir.Value], start: int) -> None:
        """Change this thread's part of the state; its products with a key or query to memory from ``start`` on."""
        k, work, rows, stride = self.k, self.of.work, self.of.rows, self.p.stride_f
        sums = [k.constant(0.0, WORDS)] * _PAIR
        for n in range(NUMBERS * _PAIR):
            row, i = divmod(n, _PAIR)
            place = (self.part * NUMBERS + row) * stride + self.vector * _PAIR + i
            value = change(k.load(rows, place), n)
            k.store_as_is(value, rows, place)
            sums[i] = k.fma(k.splat(elements[row], WORDS), value, sums[i])
        for i, value in enumerate(sums):
            k.store_as_is(value, work, self.part * stride + self.vector * _PAIR + (start + i))

    def _total(self, start: int) -> list[ir.Value]:
        """The sums over all rows, for this thread's columns."""
        k, work = self.k, self.of.work

        def add(part: Scalar, totals: list[ir.Value]) -> list[ir.Value]:
            place = part * self.p.stride_f + self.vector * _PAIR + start
            return [k.add(total, k.load(work, place + i)) for i, total in enumerate(totals)]

        zeros = [k.constant(0.0, WORDS)] * _PAIR
        return k.loop(Scalar.constant(0, "index"), Scalar.constant(self.parts, "index"), 1, zeros, add)
