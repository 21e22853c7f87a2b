"""Keys and queries of a chunk for strategy ``fused_simd``: their products, and where sweeps over the state read them.

One chunk of f32 with decays per head reads them from the operands. Else a chunk first copies them to the stack as f32;
decays per key dimension are multiplied in then (m an element of a head, products over the tokens of the chunk):

    key_i    = k_i  prod_{n<=i} a_n            query_i = q_i prod_{n<=i} a_n        for the sweeps
    last_j   = k_j  prod_{n>j}  a_n            total   = prod a_n                   for the update of the state
    k_i . k_j = sum_m k_im k_jm prod_{j<n<=i} a_nm                                  and the same with q_i
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..emit.kernel_text import Index, KernelText
from .contract import LinearAttention
from .simd_fetch import Share
from .simd_operands import Operands


class Rows:
    """Writes what concerns keys and queries; ``keys`` comes first in a chunk.

    Args:
        k: Where to.
        c: What the kernel computes.
        o: Its operands.
        tokens: Of the longest chunk.
        lanes: Of a vector along dk.
        copied: Whether keys and queries are copied to the stack.
    """

    def __init__(
        self, k: KernelText, c: LinearAttention, o: Operands, tokens: int, lanes: int, *, copied: bool
    ) -> None:
        self._k, self._c, self._lanes, self._batch = k, c, lanes, o.batch
        self._query, self._key, self._decay = o.query, o.key, o.decay
        self._per_key = c.decay == "key"
        self._key_base = k.mul(k.div(o.head, c.kv_heads // c.k_heads), c.dk)
        inverse = max(1, c.kv_heads // c.q_heads)
        self._query_head = k.mul(k.div(o.head, inverse), c.rows)
        self._decay_base = k.mul(o.head, c.dk)
        self._copied = copied
        shape = [tokens, c.dk]
        if copied:
            self._queries = k.alloca(shape)
            self._last = k.alloca(shape)
            self._decays = k.alloca(shape) if self._per_key else ""
            self._keys = k.alloca(shape) if self._per_key and c.has_delta else self._last
            self._total = k.alloca([c.dk]) if self._per_key else ""

    # ---- where the sweeps read -------------------------------------------------------------------------------------
    def key(self, t: Index, i: int) -> Callable[[Index], str]:
        """Elements of the key that reads the state for token i."""
        return lambda d: self._element(self._key, self._keys if self._copied else "", t, i, self._key_base, d)

    def last_key(self, t: Index, j: Index, d: Index) -> str:
        """An element of the key that updates the state for token j."""
        return self._element(self._key, self._last if self._copied else "", t, j, self._key_base, d)

    def query(self, t: Index, i: int, head: Index) -> Callable[[Index], str]:
        """Elements of the query that reads the state for token i."""
        base = self._query_base(head)
        return lambda d: self._element(self._query, self._queries if self._copied else "", t, i, base, d)

    def shares(self, first: Index, columns: int) -> list[Share]:
        """Some elements of the key and the queries of a token."""
        heads = [(self._key, self._key_base), *((self._query, self._query_base(head)) for head in range(self._c.rows))]
        return [Share(memref, self._batch, self._k.add(base, first), columns) for memref, base in heads]

    def total(self, d: Index) -> str:
        """The decay of row d over the chunk, where decays are per key dimension."""
        return self._k.load(self._total, [d])

    def _element(self, operand: str, copy: str, t: Index, i: Index, base: Index, d: Index) -> str:
        k = self._k
        if copy:
            return k.load(copy, [i, d])
        return k.load(operand, [self._batch, k.add(t, i), k.add(base, d)])

    def _query_base(self, head: Index) -> Index:
        k = self._k
        return k.mul(k.add(self._query_head, head), self._c.dk)

    def copy_keys(self, t: Index, tokens: int, also: Callable[[Index, int, list[str]], None], side: int) -> None:
        """Copy the keys of a chunk; ``also(d, i, vectors)`` for squares of tokens from i by elements from d."""
        self._copy(self._key, self._last, t, tokens, self._key_base, side, also)

    def copy_queries(self, t: Index, tokens: int, head: Index) -> None:
        """Copy the queries of a chunk for one head."""
        lanes = self._lanes
        self._copy(self._query, self._queries, t, tokens, self._query_base(head), lanes, lambda d, i, rows: None)

    def _copy(
        self,
        operand: str,
        copy: str,
        t: Index,
        tokens: int,
        base: Index,
        lanes: int,
        also: Callable[[Index, int, list[str]], None],
    ) -> None:
        k = self._k

        def body(d: str, _: list[str]) -> list[str]:
            for first in range(0, tokens, lanes):
                at = range(first, min(first + lanes, tokens))
                rows = [k.load(operand, [self._batch, k.add(t, i), k.add(base, d)], lanes) for i in at]
                for i, row in zip(at, rows, strict=True):
                    k.store(row, copy, [i, d])
                also(d, first, rows)
            return []

        k.loop(self._c.dk, [], body, step=lanes)

    # ---- products and copies ---------------------------------------------------------------------------------------
    def keys(self, t: Index, tokens: int) -> list[list[str]]:
        """Copy the keys where needed; k_i . k_j for j < i if the rule needs them."""
        k, c = self._k, self._c
        pairs = [(i, j) for i in range(tokens) for j in range(i)] if c.has_delta else []
        if not pairs and not self._copied:
            return [[] for _ in range(tokens)]

        def body(d: str, carried: list[str]) -> list[str]:
            sums = dict(zip(pairs, carried, strict=True))
            keys = self._vectors(self._key, t, tokens, k.add(self._key_base, d))
            decays = self._read_decays(t, tokens, d)
            passed = None
            for i in range(tokens):
                if decays is not None:
                    passed = decays[i] if passed is None else k.mulf(passed, decays[i])
                if self._copied and c.has_delta:
                    k.store(keys[i] if passed is None else k.mulf(keys[i], passed), self._keys, [i, d])
            if passed is not None:
                k.store(passed, self._total, [d])
            for j in range(tokens):
                weighed = keys[j]
                for i in range(j + 1, tokens):
                    weighed = weighed if decays is None else k.mulf(weighed, decays[i])
                    if pairs:
                        sums[i, j] = k.fma(keys[i], weighed, sums[i, j])
                if self._copied and (self._per_key or not c.has_delta):
                    k.store(weighed, self._last, [j, d])
            return [sums[p] for p in pairs]

        found = self._sums(len(pairs), body)
        return [[found[pairs.index((i, j))] for j in range(i if pairs else 0)] for i in range(tokens)]

    def queries(self, t: Index, tokens: int, head: Index) -> list[list[str]]:
        """Copy the queries of one head where needed; q_i . k_j for j <= i."""
        k, lanes = self._k, self._lanes
        pairs = [(i, j) for i in range(tokens) for j in range(i + 1)]
        base = self._query_base(head)

        def body(d: str, carried: list[str]) -> list[str]:
            sums = dict(zip(pairs, carried, strict=True))
            keys = self._vectors(self._key, t, tokens, k.add(self._key_base, d))
            queries = self._vectors(self._query, t, tokens, k.add(base, d))
            decays = None
            if self._per_key:
                decays = [k.load(self._decays, [i, d], lanes) for i in range(tokens)]
            passed = None
            for i in range(tokens):
                if decays is not None:
                    passed = decays[i] if passed is None else k.mulf(passed, decays[i])
                if self._copied:
                    k.store(queries[i] if passed is None else k.mulf(queries[i], passed), self._queries, [i, d])
            for j in range(tokens):
                weighed = keys[j]
                for i in range(j, tokens):
                    if decays is not None and i > j:
                        weighed = k.mulf(weighed, decays[i])
                    sums[i, j] = k.fma(queries[i], weighed, sums[i, j])
            return [sums[p] for p in pairs]

        found = self._sums(len(pairs), body)
        return [[found[pairs.index((i, j))] for j in range(i + 1)] for i in range(tokens)]

    def _vectors(self, operand: str, t: Index, tokens: int, column: Index) -> list[str]:
        k = self._k
        return [k.load(operand, [self._batch, k.add(t, i), column], self._lanes) for i in range(tokens)]

    def _read_decays(self, t: Index, tokens: int, d: str) -> list[str] | None:
        """The exponentials of the decays of some key elements, kept for the queries."""
        if not self._per_key:
            return None
        k = self._k
        logs = self._vectors(self._decay or "", t, tokens, k.add(self._decay_base, d))
        decays = [k.exp(g) for g in logs]
        for i, decay in enumerate(decays):
            k.store(decay, self._decays, [i, d])
        return decays

    def _sums(self, count: int, body: Callable[[str, list[str]], Sequence[str]]) -> list[str]:
        """Loop over the key elements with ``count`` vector sums; the sums over their lanes."""
        k, lanes = self._k, self._lanes
        zero = k.constant(0.0, f"vector<{lanes}xf32>")
        sums = k.loop(self._c.dk, [zero] * count, body, step=lanes)
        return k.sum_lanes(sums) if count else []
