"""The first kernel of a step of softmax attention: heads normalised and rotated, the new row of the KV cache written.

    x'    = x / sqrt(mean(x^2) + epsilon) * gamma                           of each head of queries and keys
    y[i]  = x'[i] cos[c] -+ x'[partner(i)] sin[c]                           for the elements that are rotated
    cache[b, h, position] = key, value

    %q, %keys, %values = flow.dispatch @attention_step_...[%heads](%position, %q, %k, %v, ..., %keys, %values)

A workgroup has a head, a thread an element of it. The operators apart are four kernels and two copies, each of which
takes microseconds to do nothing, and more until the next one may begin: on an H100 by Vulkan 6 us.
Rounding: everything in f32; the operators apart round what they hand on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..emit.builder import Builder, spec_of, tensor_type
from ..emit.scalar import Scalar
from ..emit.simt_kernel import MAX_GROUPS, Buffer, Group, Kernel, dispatch
from ..norms.rms_simt import sum_over_workgroup
from ..rotary.m_rotary_embedding import Streams
from ..select import Legality, No, Yes
from ..target import Target
from .core import Heads


@dataclass(frozen=True)
class Turning:
    """The rotary embedding of one token.

    Attributes:
        rotated: Leading elements of each head that are rotated.
        interleaved: Whether pairs are neighbours.
        streams: Which position a column follows, where there are several.
        scale: Multiplies cosines and sines.
        positions: Type of the token's position.
        by_row: Whether each row of the batch has a position of its own.
    """

    rotated: int
    interleaved: bool
    streams: Streams | None
    scale: float
    positions: str
    by_row: bool


@dataclass(frozen=True)
class StepRows:
    """What the kernel does.

    Attributes:
        heads: Counts and sizes.
        dtype: Element type of everything but cosines and sines.
        angles: Of these.
        capacity: Rows of the cache.
        start: The first element of the queries where they are read.
        stride: Elements from a head to the next one there.
        epsilons: Of the norms of queries and keys; None without norms.
        turning: The rotary embedding.
        cached: Rows of cosines and sines.
    """

    heads: Heads
    dtype: str
    angles: str
    capacity: int
    start: int
    stride: int
    epsilons: tuple[float, float] | None
    turning: Turning
    cached: int

    @property
    def batch(self) -> int:
        """B."""
        return self.heads.batch or 0

    @property
    def each(self) -> int:
        """Heads of queries, keys and values of a row of the batch."""
        return self.heads.q + 2 * self.heads.kv


def is_legal(heads: Heads, target: Target) -> Legality:
    """For heads whose elements are a workgroup's threads."""
    size, threads = heads.dk, target.max_threads
    if size != heads.dv or size & (size - 1) or not target.subgroup_size <= size <= threads:
        return No(f"heads of {size} and {heads.dv} are no workgroup of {target.subgroup_size} to {threads} threads")
    if (heads.batch or 0) * (heads.q + 2 * heads.kv) > MAX_GROUPS:
        return No(f"more than {MAX_GROUPS} heads")
    return Yes()


def emit_step_rows(
    b: Builder, target: Target, rows: StepRows, new: Sequence[ir.Value], caches: Sequence[ir.Value], first: ir.Value,
    turned: Sequence[ir.Value], gammas: Sequence[ir.Value],
) -> list[ir.Value]:  # fmt: skip
    """Queries [B, 1, Hq * d], and the caches with the new row.

    Args:
        b: The builder.
        target: To compile for.
        rows: What is done.
        new: Where queries are read, keys and values.
        caches: Of keys and values [B, Hkv, M, d].
        first: The row that is written.
        turned: Positions, cosines and sines.
        gammas: Weights of both norms, or nothing.
    """
    turning, heads = rows.turning, rows.heads
    result = tensor_type([rows.batch, 1, heads.q * heads.dk], rows.dtype)
    factors = [rows.turning.scale, *(rows.epsilons or ())]
    words = [str(factor.hex()).replace(".", "p").replace("-", "m").replace("+", "") for factor in factors]
    streams = "" if turning.streams is None else f"_{turning.streams}"
    kind = f"{'i' if turning.interleaved else ''}{turning.rotated}{'b' if turning.by_row else ''}{streams}"
    name = f"attention_step_{rows.dtype}_{rows.batch}x{heads.q}x{heads.kv}_d{heads.dk}_s{rows.capacity}"
    name += f"_at{rows.start}by{rows.stride}_{turning.positions}_{kind}_of{rows.cached}{rows.angles}"
    name += f"_{'_'.join(words)}_g{target.subgroup_size}"
    inputs = [*new, *turned, *gammas, *caches]
    return dispatch(
        name, Group(heads.dk, target.subgroup_size), 1, b.index(rows.batch * rows.each), [first], inputs,
        [(result, [])], lambda kernel: _Rows(kernel, rows, [spec_of(x).shape for x in inputs]).emit(),
        written=[len(inputs) - 2, len(inputs) - 1],
    )  # fmt: skip


