"""The kernel of strategy ``fused_simd`` for a call of few tokens: one chunk, past state in, present state out.

The maths is that of ``simd_blocks``; everything but the state stays in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..emit.kernel_text import Index, KernelText
from .contract import LinearAttention
from .simd_operands import Gates, Operands
from .simd_rows import Rows
from .simd_tiling import Direct, copies_rows

Columns = list[str]
"""The vectors of one row of the state, as many columns as a workgroup has."""


class DirectBody:
    """Writes the body of one kernel.

    Args:
        k: Where to.
        c: What it computes.
        x: Its sizes.
        memrefs: Operands and results: query, key, value, past, decay, beta (those that are there), output, state.
    """

    def __init__(self, k: KernelText, c: LinearAttention, x: Direct, memrefs: Sequence[str]) -> None:
        self.k, self.c, self.x = k, c, x
        self.o = Operands(k, c, memrefs)
        self.zero = k.constant(0.0, f"vector<{x.lanes}xf32>")
        self.column = k.mul(self.o.group, x.columns)
        self.rows = Rows(k, c, self.o, x.tokens, x.row_lanes, copied=copies_rows(c))
        self.updates = k.alloca([x.tokens, x.columns]) if c.rows > 1 else ""

    def write(self) -> None:
        """The whole body."""
        c, k, rows, tokens = self.c, self.k, self.rows, self.x.tokens
        gates = self.o.gates(0, tokens)
        held = rows.keys(0, tokens)
        keys = [rows.key(0, i) for i in range(tokens)] if c.has_delta else []
        if c.rows == 1:
            seen = rows.queries(0, tokens, 0)
            read = self._sweep([*keys, *(rows.query(0, i, 0) for i in range(tokens))])
            u = self._solve(tokens, gates, held, read[:-tokens])
            self._emit_output(0, gates, seen, read[-tokens:], u)
            self._update(gates, u)
            return

        lanes, vectors = self.x.lanes, range(self.x.vectors)
        for i, row in enumerate(self._solve(tokens, gates, held, self._sweep(keys) if keys else [])):
            for n, vector in enumerate(row):
                k.store(vector, self.updates, [i, n * lanes])

        def solved() -> list[Columns]:
            return [[k.load(self.updates, [i, n * lanes], lanes) for n in vectors] for i in range(tokens)]

        def query_head(head: str, _: list[str]) -> list[str]:
            seen = rows.queries(0, tokens, head)
            read = self._sweep([rows.query(0, i, head) for i in range(tokens)])
            self._emit_output(head, gates, seen, read, solved())
            return []

        k.loop(c.rows, [], query_head)
        self._update(gates, solved())

    def _at(self, n: int) -> Index:
        """Column of vector ``n``."""
        return self.k.add(self.column, n * self.x.lanes)

    def _read(self, d: Index, n: int) -> str:
        """A vector of the past state."""
        return self.o.load_past(d, self._at(n), self.x.lanes) or self.zero

    def _sweep(self, rows: Sequence[Callable[[Index], str]]) -> list[Columns]:
        """Each row times the past state."""
        k, x = self.k, self.x

        def body(d: str, carried: list[str]) -> list[str]:
            sums = list(carried)
            for step in range(x.unroll):
                at = k.add(d, step)
                held = [self._read(at, n) for n in range(x.vectors)]
                for i, row in enumerate(rows):
                    factor = k.splat(row(at), x.lanes)
                    for n in range(x.vectors):
                        place = i * x.vectors + n
                        sums[place] = k.fma(factor, held[n], sums[place])
            return sums

        sums = k.loop(self.c.dk, [self.zero] * (len(rows) * x.vectors), body, step=x.unroll)
        return [sums[i * x.vectors : (i + 1) * x.vectors] for i in range(len(rows))]

    def _solve(self, tokens: int, gates: Gates, held: list[list[str]], read: list[Columns]) -> list[Columns]:
        """The update u of each token."""
        k, x = self.k, self.x
        updates: list[Columns] = []
        for i in range(tokens):
            row = [self.o.load_value(i, self._at(n), x.lanes) for n in range(x.vectors)]
            if self.c.has_delta:
                known = gates.span(-1, i)
                row = [k.subf(v, r if known is None else k.mulf(known, r)) for v, r in zip(row, read[i], strict=True)]
                for j in range(i):
                    factor = k.negate(gates.times_span(held[i][j], j, i))
                    row = [k.fma(factor, u, v) for u, v in zip(updates[j], row, strict=True)]
                assert gates.betas is not None
                row = [k.mulf(gates.betas[i], v) for v in row]
            updates.append(row)
        return updates

    def _emit_output(
        self, query: Index, gates: Gates, seen: list[list[str]], read: list[Columns], updates: list[Columns]
    ) -> None:
        """The output o of each token for one query head."""
        k = self.k
        scale = k.constant(self.c.scale, "f32")
        for i, row in enumerate(read):
            known = gates.span(-1, i)
            factor = scale if known is None else k.mulf(scale, known)
            row = [k.mulf(factor, r) for r in row]
            for j in range(i + 1):
                factor = k.mulf(scale, gates.times_span(seen[i][j], j, i))
                row = [k.fma(factor, u, r) for u, r in zip(updates[j], row, strict=True)]
            for n, vector in enumerate(row):
                self.o.store_output(vector, i, query, self._at(n))

    def _update(self, gates: Gates, updates: list[Columns]) -> None:
        """The present state."""
        k, x, last = self.k, self.x, len(updates) - 1
        total = gates.span(-1, last)
        weighed = [
            row if gates.span(j, last) is None else [k.mulf(gates.span(j, last) or "", u) for u in row]
            for j, row in enumerate(updates)
        ]

        def body(d: str, _: list[str]) -> list[str]:
            for step in range(x.unroll):
                at = k.add(d, step)
                factor = self.rows.total(at) if self.c.decay == "key" else total
                factor = None if factor is None else k.splat(factor, x.lanes)
                keys = [k.splat(self.rows.last_key(0, j, at), x.lanes) for j in range(last + 1)]
                for n in range(x.vectors):
                    value = self._read(at, n)
                    value = value if factor is None else k.mulf(factor, value)
                    for key, row in zip(keys, weighed, strict=True):
                        value = k.fma(key, row[n], value)
                    self.o.store_state(value, at, self._at(n))
            return []

        k.loop(self.c.dk, [], body, step=x.unroll)
