"""Asks for what the next chunk of strategy ``fused_simd`` reads and writes, some lines in each step of a loop.

Tokens of a head lie far apart, so no hardware does it. Asked for all at once, 128 lines keep all of a core's buffers
for lines busy, and what the products take from the second cache waits behind them: at T=1024, H=16 a Zen 4 took 9.9 ms
so, and takes 8.9 with the lines spread over the loops, as long as with the same 16 tokens again and again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..emit.kernel_text import Index, KernelText

_LINE = 64


@dataclass(frozen=True)
class Share:
    """What a panel of the state takes of each token of an operand [B, T, columns].

    Attributes:
        memref: The operand.
        batch: Batch row.
        first: First column.
        columns: How many.
        writes: Whether it is a result.
    """

    memref: str
    batch: Index
    first: Index
    columns: int
    writes: bool = False


def ask(k: KernelText, shares: Sequence[Share], t: Index, tokens: int, step: Index, steps: int) -> None:
    """Asks for some of the lines of some tokens, for the second cache; beyond T for nothing.

    Args:
        k: Where to.
        shares: Of whose tokens.
        t: The first one.
        tokens: How many.
        step: Which step of a loop this is.
        steps: How many there are: in all of them together every line is asked for.
    """
    for share in shares:
        elements = _LINE // k.element_bytes(share.memref)
        lines = -(-share.columns // elements)
        count = tokens * lines
        each = -(-count // steps)
        for e in range(each):
            line = k.div(k.mul(k.add(k.mul(step, each), e), count), each * steps)
            column = k.add(share.first, k.mul(k.rem(line, lines), elements))
            place = [share.batch, k.add(t, k.div(line, lines)), column]
            k.prefetch(share.memref, place, level=2, write=share.writes)
