"""The kernel of strategy ``fused_simd`` for calls of many tokens: one key/value head and some columns of its state.

Chunks of C tokens (i, j in the chunk, a_i the decays, D_ij = a_{j+1} ... a_i, pre_i = D_i,-1, S from before the chunk):

    u_i = beta_i (v_i - pre_i (k_i S) - sum_{j<i} D_ij (k_i . k_j) u_j)          linear, gated: u_i = v_i
    o_i = scale (pre_i (q_i S) + sum_{j<=i} D_ij (q_i . k_j) u_j)
    S   = pre_C S + sum_j D_Cj k_j^T u_j

Decays are multiplied, never divided or subtracted, so that resets (-inf) and steep ones are exact; a chunk whose
decays grow by more than e^80 is done in shorter ones instead, as are the last tokens of a call. The triangular system
is solved token by token, exactly as the recurrence would.

The state lies in scratch memory, cut into panels. A chunk goes over them one by one, so that a panel (8 KiB for dk=128
on AVX2) comes from the second-level cache once; what all panels need (``simd_factors``) is computed once before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence

from ..emit.kernel_text import Index, KernelText
from .contract import LinearAttention
from .simd_factors import Factors
from .simd_fetch import Share, ask
from .simd_operands import Operands
from .simd_products import Row, product, row_blocks
from .simd_rows import Rows
from .simd_tiling import PAIR_TOKENS, Blocks

Ask = Callable[[Index, int], None]
"""Asks for some of what is next in a step of so many."""

_MAX_GROWTH = 80.0
_UNROLL = 2
_FEW = 4


class BlocksBody:
    """Writes the body of one kernel.

    Args:
        k: Where to.
        c: What it computes.
        x: Its sizes.
        tokens: T.
        memrefs: Operands and results: query, key, value, past, decay, beta (those that are there), output, state,
            scratch [B, workgroups of a batch row, rows, width of a panel].
    """

    def __init__(self, k: KernelText, c: LinearAttention, x: Blocks, tokens: Index, memrefs: Sequence[str]) -> None:
        self.k, self.c, self.x, self.total = k, c, x, tokens
        self.o = o = Operands(k, c, memrefs)
        (self.scratch,) = o.rest
        self.column = k.mul(o.group, x.columns)
        groups = c.dv // x.columns
        self.base = [o.batch, k.add(k.mul(o.head, groups), o.group)]
        self.rows = Rows(k, c, o, x.tokens, x.row_lanes, copied=True)
        self.keys_row = x.panels * c.dk
        self.updates_row = self.keys_row + c.dk
        self.factors = Factors(
            k, c, x, o, self.rows, lambda d, j: (self.scratch, [*self.base, k.add(self.keys_row, d), j])
        )

    def write(self) -> None:
        """The whole body."""
        k, x, o = self.k, self.x, self.o
        zero = k.constant(0.0, f"vector<{x.lanes}xf32>")

        def read(panel: Index, d: Index, n: int) -> None:
            k.store(o.load_past(d, self._at(panel, n), x.lanes) or zero, self.scratch, self._place(panel, d, n))

        def write(panel: Index, d: Index, n: int) -> None:
            o.store_state(k.load(self.scratch, self._place(panel, d, n), x.lanes), d, self._at(panel, n))

        self._each_element(read)
        k.while_less(self.total, lambda t: self._step(t, self._chunk_sizes()))
        self._each_element(write)

    # ---- places ----------------------------------------------------------------------------------------------------
    def _at(self, panel: Index, n: int) -> Index:
        """Column of vector ``n`` of a panel."""
        k, x = self.k, self.x
        return k.add(self.column, k.add(k.mul(panel, x.width), n * x.lanes))

    def _place(self, panel: Index, d: Index, n: int) -> list[Index]:
        """Where a vector of row d of a panel of the state lies."""
        k = self.k
        return [*self.base, k.add(k.mul(panel, self.c.dk), d), n * self.x.lanes]

    def _row(self, panel: Index, d: Index) -> Row:
        """Row d of a panel of the state."""
        return [self.k.load(self.scratch, self._place(panel, d, n), self.x.lanes) for n in range(self.x.vectors)]

    def _update_places(self, panel: Index, tokens: int, j: Index) -> list[list[Index]]:
        """Where the vectors of the update of token j lie."""
        k, x = self.k, self.x
        first = k.mul(panel, tokens) if x.update_panels(self.c) > 1 else 0
        row = k.add(self.updates_row, k.add(first, j))
        return [[*self.base, row, n * x.lanes] for n in range(x.vectors)]

    def _updates(self, panel: Index, tokens: int, j: Index) -> Row:
        """The update of token j."""
        return [self.k.load(self.scratch, place, self.x.lanes) for place in self._update_places(panel, tokens, j)]

    def _each_panel(self, body: Callable[[Index], None]) -> None:
        if self.x.panels == 1:
            body(0)
            return

        def once(panel: str, _: list[str]) -> list[str]:
            body(panel)
            return []

        self.k.loop(self.x.panels, [], once)

    def _each_element(self, body: Callable[[Index, Index, int], None]) -> None:
        """``body(panel, row, vector)`` for the whole state, row by row, as past and present state lie."""

        def row(d: str, _: list[str]) -> list[str]:
            def panel(p: Index) -> None:
                for n in range(self.x.vectors):
                    body(p, d, n)

            self._each_panel(panel)
            return []

        self.k.loop(self.c.dk, [], row)

    # ---- chunks ----------------------------------------------------------------------------------------------------
    def _chunk_sizes(self) -> list[int]:
        """Tokens of the chunks that a call may need, largest first."""
        most = self.x.tokens
        return [most, *([PAIR_TOKENS] if most > PAIR_TOKENS else []), *([1] if most > 1 else [])]

    def _step(self, t: str, sizes: list[int]) -> str:
        """One chunk, the largest one that fits; returns where the next one starts."""
        k, size = self.k, sizes[0]

        def take() -> list[str]:
            self._chunk(t, size)
            return [k.index(k.add(t, size))]

        if size == 1:
            return take()[0]
        fits = k.less(k.add(t, size), self.total, or_equal=True)
        if self.o.decay is not None:
            (fits,) = k.when(fits, ["i1"], lambda: [self._is_bounded(t, size)], lambda: [k.constant(0, "i1")])
        return k.when(fits, ["index"], take, lambda: [self._step(t, sizes[1:])])[0]

    def _is_bounded(self, t: Index, tokens: int) -> str:
        """Whether the products of the decays of a chunk stay far from overflow.

        A decay of NaN or inf says nothing: what follows is lost anyway, and what precedes is to be as without it.
        """
        k, decay = self.k, self.o.decay
        assert decay is not None
        zero = k.constant(0.0, "f32")

        def growth(column: Index, lanes: int, total: str) -> str:
            here = None
            for i in range(tokens):
                log = k.load(decay, [self.o.batch, k.add(t, i), column], lanes)
                infinity, none = (k.constant(value, k.types[log]) for value in (math.inf, 0.0))
                mask = re.sub("f32", "i1", k.types[log])
                finite = k.op(f"arith.cmpf olt, {log}, {infinity} : {k.types[log]}", mask)
                positive = k.select(finite, k.maxf(log, none), none)
                here = positive if here is None else k.addf(here, positive)
            assert here is not None
            return k.maxf(total, here)

        if self.c.decay == "head":
            worst = growth(self.o.head, 0, zero)
        else:
            lanes = self.x.row_lanes
            first = k.mul(self.o.head, self.c.dk)
            start = k.splat(zero, lanes)
            (found,) = k.loop(
                self.c.dk, [start], lambda d, w: [growth(k.add(first, d), lanes, w[0])], step=lanes
            )  # fmt: skip
            worst = k.op(f"vector.reduction <maximumf>, {found} : {k.types[found]} into f32", "f32")
        return k.op(f"arith.cmpf ole, {worst}, {k.constant(_MAX_GROWTH, 'f32')} : f32", "i1")

    def _chunk(self, t: Index, tokens: int) -> None:
        """Tokens t to t + tokens: outputs and the next state."""
        k = self.k
        chunk = self.factors.keys(t, tokens)
        if self.c.rows == 1:
            self.factors.queries(chunk, 0)

            def all_of(panel: Index) -> None:
                asks = self._asks(panel, k.add(t, tokens), tokens)
                self._solve(panel, t, tokens, asks)
                self._emit_output(panel, t, tokens, 0, asks)
                self._advance(panel, t, tokens)

            self._each_panel(all_of)
            return

        def solve(panel: Index) -> None:
            self._solve(panel, t, tokens, self._asks(panel, k.add(t, tokens), tokens))

        self._each_panel(solve)

        def query_head(head: str, _: list[str]) -> list[str]:
            self.factors.queries(chunk, head)
            self._each_panel(lambda panel: self._emit_output(panel, t, tokens, head, iter(())))
            return []

        k.loop(self.c.rows, [], query_head)
        self._each_panel(lambda panel: self._advance(panel, t, tokens))

    def _reads(self, rows: Sequence[Callable[[Index], str]], panel: Index, asks: Iterator[Ask]) -> list[Row]:
        """Rows times a panel of the state."""
        x = self.x
        return product(self.k, rows, lambda d: self._row(panel, d), self.c.dk, x.lanes, x.vectors, next(asks, None))

    def _shares(self, panel: Index) -> list[Share]:
        """A panel's share of what tokens have in memory."""
        keys = self.c.dk // self.x.panels
        return [*self.rows.shares(self.k.mul(panel, keys), keys), *self.o.shares(self._at(panel, 0), self.x.width)]

    def _asks(self, panel: Index, t: Index, tokens: int) -> Iterator[Ask]:
        """What the products of a chunk with a panel do besides: they ask for the next chunk's share of it."""
        shares, c = self._shares(panel), self.c
        loops = len(row_blocks(tokens, self.x.rows)) * (c.has_delta + (c.rows == 1))

        def ask_for(some: list[Share]) -> Ask:
            return lambda step, steps: ask(self.k, some, t, tokens, step, steps)

        def all_of(step: str, _: list[str]) -> list[str]:
            ask_for(shares)(step, c.dk)
            return []

        if not loops:  # several query heads without updates: no product is made once a panel
            self.k.loop(c.dk, [], all_of)
        return iter([ask_for(shares[loop::loops]) for loop in range(loops)])

    def _solve(self, panel: Index, t: Index, tokens: int, asks: Iterator[Ask]) -> None:
        """The updates u."""
        k, x, f = self.k, self.x, self.factors
        for first, count in row_blocks(tokens, x.rows):
            block = range(first, first + count)
            rows = {
                i: [self.o.load_value(k.add(t, i), self._at(panel, n), x.lanes) for n in range(x.vectors)]
                for i in block
            }  # fmt: skip
            if self.c.has_delta:
                read = self._reads([self.rows.key(t, i) for i in block], panel, asks)
                for i, held in zip(block, read, strict=True):
                    rows[i] = [k.fma(f.known(i), r, k.mulf(f.rate(i), v)) for r, v in zip(held, rows[i], strict=True)]
                self._add_updates(f.solve, rows, panel, tokens, 0, first)
            for few in _few(block):
                if self.c.has_delta:
                    mine = {i: rows[i] for i in few}
                    self._add_updates(f.solve, mine, panel, tokens, first, few[0])
                    for j in few:
                        for i in few[few.index(j) + 1 :]:
                            mine[i] = self._add(f.solve(i, j), mine[j], mine[i])
                    rows |= mine
                for i in few:
                    for vector, place in zip(rows[i], self._update_places(panel, tokens, i), strict=True):
                        k.store(vector, self.scratch, place)

    def _add_updates(
        self,
        factor: Callable[[int, Index], str],
        rows: dict[int, Row],
        panel: Index,
        tokens: int,
        start: int,
        stop: int,
    ) -> None:
        """Adds to each row its factors times the updates of tokens ``start`` to ``stop``, which are stored.

        In a loop: written out, LLVM takes a number at a time out of the row of sums, and the others' loads wait on the
        stack.
        """

        def add(j: str, carried: list[str]) -> list[str]:
            update = self._updates(panel, tokens, j)
            sums: list[str] = []
            for n, i in enumerate(rows):
                sums += self._add(factor(i, j), update, carried[n * x.vectors : (n + 1) * x.vectors])
            return sums

        x = self.x
        if stop > start:
            sums = self.k.loop(stop, [vector for row in rows.values() for vector in row], add, start=start)
            rows.update({i: sums[n * x.vectors : (n + 1) * x.vectors] for n, i in enumerate(rows)})

    def _emit_output(self, panel: Index, t: Index, tokens: int, head: Index, asks: Iterator[Ask]) -> None:
        """The outputs o for one query head."""
        k, x, f = self.k, self.x, self.factors
        for first, count in row_blocks(tokens, x.rows):
            block = range(first, first + count)
            read = self._reads([self.rows.query(t, i, head) for i in block], panel, asks)
            rows = {i: [k.mulf(f.scaled(i), r) for r in row] for i, row in zip(block, read, strict=True)}
            self._add_updates(f.mix, rows, panel, tokens, 0, first)
            for few in _few(block):
                mine = {i: rows[i] for i in few}
                self._add_updates(f.mix, mine, panel, tokens, first, few[0])
                for j in few:
                    update = self._updates(panel, tokens, j)
                    for i in few[few.index(j) :]:
                        mine[i] = self._add(f.mix(i, j), update, mine[i])
                rows |= mine
            for i in block:
                for n, vector in enumerate(rows[i]):
                    self.o.store_output(vector, k.add(t, i), head, self._at(panel, n))

    def _advance(self, panel: Index, t: Index, tokens: int) -> None:
        """The state after the chunk."""
        k, x, f = self.k, self.x, self.factors
        for j in range(tokens):
            for vector, place in zip(
                self._updates(panel, tokens, j), self._update_places(panel, tokens, j), strict=True
            ):
                k.store(k.mulf(f.rest(j), vector), self.scratch, place)

        def rows(start: Index, count: int) -> None:
            at = [k.add(start, r) for r in range(count)]
            held = [[k.mulf(f.total(d), vector) for vector in self._row(panel, d)] for d in at]

            def add(j: Index, carried: list[str]) -> list[str]:
                found = [carried[i : i + x.vectors] for i in range(0, len(carried), x.vectors)]
                for token in range(step):
                    update = self._updates(panel, tokens, k.add(j, token))
                    keys = [self.rows.last_key(t, k.add(j, token), d) for d in at]
                    found = [self._add(key, update, row) for key, row in zip(keys, found, strict=True)]
                return [vector for row in found for vector in row]

            # A loop: of all tokens in a row LLVM hoists the loads, and every other sum waits on the stack.
            step = math.gcd(tokens, _UNROLL)
            sums = [vector for row in held for vector in row]
            sums = k.loop(tokens, sums, add, step=step) if tokens > step else add(0, sums)
            held = [sums[i : i + x.vectors] for i in range(0, len(sums), x.vectors)]
            for d, row in zip(at, held, strict=True):
                for n, vector in enumerate(row):
                    k.store(vector, self.scratch, self._place(panel, d, n))

        def block(d: str, _: list[str]) -> list[str]:
            rows(d, x.rows)
            return []

        whole = self.c.dk // x.rows * x.rows
        if whole:
            k.loop(whole, [], block, step=x.rows)
        if self.c.dk % x.rows:
            rows(whole, self.c.dk % x.rows)

    def _add(self, factor: str, row: Row, to: Row) -> Row:
        return [self.k.fma(factor, a, b) for a, b in zip(row, to, strict=True)]


def _few(block: range) -> list[range]:
    """Rows of a block that add to each other, a few at a time."""
    return [block[first : first + _FEW] for first in range(0, len(block), _FEW)]
