"""The operands and results of a kernel of strategy ``fused_simd``, and the batch row and head that a workgroup does."""

from __future__ import annotations

from collections.abc import Sequence

from ..emit.kernel_text import Index, KernelText
from .contract import LinearAttention
from .simd_fetch import Share


class Gates:
    """The scalar gates of a chunk: decays per head and update rates.

    Attributes:
        betas: Update rate of each token, None if the rule has none.
    """

    def __init__(self, k: KernelText, decays: Sequence[str] | None, betas: Sequence[str] | None, tokens: int) -> None:
        self.betas = betas
        self._k = k
        self._spans: dict[tuple[int, int], str] = {}
        if decays is not None:
            for j in range(-1, tokens):
                for i in range(j + 1, tokens):
                    before = self._spans.get((j, i - 1))
                    self._spans[j, i] = decays[i] if before is None else k.mulf(before, decays[i])

    def span(self, j: int, i: int) -> str | None:
        """The product of the decays after token j up to i, None for 1."""
        return self._spans.get((j, i))

    def times_span(self, value: str, j: int, i: int) -> str:
        """``value`` times that product."""
        span = self.span(j, i)
        return value if span is None else self._k.mulf(span, value)


class Operands:
    """Reads and writes for one key/value head.

    Args:
        k: Where to write.
        c: What the kernel computes.
        memrefs: query, key, value, past, decay, beta (those that are there), output, state, and what else there is.

    Attributes:
        batch: Batch row.
        head: Key/value head.
        group: Which of the head's groups of columns.
        query: Memref [B, T, Hq * dk].
        key: Memref [B, T, Hk * dk].
        decay: Memref [B, T, Hkv] or [B, T, Hkv * dk], None if the rule has none.
        rest: The further memrefs.
    """

    def __init__(self, k: KernelText, c: LinearAttention, memrefs: Sequence[str]) -> None:
        self._k, self._c = k, c
        given = iter(memrefs)
        self.query, self.key, self._value = next(given), next(given), next(given)
        self._past = next(given) if c.has_past else None
        self.decay = next(given) if c.decay != "none" else None
        self._beta = next(given) if c.beta != "none" else None
        self._output, self._state = next(given), next(given)
        self.rest = list(given)
        self.row = k.op("hal.interface.workgroup.id[1] : index", "index")
        self.group: Index = k.op("hal.interface.workgroup.id[0] : index", "index")
        self.batch, self.head = k.div(self.row, c.kv_heads), k.rem(self.row, c.kv_heads)

    def gates(self, t: Index, tokens: int) -> Gates:
        """The scalar gates of a chunk of few tokens."""
        decays = [self.load_decay(t, i) for i in range(tokens)] if self._c.decay == "head" else None
        betas = [self.load_beta(t, i) for i in range(tokens)] if self._beta is not None else None
        return Gates(self._k, None if decays is None else [self._k.exp(g) for g in decays], betas, tokens)

    def load_decay(self, t: Index, i: int) -> str:
        """The logarithm of a decay per head."""
        assert self.decay is not None
        return self._k.load(self.decay, [self.batch, self._k.add(t, i), self.head])

    def load_beta(self, t: Index, i: int) -> str:
        """The update rate of a token."""
        assert self._beta is not None
        column: Index = self.head if self._c.beta == "head" else 0
        return self._k.load(self._beta, [self.batch, self._k.add(t, i), column])

    def load_value(self, t: Index, column: Index, lanes: int) -> str:
        """A vector of the value of token ``t``."""
        k = self._k
        return k.load(self._value, [self.batch, t, k.add(k.mul(self.head, self._c.dv), column)], lanes)

    def shares(self, first: Index, columns: int) -> list[Share]:
        """Some columns of the value and the outputs of a token."""
        k, c = self._k, self._c
        heads = [(self._value, self.head, False)]
        heads += [(self._output, k.add(k.mul(self.head, c.rows), row), True) for row in range(c.rows)]
        own = [(memref, k.add(k.mul(head, c.dv), first), writes) for memref, head, writes in heads]
        return [Share(memref, self.batch, column, columns, writes) for memref, column, writes in own]

    def load_past(self, d: Index, column: Index, lanes: int) -> str | None:
        """A vector of the past state, None if there is none."""
        if self._past is None:
            return None
        return self._k.load(self._past, [self.batch, self.head, d, column], lanes)

    def store_state(self, value: str, d: Index, column: Index) -> None:
        """Write a vector of the present state."""
        self._k.store(value, self._state, [self.batch, self.head, d, column])

    def store_output(self, value: str, t: Index, query: Index, column: Index) -> None:
        """Write a vector of the output of token ``t`` for one of the head's query heads."""
        k, c = self._k, self._c
        head = k.add(k.mul(self.head, c.rows), query)
        k.store(value, self._output, [self.batch, t, k.add(k.mul(head, c.dv), column)])
