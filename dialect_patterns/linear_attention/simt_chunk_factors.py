"""The first kernel of strategy ``fused_simt_chunks``: the factors of every chunk, all chunks at once.

A workgroup does one chunk of one state. Its threads take the products of keys with keys and queries in tiles of 4 x 4
tokens, 8 of them along a product; then one thread a column multiplies the decays up, and solves for the inverse row by
row, exactly as the recurrence would. The layout is that of ``simt_chunk_operands``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from iree.compiler import ir

from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer, Kernel
from .contract import LinearAttention
from .simt_chunk_operands import (
    BOUNDED,
    CHUNK,
    DECAY,
    MAX_GROWTH,
    PRE,
    RATE,
    REST,
    SCALED,
    STRIDE,
    TOTAL,
    VECTORS,
    WIDTH,
    ChunkOperands,
    matrices,
    mix_start,
    scatter,
)

_TILE = 4  # tokens
_TILES = CHUNK // _TILE
LANES = 8
"""Threads that share a product."""
THREADS = _TILES * _TILES * LANES
"""Threads of a workgroup."""


class Factors:
    """Emits the kernel.

    Buffers: query, key, decay and beta where the rule has them, factors [B * Hkv, chunks, numbers].

    Args:
        k: Emits instructions.
        c: What to compute.
        states: B * Hkv.
        tokens: T.
        whole: Whether that is a number of whole chunks.
    """

    def __init__(self, k: Kernel, c: LinearAttention, states: Scalar, tokens: Scalar, *, whole: bool) -> None:
        self.k, self.c = k, c
        self.o = o = ChunkOperands(k, c, tokens, states, whole)
        o.bind_rows()
        self.decay = o.buffer(c.kv_heads, c.dtype, 1) if c.decay != "none" else None
        self.beta = o.buffer(c.kv_heads if c.beta == "head" else 1, c.dtype, 1) if c.beta != "none" else None
        self.chunks = (tokens + (CHUNK - 1)).divide_unsigned(CHUNK)[0]
        self.numbers = matrices(c) + VECTORS
        self.count = states * self.chunks
        self.output = o.buffer(self.numbers, "f32", 1, self.count)

    def emit(self) -> None:
        """Emit everything."""
        k, item = self.k, self.k.item()
        self.products = k.shared(2 * CHUNK * STRIDE)
        self.found = k.shared(self.numbers)
        k.when(item < self.count, lambda: self._chunk(item))

    def _chunk(self, item: Scalar) -> None:
        k, o = self.k, self.o
        state, chunk = k.item_by(self.chunks)
        o.choose(state)
        self.start = chunk * CHUNK
        thread = k.thread()
        self.column = thread
        k.when(thread < CHUNK, lambda: self._gates(thread))
        self._products()
        k.barrier()
        k.when(thread < CHUNK, self._spans)
        k.when(thread.equals(LANES * _TILES), self._prefixes)
        k.barrier()
        if self.c.has_delta:
            k.when(thread < CHUNK, self._inverse)
            k.barrier()
        for first in range(0, self.numbers, THREADS):
            place = (thread + first).minimum(self.numbers - 1)
            k.store(k.load(self.found, place), self.output, item * self.numbers + place)

    def _vector(self, start: int, i: Scalar | int) -> Scalar:
        """Where a number of one of the vectors lies."""
        base = matrices(self.c) + start
        return Scalar.constant(base + i, "index") if isinstance(i, int) else i + base

    def _gates(self, i: Scalar) -> None:
        """Decay and rate of one token."""
        k, c, o = self.k, self.c, self.o
        t = self.start + i
        inside, own = o.inside(t), o.row(t) * c.kv_heads + o.head

        def gate(buffer: Buffer, place: Scalar, beyond: float, then: Callable[[ir.Value], ir.Value]) -> ir.Value:
            value = then(k.widen(buffer, k.load(buffer, place)))
            return k.select(inside, value, k.constant(beyond))

        decay = k.constant(1.0) if self.decay is None else gate(self.decay, own, 1.0, k.exp)
        k.store(decay, self.found, self._vector(DECAY, i))
        rate = k.constant(0.0)
        if self.beta is not None:
            place = own if c.beta == "head" else o.row(t)
            rate = gate(self.beta, place, 0.0, lambda value: value)
        k.store(rate, self.found, self._vector(RATE, i))

    def _products(self) -> None:
        """k_i . k_j and q_i . k_j to the workgroup's memory."""
        k, c, o = self.k, self.c, self.o
        tile, lane = k.thread().divide_unsigned(LANES)
        down, across = tile.divide_unsigned(_TILES)
        kinds = 2 if c.has_delta else 1
        zero = Scalar.constant(0, "index")

        def step(part: Scalar, sums: list[ir.Value]) -> list[ir.Value]:
            place = part * LANES + lane

            def read(load: Callable[[Scalar, Scalar], ir.Value], buffer: Buffer, tile: Scalar) -> list[list[ir.Value]]:
                stored = [load(self.start + tile * _TILE + r, place) for r in range(_TILE)]
                return [k.elements(k.widen(buffer, value)) for value in stored]

            right = read(o.load_key, o.key, across)
            left = [read(o.load_query, o.query, down)]
            if c.has_delta:
                left.insert(0, read(o.load_key, o.key, down))
            result: list[ir.Value] = []
            for kind, rows in enumerate(left):
                for i, row in enumerate(rows):
                    for j, other in enumerate(right):
                        total = sums[(kind * _TILE + i) * _TILE + j]
                        for a, b in zip(row, other, strict=True):
                            total = k.fma(a, b, total)
                        result.append(total)
            return result

        loads = Scalar.constant(c.dk // WIDTH // LANES, "index")
        sums = k.loop(zero, loads, 1, [k.constant(0.0)] * (kinds * _TILE * _TILE), step)
        found = scatter(k, sums, lane, LANES, 1)
        each = len(found)
        for m, value in enumerate(found):  # this lane's sums are neighbours in a row of a tile
            kind, inside = (lane * each + m).divide_unsigned(_TILE * _TILE)
            i, j = inside.divide_unsigned(_TILE)
            k.store(value, self.products, kind * (CHUNK * STRIDE) + (down * _TILE + i) * STRIDE + across * _TILE + j)

    def _spans(self) -> None:
        """This thread's column of ``mix`` and of A (in place of the products of keys), and its ``rest``."""
        k, c, column = self.k, self.c, self.column
        scale, zero = k.constant(c.scale), k.constant(0.0)
        query_products = CHUNK * STRIDE if c.has_delta else 0
        span = k.constant(1.0)
        for i in range(CHUNK):
            if i:
                decayed = k.mul(span, k.load(self.found, self._vector(DECAY, i)))
                span = k.select(column < i, decayed, span)
            place = column + i * STRIDE
            product = k.load(self.products, place + query_products)
            mixed = k.select(column <= Scalar.constant(i, "index"), k.mul(scale, k.mul(span, product)), zero)
            k.store(mixed, self.found, place + mix_start(c))
            if c.has_delta:
                rate = k.load(self.found, self._vector(RATE, i))
                own = k.mul(rate, k.mul(span, k.load(self.products, place)))
                k.store(k.select(column < i, own, zero), self.products, place)
        k.store(span, self.found, self._vector(REST, column))

    def _prefixes(self) -> None:
        """What depends on the tokens before only; one thread."""
        k, c = self.k, self.c
        before, growth = k.constant(1.0), k.constant(0.0)
        for i in range(CHUNK):
            before = k.mul(before, k.load(self.found, self._vector(DECAY, i)))
            k.store(before, self.found, self._vector(PRE, i))
            k.store(k.mul(k.constant(c.scale), before), self.found, self._vector(SCALED, i))
            if self.decay is not None:
                t = self.start + i
                value = k.load(self.decay, self.o.row(t) * c.kv_heads + self.o.head)
                value = k.select(self.o.inside(t), k.widen(self.decay, value), k.constant(0.0))
                # NaN and inf say nothing: what follows is lost anyway, what precedes is to be as without them.
                value = k.select(Scalar(value) < Scalar(k.constant(math.inf)), value, k.constant(0.0))
                growth = k.add(growth, k.maximum(value, k.constant(0.0)))
        k.store(before, self.found, self._vector(TOTAL, 0))
        bounded = Scalar(growth) <= Scalar(k.constant(MAX_GROWTH))
        k.store(k.select(bounded, k.constant(1.0), k.constant(0.0)), self.found, self._vector(BOUNDED, 0))
        for i in range(BOUNDED + 1, VECTORS):
            k.store(k.constant(0.0), self.found, self._vector(i, 0))

    def _inverse(self) -> None:
        """This thread's column of ``solve``."""
        k, column = self.k, self.column
        rate = k.load(self.found, self._vector(RATE, column))
        values: list[ir.Value] = []
        for i in range(CHUNK):
            value = k.select(column.equals(i), k.constant(1.0), k.constant(0.0))
            for m, earlier in enumerate(values):
                factor = k.load(self.products, Scalar.constant(i * STRIDE + m, "index"))
                value = k.fma(k.neg(factor), earlier, value)
            values.append(value)
            own = k.select(column <= Scalar.constant(i, "index"), k.mul(value, rate), k.constant(0.0))
            k.store(own, self.found, column + i * STRIDE)
