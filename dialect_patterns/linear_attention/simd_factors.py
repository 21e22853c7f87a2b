"""What the tokens of a chunk are to each other, on the stack, for the kernel of ``simd_blocks``.

    solve_ij = -beta_i D_ij (k_i . k_j), j < i        known_i  = -beta_i pre_i        rate_i = beta_i
    mix_ij   = scale D_ij (q_i . k_j), j <= i         scaled_i = scale pre_i          rest_j = D_Cj, total = pre_C

A chunk of up to 4 tokens computes the products pair by pair (``simd_rows``). A longer one, whose decays are per head,
takes the keys, transposed, as a panel: keys and queries times that panel are products like those with the state, and
row i of D is a_i times row i - 1, plus a one in place i. Decays per key are already in keys and queries; D is 1 then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..emit.kernel_text import Index, KernelText, vector_type
from .contract import LinearAttention
from .simd_operands import Gates, Operands
from .simd_products import product, row_blocks, transpose
from .simd_rows import Rows
from .simd_tiling import PAIR_TOKENS, Blocks


@dataclass(frozen=True)
class _Chunk:
    """What the keys of a chunk leave for its queries: the spans of its decays."""

    t: Index
    tokens: int
    gates: Gates | None
    spans: list[list[str]]


class Factors:
    """Writes the factors of a chunk; ``keys`` comes first.

    Args:
        k: Where to.
        c: What the kernel computes.
        x: Its sizes.
        o: Its operands.
        rows: Keys and queries.
        panel: Memref of the transposed keys, and where a row of it starts.
    """

    def __init__(
        self,
        k: KernelText,
        c: LinearAttention,
        x: Blocks,
        o: Operands,
        rows: Rows,
        panel: Callable[[Index, int], tuple[str, list[Index]]],
    ) -> None:
        self._k, self._c, self._x, self._o, self._rows, self._panel = k, c, x, o, rows, panel
        width = -(-x.tokens // x.lanes) * x.lanes
        self._solve, self._mix = k.alloca([x.tokens, width]), k.alloca([x.tokens, width])
        self._known, self._rates, self._scaled, self._rest = (k.alloca([width]) for _ in range(4))
        self._total = k.constant(1.0, "f32")

    # ---- what the rest reads ---------------------------------------------------------------------------------------
    def solve(self, i: int, j: Index) -> str:
        """Factor of the update of token j in that of token i."""
        return self._k.load(self._solve, [i, j])

    def known(self, i: int) -> str:
        """Factor of what the state holds for the key of token i, in its update."""
        return self._k.load(self._known, [i])

    def rate(self, i: int) -> str:
        """Factor of the value of token i in its update."""
        return self._k.load(self._rates, [i])

    def mix(self, i: int, j: Index) -> str:
        """Factor of the update of token j in the output of token i."""
        return self._k.load(self._mix, [i, j])

    def scaled(self, i: int) -> str:
        """Factor of what the state holds for the query of token i, in its output."""
        return self._k.load(self._scaled, [i])

    def rest(self, j: int) -> str:
        """Factor of the update of token j in the state after the chunk."""
        return self._k.load(self._rest, [j])

    def total(self, d: Index) -> str:
        """Factor of row d of the state before the chunk in that after it."""
        return self._rows.total(d) if self._c.decay == "key" else self._total

    # ---- writing them ----------------------------------------------------------------------------------------------
    def keys(self, t: Index, tokens: int) -> _Chunk:
        """All that the keys and gates of a chunk decide."""
        return self._pairs(t, tokens) if tokens <= PAIR_TOKENS else self._block(t, tokens)

    def queries(self, chunk: _Chunk, head: Index) -> None:
        """What one head of queries decides: ``mix``."""
        k, x = self._k, self._x
        scale = k.constant(self._c.scale, "f32")
        if chunk.gates is not None:
            seen = self._rows.queries(chunk.t, chunk.tokens, head)
            for i, row in enumerate(seen):
                for j, value in enumerate(row):
                    k.store(k.mulf(scale, chunk.gates.times_span(value, j, i)), self._mix, [i, j])
            return
        self._rows.copy_queries(chunk.t, chunk.tokens, head)
        for i, row in self._products(chunk.tokens, lambda i: self._rows.query(chunk.t, i, head)):
            for n, vector in enumerate(row):
                spanned = k.mulf(chunk.spans[i][n], vector)
                k.store(k.mulf(k.splat(scale, x.lanes), spanned), self._mix, [i, n * x.lanes])

    def _pairs(self, t: Index, tokens: int) -> _Chunk:
        k, scale = self._k, self._k.constant(self._c.scale, "f32")
        gates = self._o.gates(t, tokens)
        held = self._rows.keys(t, tokens)
        one = k.constant(1.0, "f32")
        self._total = gates.span(-1, tokens - 1) or one
        for i in range(tokens):
            before = gates.span(-1, i) or one
            k.store(k.mulf(scale, before), self._scaled, [i])
            k.store(gates.span(i, tokens - 1) or one, self._rest, [i])
            if gates.betas is None:
                continue
            against = k.negate(gates.betas[i])
            k.store(gates.betas[i], self._rates, [i])
            k.store(k.mulf(against, before), self._known, [i])
            for j, value in enumerate(held[i]):
                k.store(k.mulf(against, gates.times_span(value, j, i)), self._solve, [i, j])
        return _Chunk(t, tokens, gates, [])

    def _block(self, t: Index, tokens: int) -> _Chunk:
        k, c, x = self._k, self._c, self._x
        scale = k.constant(c.scale, "f32")
        side = min(x.row_lanes, tokens)

        def keep(d: Index, first: int, rows: list[str]) -> None:
            for e, column in enumerate(transpose(k, rows)):
                memref, place = self._panel(k.add(d, e), first)
                k.store(column, memref, place)

        self._rows.copy_keys(t, tokens, keep, side)
        decays = self._decays(t, tokens)
        spans = self._spans(decays, tokens)
        betas = [self._o.load_beta(t, i) for i in range(tokens)] if c.has_delta else []
        before = k.constant(1.0, "f32")
        for i in range(tokens):
            before = before if decays is None else decays[i] if i == 0 else k.mulf(before, decays[i])
            k.store(k.mulf(scale, before), self._scaled, [i])
            if betas:
                k.store(betas[i], self._rates, [i])
                k.store(k.mulf(k.negate(betas[i]), before), self._known, [i])
        self._total = before
        for n, vector in enumerate(spans[-1]):
            k.store(vector, self._rest, [n * x.lanes])
        if betas:
            for i, row in self._products(tokens, lambda i: self._rows.key(t, i)):
                against = k.splat(k.negate(betas[i]), x.lanes)
                for n, vector in enumerate(row):
                    k.store(k.mulf(against, k.mulf(spans[i][n], vector)), self._solve, [i, n * x.lanes])
        return _Chunk(t, tokens, None, spans)

    def _products(self, tokens: int, row: Callable[[int], Callable[[Index], str]]) -> list[tuple[int, list[str]]]:
        """Rows times the transposed keys, as far as these come not after them."""
        k, x = self._k, self._x
        found: list[tuple[int, list[str]]] = []
        for first, count in row_blocks(tokens, x.rows):
            vectors = -(-(first + count) // x.lanes)

            def panel(d: Index, vectors: int = vectors) -> list[str]:
                places = [self._panel(d, n * x.lanes) for n in range(vectors)]
                return [k.load(memref, place, x.lanes) for memref, place in places]

            rows = [row(i) for i in range(first, first + count)]
            found += enumerate(product(k, rows, panel, self._c.dk, x.lanes, vectors), first)
        return found

    def _decays(self, t: Index, tokens: int) -> list[str] | None:
        """The decays of a chunk, None if the rule has none."""
        k, lanes = self._k, self._x.lanes
        if self._c.decay != "head":
            return None
        for i in range(tokens):
            k.store(self._o.load_decay(t, i), self._rest, [i])
        for n in range(0, tokens, lanes):
            k.store(k.exp(k.load(self._rest, [n], lanes)), self._rest, [n])
        return [k.load(self._rest, [i]) for i in range(tokens)]

    def _spans(self, decays: list[str] | None, tokens: int) -> list[list[str]]:
        """Rows of D, as vectors, zeros after the diagonal: selected, since 0 times a decay of NaN or inf is NaN."""
        k, lanes = self._k, self._x.lanes
        vectors = -(-tokens // lanes)
        row = [k.constant(0.0, vector_type(lanes))] * vectors
        rows: list[list[str]] = []
        for i in range(tokens):
            units = [
                k.lanes_constant([1.0 if n * lanes + e == i else 0.0 for e in range(lanes)]) for n in range(vectors)
            ]
            if decays is None:
                row = [k.addf(old, unit) for old, unit in zip(row, units, strict=True)]
            else:
                earlier = [k.lanes_mask([n * lanes + e < i for e in range(lanes)]) for n in range(vectors)]
                decay = k.splat(decays[i], lanes)
                row = [
                    k.select(mask, k.mulf(decay, old), unit)
                    for mask, old, unit in zip(earlier, row, units, strict=True)
                ]
            rows.append(row)
        return rows
