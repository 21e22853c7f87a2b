"""The body of strategy ``fused_simd``: one key/value head and some columns of its state, all tokens of a call.

Chunks of C tokens (i, j in the chunk, a_i the decays, D_ij = a_{j+1} ... a_i, pre_i = D_i,-1, S from before the chunk):

    u_i = beta_i (v_i - pre_i (k_i S) - sum_{j<i} D_ij (k_i . k_j) u_j)          linear, gated: u_i = v_i
    o_i = scale (pre_i (q_i S) + sum_{j<=i} D_ij (q_i . k_j) u_j)
    S   = pre_C S + sum_j D_Cj k_j^T u_j

Decays are multiplied, never divided or subtracted, so that resets (-inf) and steep ones are exact; a chunk whose decays
grow by more than e^80 is done token by token instead, as are the last tokens of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..kernel_text import Index, KernelText
from .contract import LinearAttention
from .simd_rows import Gates, Rows
from .simd_tiling import Tiling

_MAX_GROWTH = 80.0
Columns = list[str]
"""The vectors of one row of the state, as many columns as a workgroup has."""


class Body:
    """Writes the body of one kernel.

    Args:
        k: Where to.
        c: What it computes.
        x: Its sizes.
        tokens: T.
        memrefs: Operands and results: query, key, value, past, decay, beta (those that are there), output, state.
    """

    def __init__(self, k: KernelText, c: LinearAttention, x: Tiling, tokens: Index, memrefs: Sequence[str]) -> None:
        self.k, self.c, self.x, self.total = k, c, x, tokens
        given = iter(memrefs)
        self.query, self.key, self.value = next(given), next(given), next(given)
        self.past = next(given) if c.has_past else None
        self.decay = next(given) if c.decay != "none" else None
        self.beta = next(given) if c.beta != "none" else None
        self.output, self.state = next(given), next(given)
        self.zero = k.constant(0.0, f"vector<{x.lanes}xf32>")
        row = k.op("hal.interface.workgroup.id[1] : index", "index")
        group = k.op("hal.interface.workgroup.id[0] : index", "index")
        self.batch, self.head = k.div(row, c.kv_heads), k.rem(row, c.kv_heads)
        self.column = k.mul(group, x.columns)
        self.local = "" if x.direct else k.alloca([c.dk, x.columns])
        self.rows = Rows(k, c, x, self.batch, self.head, self.query, self.key, self.decay)
        self.updates = k.alloca([x.tokens, x.columns]) if c.rows > 1 else ""

    def write(self) -> None:
        """The whole body."""
        k, x = self.k, self.x
        if x.direct:
            self._chunk(0, x.tokens)
            return
        self._each_element(lambda d, n: k.store(self._read_past(d, n), self.local, [d, n * x.lanes]))

        def step(t: str) -> str:
            full = k.less(k.add(t, x.tokens), self.total, or_equal=True)
            if self.decay is not None:
                (full,) = k.when(full, ["i1"], lambda: [self._is_bounded(t)], lambda: [k.constant(0, "i1")])

            def one() -> list[str]:
                self._chunk(t, 1)
                return [k.index(k.add(t, 1))]

            def several() -> list[str]:
                self._chunk(t, x.tokens)
                return [k.index(k.add(t, x.tokens))]

            return k.when(full, ["index"], several, one)[0]

        k.while_less(self.total, step)
        self._each_element(lambda d, n: self._write_state(d, n, k.load(self.local, [d, n * x.lanes], x.lanes)))

    # ---- the state -------------------------------------------------------------------------------------------------
    def _each_element(self, body: Callable[[Index, int], None]) -> None:
        """``body(row, vector)`` for the whole state."""

        def row(d: str, _: list[str]) -> list[str]:
            for u in range(self.x.unroll):
                for n in range(self.x.vectors):
                    body(self.k.add(d, u), n)
            return []

        self.k.loop(self.c.dk, [], row, step=self.x.unroll)

    def _at(self, n: int) -> Index:
        """Column of vector ``n``."""
        return self.k.add(self.column, n * self.x.lanes)

    def _read_past(self, d: Index, n: int) -> str:
        if self.past is None:
            return self.zero
        return self.k.load(self.past, [self.batch, self.head, d, self._at(n)], self.x.lanes)

    def _write_state(self, d: Index, n: int, value: str) -> None:
        self.k.store(value, self.state, [self.batch, self.head, d, self._at(n)])

    def _read(self, d: Index, n: int) -> str:
        if self.x.direct:
            return self._read_past(d, n)
        return self.k.load(self.local, [d, n * self.x.lanes], self.x.lanes)

    def _write(self, d: Index, n: int, value: str) -> None:
        if self.x.direct:
            self._write_state(d, n, value)
        else:
            self.k.store(value, self.local, [d, n * self.x.lanes])

    # ---- a chunk ---------------------------------------------------------------------------------------------------
    def _is_bounded(self, t: Index) -> str:
        """Whether the products of the decays of a chunk stay far from overflow; NaN says no."""
        k = self.k
        assert self.decay is not None
        zero = k.constant(0.0, "f32")

        def growth(column: Index, lanes: int, total: str) -> str:
            here = None
            for i in range(self.x.tokens):
                g = k.load(self.decay or "", [self.batch, k.add(t, i), column], lanes)
                positive = k.maxf(g, zero)
                here = positive if here is None else k.addf(here, positive)
            assert here is not None
            return k.maxf(total, here)

        if self.c.decay == "head":
            worst = growth(self.head, 0, zero)
        else:
            lanes = self.x.row_lanes
            first = k.mul(self.head, self.c.dk)
            start = k.splat(zero, lanes)
            (found,) = k.loop(
                self.c.dk, [start], lambda d, w: [growth(k.add(first, d), lanes, w[0])], step=lanes
            )  # fmt: skip
            worst = k.op(f"vector.reduction <maximumf>, {found} : {k.types[found]} into f32", "f32")
        return k.op(f"arith.cmpf ole, {worst}, {k.constant(_MAX_GROWTH, 'f32')} : f32", "i1")

    def _chunk(self, t: Index, tokens: int) -> None:
        """Tokens t to t + tokens: reads the state, writes outputs and the next state."""
        c, k, rows = self.c, self.k, self.rows
        gates = self._gates(t, tokens)
        held = rows.keys(t, tokens)
        keys = [rows.key(t, i) for i in range(tokens)] if c.has_delta else []
        if c.rows == 1:
            seen = rows.queries(t, tokens, 0)
            read = self._sweep([*keys, *(rows.query(t, i, 0) for i in range(tokens))])
            u = self._solve(t, tokens, gates, held, read[:-tokens])
            self._emit_output(t, 0, gates, seen, read[-tokens:], u)
            self._update(t, gates, u)
            return

        lanes, vectors = self.x.lanes, range(self.x.vectors)
        for i, row in enumerate(self._solve(t, tokens, gates, held, self._sweep(keys) if keys else [])):
            for n, vector in enumerate(row):
                k.store(vector, self.updates, [i, n * lanes])

        def solved() -> list[Columns]:
            return [[k.load(self.updates, [i, n * lanes], lanes) for n in vectors] for i in range(tokens)]

        def query_head(head: str, _: list[str]) -> list[str]:
            seen = rows.queries(t, tokens, head)
            read = self._sweep([rows.query(t, i, head) for i in range(tokens)])
            self._emit_output(t, head, gates, seen, read, solved())
            return []

        k.loop(c.rows, [], query_head)
        self._update(t, gates, solved())

    def _gates(self, t: Index, tokens: int) -> Gates:
        k, c = self.k, self.c
        decays = betas = None
        if self.decay is not None and c.decay == "head":
            decays = [k.exp(k.load(self.decay, [self.batch, k.add(t, i), self.head])) for i in range(tokens)]
        if self.beta is not None:
            column: Index = self.head if c.beta == "head" else 0
            betas = [k.load(self.beta, [self.batch, k.add(t, i), column]) for i in range(tokens)]
        return Gates(k, decays, betas, tokens)

    def _sweep(self, rows: Sequence[Callable[[Index], str]]) -> list[Columns]:
        """Each row times the state."""
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

    def _solve(self, t: Index, tokens: int, gates: Gates, held: list[list[str]], read: list[Columns]) -> list[Columns]:
        """The update u of each token."""
        k, x = self.k, self.x
        updates: list[Columns] = []
        base = k.mul(self.head, self.c.dv)
        for i in range(tokens):
            at = [self.batch, k.add(t, i)]
            row = [k.load(self.value, [*at, k.add(base, self._at(n))], x.lanes) for n in range(x.vectors)]
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
        self,
        t: Index,
        query: Index,
        gates: Gates,
        seen: list[list[str]],
        read: list[Columns],
        updates: list[Columns],
    ) -> None:
        """The output o of each token for one query head."""
        k, c = self.k, self.c
        scale = k.constant(c.scale, "f32")
        head = k.add(k.mul(self.head, c.rows), query)
        base = k.mul(head, c.dv)
        for i, row in enumerate(read):
            known = gates.span(-1, i)
            factor = scale if known is None else k.mulf(scale, known)
            row = [k.mulf(factor, r) for r in row]
            for j in range(i + 1):
                factor = k.mulf(scale, gates.times_span(seen[i][j], j, i))
                row = [k.fma(factor, u, r) for u, r in zip(updates[j], row, strict=True)]
            for n, vector in enumerate(row):
                k.store(vector, self.output, [self.batch, k.add(t, i), k.add(base, self._at(n))])

    def _update(self, t: Index, gates: Gates, updates: list[Columns]) -> None:
        """The state after the chunk."""
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
                keys = [k.splat(self.rows.last_key(t, j, at), x.lanes) for j in range(last + 1)]
                for n in range(x.vectors):
                    value = self._read(at, n)
                    value = value if factor is None else k.mulf(factor, value)
                    for key, row in zip(keys, weighed, strict=True):
                        value = k.fma(key, row[n], value)
                    self._write(at, n, value)
            return []

        k.loop(self.c.dk, [], body, step=x.unroll)
