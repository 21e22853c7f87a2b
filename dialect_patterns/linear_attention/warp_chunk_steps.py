"""A chunk of strategy ``fused_warp_chunks`` token by token, in f32: where 16 bits cannot hold a number of it.

A warp does so for its columns alone, from keys and queries in the workgroup's memory; no other warp waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from iree.compiler import ir

from ..emit.scalar import Scalar
from .mma_chunk_operands import CHUNK, DECAY, RATE

if TYPE_CHECKING:
    from .warp_chunk_state import WarpChunks


class Steps:
    """Emits the loop over a chunk's tokens.

    Args:
        of: The kernel that it is part of.
    """

    def __init__(self, of: WarpChunks) -> None:
        self.of, self.k = of, of.k

    def emit(self, t: Scalar, state: Sequence[ir.Value]) -> list[ir.Value]:
        """Write the outputs of the tokens from ``t`` on; the next state."""
        count = (self.of.tokens - t).minimum(CHUNK)
        return self.k.loop(Scalar.constant(0, "index"), count, 1, list(state), lambda i, s: self._step(t + i, i, s))

    def _step(self, t: Scalar, i: Scalar, state: list[ir.Value]) -> list[ir.Value]:
        """One token."""
        k, of, c = self.k, self.of, self.of.c
        zero, one = (Scalar.constant(n, "index") for n in range(2))
        decay = of.staged.number(DECAY, i)
        state = [k.mul(decay, value) for value in state]
        key = of.staged.column(i.to("i32"), of.row, 0)
        new = of.value_parts(of.load_value(t))
        if c.has_delta:
            rate = of.staged.number(RATE, i)
            new = [k.mul(rate, k.sub(x, y)) for x, y in zip(new, self._over_rows(key, state, one), strict=True)]
        state = [k.fma(key[n // 2], new[n % 2], value) for n, value in enumerate(state)]
        seen = self._over_rows(
            of.staged.column(i.to("i32"), of.row, of.p.queries),
            state,
            zero if c.has_delta else one - i.divide_unsigned(2)[1],
        )
        is_one = of.row.equals(0) & of.part.equals(0)
        k.when(is_one, lambda: of.write_output(t, seen))
        return state

    def _over_rows(self, factors: Sequence[ir.Value], state: Sequence[ir.Value], turn: Scalar) -> list[ir.Value]:
        """The products with this lane's columns, summed over all rows."""
        k = self.k
        sums = [k.constant(0.0)] * 2
        for n, value in enumerate(state):
            sums[n % 2] = k.fma(factors[n // 2], value, sums[n % 2])
        return self.of.over_rows(sums, turn)