class _Rows:
    """Emits the kernel of one head.

    Args:
        k: The kernel.
        rows: What it does.
        shapes: Of its inputs.
    """

    def __init__(self, k: Kernel, rows: StepRows, shapes: Sequence[Sequence[int | None]]) -> None:
        self.k, self.rows, self.shapes = k, rows, shapes

    def _buffer(self, binding: int, dtype: str = "") -> Buffer:
        size = 2 if dtype == "i64" else 1  # words
        for dim in self.shapes[binding]:
            size *= dim or 0
        stored = "i32" if dtype == "i64" else dtype or self.rows.dtype
        return self.k.buffer(binding, stored, Scalar.constant(size, "index"))

    def emit(self) -> None:
        """Emit everything."""
        k, rows, heads = self.k, self.rows, self.rows.heads
        query, key, value = (self._buffer(i) for i in range(3))
        caches = [self._buffer(len(self.shapes) - 2), self._buffer(len(self.shapes) - 1)]
        count = Scalar.constant(rows.batch * heads.q * heads.dk, "index")
        result = k.buffer(len(self.shapes), rows.dtype, count)
        batch, head = k.item().divide_unsigned(rows.each)
        of_key, of_value = head - heads.q, head - (heads.q + heads.kv)
        is_query = head < heads.q
        at = k.thread()

        def place(index: Scalar, most: int) -> Scalar:
            return index.maximum(0).minimum(most - 1)

        from_query = batch * (heads.q * rows.stride) + place(head, heads.q) * rows.stride + rows.start
        from_key = (batch * heads.kv + place(of_key, heads.kv)) * heads.dk
        from_value = (batch * heads.kv + place(of_value, heads.kv)) * heads.dk

        def one(element: Scalar) -> ir.Value:
            found = (k.load(query, from_query + element), k.load(key, from_key + element))
            return k.select(is_query, *(k.widen(query, x) for x in found))

        y = self._turned(batch, at, self._normed(is_query, one))
        k.when(is_query, lambda: k.store(y, result, (batch * heads.q + place(head, heads.q)) * heads.dk + at))
        first = k.number(0).minimum(rows.capacity - 1)
        row = (batch * heads.kv + place(of_key, heads.kv)) * rows.capacity + first
        k.when((of_key >= 0) & (of_value < 0), lambda: k.store(y, caches[0], row * heads.dk + at))
        other = (batch * heads.kv + place(of_value, heads.kv)) * rows.capacity + first
        k.when(
            of_value >= 0,
            lambda: k.store_as_is(k.load(value, from_value + at), caches[1], other * heads.dk + at),
        )

    def _normed(self, is_query: Scalar, one: Callable[[Scalar], ir.Value]) -> Callable[[Scalar], ir.Value]:
        """What finds an element of the normalised head."""
        k, rows = self.k, self.rows
        if rows.epsilons is None:
            return one
        own, gammas = one(k.thread()), [self._buffer(6), self._buffer(7)]
        epsilon = k.select(is_query, *(k.constant(x) for x in rows.epsilons))
        mean = k.mul(sum_over_workgroup(k, k.mul(own, own)), k.constant(1.0 / rows.heads.dk))
        inverse = k.rsqrt(k.add(mean, epsilon))

        def element(at: Scalar) -> ir.Value:
            gamma = k.select(is_query, *(k.widen(weights, k.load(weights, at)) for weights in gammas))
            return k.mul(k.mul(one(at), inverse), gamma)

        return element

    def _turned(self, batch: Scalar, at: Scalar, element: Callable[[Scalar], ir.Value]) -> ir.Value:
        """This thread's element of the rotated head."""
        k, turning = self.k, self.rows.turning
        half = turning.rotated // 2
        inside, within = at < turning.rotated, at.minimum(turning.rotated - 1)
        if turning.interleaved:
            column, is_first = within.divide_unsigned(2)[0], (within & 1).equals(0)
            partner = within ^ 1
        else:
            is_first = within < half
            column = is_first.select(within, within - half)
            partner = is_first.select(within + half, within - half)
        position = self._position(batch, column)
        factors: list[ir.Value] = []
        for binding in (4, 5):
            cache = self._buffer(binding, self.rows.angles)
            found = k.widen(cache, k.load(cache, position * half + column))
            factors.append(found if turning.scale == 1.0 else k.mul(found, k.constant(turning.scale)))
        cosine, sine = factors
        own, other = element(at), element(partner)
        sine = k.select(is_first, k.neg(sine), sine)
        return k.select(inside, k.fma(own, cosine, k.mul(other, sine)), own)

    def _position(self, batch: Scalar, column: Scalar) -> Scalar:
        """The row of cosines and sines of a column, as near as there is one."""
        k, rows, turning = self.k, self.rows, self.rows.turning
        ids = self._buffer(3, turning.positions)
        index = batch if turning.by_row else Scalar.constant(0, "index")
        if turning.streams is not None:
            index = turning.streams.of(column) * rows.batch + index
        last = rows.cached - 1
        if turning.positions == "i32":
            return Scalar(k.load(ids, index)).maximum(0).minimum(last).to("index")
        low, high = (Scalar(k.load(ids, index * 2 + word)) for word in range(2))
        near = (low >= 0) & (low <= last)
        zero, most = Scalar.constant(0, "i32"), Scalar.constant(last, "i32")
        found = (high.equals(0) & near).select(low, most)
        return (high < 0).select(zero, found).to("index")
