"""One token of the fused GPU kernel: all that reads the state is summed at once.

    h = a (k S);  p = a (q S);  u = beta (v - h);  S <- a S + k^T u;  o = scale (p + (q . k) u)

The recurrence (``fused_simt_kernel``) waits twice for a sum over the lanes of a column, for k S and then for q S of the
next state. Here both are sums over the state as it was loaded, and what the update adds to the output is a product of
numbers: one wait, which neither decay nor rate have to be there for. Norms of keys and queries are factors of the
sums. Where the lanes of a column lie in several subgroups, the sums of these meet in the workgroup's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from iree.compiler import ir

from ..emit.scalar import Scalar

if TYPE_CHECKING:
    from .fused_simt_kernel import Recurrence, Token

Store = Callable[[Sequence[ir.Value]], None]


class Step:
    """Emits it.

    Args:
        recurrence: What it is part of.
    """

    def __init__(self, recurrence: Recurrence) -> None:
        self.r, self.k, self.c, self.p = recurrence, recurrence.k, recurrence.c, recurrence.p
        if self.p.sharing > 1:
            rows, before, subgroups = self.c.rows, recurrence.before, self.p.threads // self.p.subgroup
            self.numbers = rows + (rows if before.query_norm else 0) + (1 if before.key_norm else 0)
            self.vectors = rows + (1 if recurrence.beta is not None else 0)
            self.shared = self.k.shared_chunks(subgroups * self.vectors * self.p.inside)
            self.shared_numbers = self.k.shared(subgroups * self.numbers)

    def emit(self, state: Sequence[ir.Value], token: Token, store: Store) -> None:
        """Store the next state and write the outputs; in this order, since few threads write those."""
        r, k, c, p = self.r, self.k, self.c, self.p
        key, queries = r.elements(r.key, token.key), [r.elements(r.query, row) for row in token.query]
        decays = r.decays(token)
        if c.decay == "key":
            state, decays = r.decayed(state, decays), []
        readers = [*queries, key] if r.beta is not None else queries
        vectors = [r.lanes.dot([k.splat(e, p.columns) for e in row], state) for row in readers]
        vectors, numbers = self._sum(vectors, self._numbers(queries, key))
        vectors = r.decayed(vectors, decays)
        products, squares = numbers[: c.rows], numbers[c.rows :]
        if r.before.key_norm:
            factor = self._inverse(squares.pop())
            key, products = [k.mul(e, factor) for e in key], [k.mul(e, factor) for e in products]
            vectors[c.rows :] = [k.mul(held, k.splat(factor, p.columns)) for held in vectors[c.rows :]]
        for i, square in enumerate(squares):
            factor = self._inverse(square)
            products[i] = k.mul(products[i], factor)
            vectors[i] = k.mul(vectors[i], k.splat(factor, p.columns))
        update = k.widen(r.value, token.value)
        if r.beta is not None:
            update = k.mul(k.splat(r.rate(r.beta, token), p.columns), k.sub(update, vectors[-1]))
        store([k.fma(k.splat(e, p.columns), update, s) for e, s in zip(key, r.decayed(state, decays), strict=True)])
        self._write([k.fma(k.splat(e, p.columns), update, v) for e, v in zip(products, vectors, strict=False)])

    def _numbers(self, queries: Sequence[list[ir.Value]], key: list[ir.Value]) -> list[ir.Value]:
        """This thread's part of q . k for each query, and of the squares of what is to be of length one."""
        dot, before = self.r.lanes.dot, self.r.before
        squares: list[list[ir.Value]] = list(queries) if before.query_norm else []
        if before.key_norm:
            squares.append(key)
        return [*(dot(row, key) for row in queries), *(dot(row, row) for row in squares)]

    def _inverse(self, square: ir.Value) -> ir.Value:
        """1 / the length of a row; zero for one of length zero."""
        k = self.k
        return k.select(Scalar(square).equals(0.0), k.constant(0.0), k.rsqrt(square))

    def _write(self, reads: Sequence[ir.Value]) -> None:
        r, k, c, p = self.r, self.k, self.c, self.p

        def write() -> None:
            for row, read in enumerate(reads):
                place = (r.batch * c.out_heads + r.head * c.rows + row) * (c.dv // p.columns) + r.column
                k.store(k.mul(read, k.constant(c.scale, p.columns)), r.output, place)

        k.when(r.valid, write)

    # ---- sums ------------------------------------------------------------------------------------------------------
    def _sum(self, vectors: Sequence[ir.Value], numbers: Sequence[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
        """Each summed over the lanes of a column; every lane gets the sums."""
        k, p, count = self.k, self.p, len(vectors)
        found = self.r.lanes.sum([*vectors, *numbers], 0, Scalar.constant(0, "index"))
        if p.sharing == 1:
            return found[:count], found[count:]
        subgroup, place = k.thread().divide_unsigned(p.subgroup)
        first = subgroup.divide_unsigned(p.sharing)[0] * p.sharing
        lane, group = place.divide_unsigned(p.inside)

        def vector_place(subgroup: Scalar, i: int) -> Scalar:
            return (subgroup * self.vectors + i) * p.inside + group

        def put() -> None:
            for i, value in enumerate(found[:count]):
                k.store(value, self.shared, vector_place(subgroup, i))
            for i, value in enumerate(found[count:]):
                k.store(value, self.shared_numbers, subgroup * self.numbers + i)

        k.when(lane.equals(0), put)
        k.barrier()
        members = [first + s for s in range(p.sharing)]
        return (
            [self._total([k.load(self.shared, vector_place(s, i)) for s in members]) for i in range(count)],
            [
                self._total([k.load(self.shared_numbers, s * self.numbers + i) for s in members])
                for i in range(len(numbers))
            ],
        )

    def _total(self, parts: list[ir.Value]) -> ir.Value:
        while len(parts) > 1:
            parts = [self.k.add(*parts[i : i + 2]) if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)]
        return parts[0]
