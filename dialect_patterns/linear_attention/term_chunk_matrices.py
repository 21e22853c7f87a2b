"""What both forms of the first kernel of strategy ``fused_term_chunks`` do: the matrices of factors, in terms."""

from __future__ import annotations

from iree.compiler import ir

from ..emit.chunk_words import NUMBERS, pack, split
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Kernel
from .contract import LinearAttention
from .mma_chunk_factors import BAD, MIX, STRIDE, THREADS, MmaFactors
from .mma_chunk_operands import ACROSS, MATRIX, RATE, within
from .term_chunk_operands import TermPlan


class TermMatrices(MmaFactors):
    """What both emit.

    Args:
        k: Emits instructions.
        c: What to compute.
        p: How the work is cut.
        streams: B * max(Hq, Hkv).
        tokens: T.
    """

    def __init__(self, k: Kernel, c: LinearAttention, p: TermPlan, streams: Scalar, tokens: Scalar) -> None:
        super().__init__(k, c, p, streams, tokens, size=p.record)
        self.plan = p

    @property
    def matrices_count(self) -> int:
        """How many matrices of factors there are."""
        return self.plan.matrices

    def _terms(self, values: list[ir.Value]) -> tuple[ir.Value, ir.Value]:
        return split(self.k, values, self.o.zero)

    def _query_terms(self, query: list[ir.Value]) -> list[ir.Value]:
        return list(self._terms(query)) if self.plan.terms == 2 else [pack(self.k, query, "f16")]

    def _write_matrices(self, base: Scalar) -> None:
        """A chunk of each matrix a thread."""
        self.k.when(self.thread < THREADS, lambda: self._write_chunks(base))

    def _write_chunks(self, base: Scalar) -> None:
        k = self.k
        row, chunk = self.thread.divide_unsigned(ACROSS)
        column = chunk * NUMBERS

        def read(start: int) -> list[ir.Value]:
            return [k.load(self.products, row * STRIDE + column + (start + e)) for e in range(NUMBERS)]

        mixed = read(self._mix)
        self._check(mixed, MIX)
        written = self._query_terms(mixed)
        if self.c.has_delta:
            scaled = [k.mul(value, self._number(RATE, column + e)) for e, value in enumerate(read(0))]
            solve = [k.select(column + e <= row, value, k.constant(0.0)) for e, value in enumerate(scaled)]
            self._note_unless(within(k, solve), BAD)
            written = [*self._terms(solve), *written]
        for i, term in enumerate(written):
            k.store_as_is(term, self.output, base + self.thread + i * MATRIX)
