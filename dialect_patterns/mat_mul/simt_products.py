"""The body of the GPU kernels of few rows times matrices (``fused_simt.py``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer, Kernel
from .head_norm import HeadNorm, load_left

WIDTH = 4
"""Columns of a thread, rows of a group."""

MAX_ROWS = 8
"""Of a workgroup."""

_UNROLL = 4  # groups whose loads are under way
_MOST_UNROLLED = 8  # of one row, rather than fewer where that number does not divide a thread's groups


@dataclass(frozen=True)
class Plan:
    """How the product is cut.

    Attributes:
        lanes: Threads along the columns of a tile.
        across: Threads along the rows of b.
        subgroup: Threads of a subgroup, 0 to do without its operations.
    """

    lanes: int
    across: int
    subgroup: int

    @property
    def threads(self) -> int:
        """Threads of a workgroup."""
        return self.lanes * self.across

    @property
    def tile(self) -> int:
        """Columns of a workgroup."""
        return self.lanes * WIDTH

    @property
    def partial(self) -> int:
        """Sums of a column that meet in the workgroup's memory."""
        return self.threads // self.subgroup if self.subgroup else self.across

    def memory(self, rows: int) -> int:
        """Bytes of the workgroup's memory for that many rows."""
        return 4 * self.partial * rows * self.tile


@dataclass(frozen=True)
class Norm:
    """What of ``a`` is multiplied: (a + skip) / sqrt(mean((a + skip)^2) + epsilon) * gamma, rows over their length.

    Attributes:
        gamma: Weights, [K].
        skip: What is added first, of the shape of ``a``; None: nothing.
        epsilon: Added to the mean square.
        with_sum: Whether a + skip is one more result, the last one.
    """

    gamma: ir.Value
    skip: ir.Value | None
    epsilon: float
    with_sum: bool

    @property
    def operands(self) -> list[ir.Value]:
        """What the kernel reads beside ``a`` and the matrices."""
        return [self.gamma] if self.skip is None else [self.gamma, self.skip]

    def __str__(self) -> str:
        factor = self.epsilon.hex().replace(".", "p").replace("-", "m").replace("+", "")
        return f"_rms{factor}" + ("_skip" if self.skip is not None else "") + ("_sum" if self.with_sum else "")


def _unrolled(groups: int, rows: int) -> int:
    """Groups of a pass: K = 3584 leaves seven to a thread, which one after the other wait for memory seven times."""
    if rows == 1:
        more = [count for count in range(_UNROLL, _MOST_UNROLLED + 1) if groups % count == 0]
        if more:
            return more[0]
    return max(count for count in range(1, _UNROLL + 1) if groups % count == 0)


@dataclass
class ProductsKernel:
    """Emits the kernel.

    Attributes:
        k: Emits instructions.
        dtype: Of all operands.
        given: M, with a norm one; None: a number of the dispatch, more than a workgroup takes.
        depth: K.
        p: How it is cut.
        norm: What is done with ``a`` first.
    """

    k: Kernel
    dtype: str
    given: int | None
    depth: int
    p: Plan
    norm: Norm | HeadNorm | None

    def __post_init__(self) -> None:
        self.rows = MAX_ROWS if self.given is None else self.given  # of a workgroup
        self.count = self.k.number(0) if self.given is None else Scalar.constant(self.given, "index")
        self.first = self.k.item() * MAX_ROWS if self.given is None else None
        self.rms = self.norm if isinstance(self.norm, Norm) else None

    def emit(self, columns: Sequence[int], tiles: Sequence[int], gated: bool) -> None:
        """Emit everything.

        Args:
            columns: N of each right operand.
            tiles: Workgroups of each result.
            gated: See ``emit_products``.
        """
        k, p = self.k, self.p
        row, lists = self.count * (self.depth // WIDTH), [] if self.norm is None else self.norm.operands
        sizes = [(row, WIDTH), *((self._number(self.depth * n // WIDTH), WIDTH) for n in columns)]
        first = self._number((self.norm.size if isinstance(self.norm, HeadNorm) else self.depth) // WIDTH)
        sizes += [(row if i else first, WIDTH) for i in range(len(lists))]
        sizes += [(self.count * n, 1) for n in columns[: len(tiles)]]
        with_sum = self.norm is not None and self.norm.with_sum
        sizes += [(row, WIDTH)] if with_sum else []
        buffers = [k.buffer(i, self.dtype, size, width) for i, (size, width) in enumerate(sizes)]
        self.a, *buffers = buffers
        b, buffers = buffers[: len(columns)], buffers[len(columns) :]
        self.lists, y = buffers[: len(lists)], buffers[len(lists) :]
        self.across, self.lane = k.thread().divide_unsigned(p.lanes)
        self.scratch = k.shared(p.partial * self.rows * p.tile * (2 if gated else 1))
        self.squares = k.shared(p.partial * self.rows) if self.rms is not None else None
        tile = k.tile()
        if with_sum:
            k.when(tile.equals(sum(tiles)), lambda: self._write_sum(y[-1]))
            y = y[:-1]
        if len(tiles) == 1:
            if with_sum:
                k.when(tile < tiles[0], lambda: self._emit_tile(b, y[0], columns[0], tile))
            else:
                self._emit_tile(b, y[0], columns[0], tile)
            return
        start = 0
        for weight, output, n, number in zip(b, y, columns, tiles, strict=True):
            first = start

            def one(weight: Buffer = weight, output: Buffer = output, n: int = n, first: int = first) -> None:
                self._emit_tile([weight], output, n, tile - first)

            start += number
            k.when((tile >= first) & (tile < start), one)

    def _number(self, elements: int) -> Scalar:
        return Scalar.constant(elements, "index")

    def _emit_tile(self, b: Sequence[Buffer], y: Buffer, columns: int, tile: Scalar) -> None:
        p, vectors = self.p, columns // WIDTH
        column = tile * p.lanes + self.lane
        if vectors % p.lanes:  # threads beyond the last column compute it again and write nothing
            column = column.minimum(vectors - 1)
        found = [self._sums(weight, vectors, column) for weight in b]
        self._share([sums for some, _ in found for sums in some], found[0][1])
        self._write(y, columns, tile, len(b) > 1)

    def _write_sum(self, y: Buffer) -> None:
        """What was normalised, rounded."""
        k, size = self.k, self.rows * self.depth // WIDTH
        for start in range(0, size, self.p.threads):
            place = k.thread() + start

            def write(place: Scalar = place) -> None:
                k.store(self._left(place)(), y, place)

            k.when(place < size, write)

    def _left(self, place: Scalar) -> Callable[[], ir.Value]:
        """Loads a vector of ``a``, with what is added, or all that makes it; returns what widens it."""
        k, lists = self.k, [self.a, *self.lists[1:]]
        if isinstance(self.norm, HeadNorm):
            return load_left(k, self.norm, self.a, self.lists, place, self.p.subgroup)
        stored = [k.load(one, place) for one in lists]

        def widen() -> ir.Value:
            wide = [k.widen(one, value) for one, value in zip(lists, stored, strict=True)]
            return wide[0] if len(wide) == 1 else k.add(*wide)

        return widen

    def _sums(self, b: Buffer, vectors: int, column: Scalar) -> tuple[list[ir.Value], list[ir.Value]]:
        """This thread's part of each row's sums, and with a norm of its squares."""
        k, p = self.k, self.p
        groups = self.depth // WIDTH // p.across
        unroll = _unrolled(groups, self.rows)

        def step(index: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            places = [(index + u) * p.across + self.across for u in range(unroll)]
            weights = [[k.load(b, (place * WIDTH + r) * vectors + column) for r in range(WIDTH)] for place in places]
            inputs = [
                [self._left(place + self._row(m) * (self.depth // WIDTH)) for m in range(self.rows)] for place in places
            ]
            scales = [k.load(self.lists[0], place) for place in places] if self.rms is not None else [None] * unroll
            sums, squares = list(carried[: self.rows]), list(carried[self.rows :])
            for four, given, scale in zip(weights, inputs, scales, strict=True):
                wide = [k.widen(b, weight) for weight in four]
                for m, widen in enumerate(given):
                    left = widen()
                    if scale is not None:
                        squares[m] = k.fma(left, left, squares[m])
                        left = k.mul(left, k.widen(self.lists[0], scale))
                    for factor, weight in zip(k.elements(left), wide, strict=True):
                        sums[m] = k.fma(k.splat(factor, WIDTH), weight, sums[m])
            return [*sums, *squares]

        zero = [k.constant(0.0, WIDTH)] * (self.rows if self.rms is None else 2 * self.rows)
        start = Scalar.constant(0, "index")
        if groups == unroll:
            found = step(start, zero)
        else:
            found = k.loop(start, Scalar.constant(groups, "index"), unroll, zero, step)
        return found[: self.rows], [self._across(square) for square in found[self.rows :]]

    def _row(self, m: int) -> Scalar:
        """Row ``m`` of the workgroup's, or the last one there is."""
        if self.first is None:
            return Scalar.constant(m, "index")
        return (self.first + m).minimum(self.count - 1)

    def _across(self, value: ir.Value) -> ir.Value:
        """The sum of the elements."""
        k = self.k
        one, two, three, four = k.elements(value)
        return k.add(k.add(one, two), k.add(three, four))

    def _share(self, sums: list[ir.Value], squares: list[ir.Value]) -> None:
        """Puts this thread's sums, or those of its subgroup, into the workgroup's memory."""
        k, p, count = self.k, self.p, len(sums)
        if p.subgroup:
            offset, sums = p.lanes, [*sums, *squares]
            while offset < p.subgroup:
                sums = [k.join([k.add(e, k.shuffle_xor(e, offset)) for e in k.elements(s)]) for s in sums]
                offset *= 2
            sums, squares = sums[:count], sums[count:]
        size = len(sums) * p.tile
        place, inside, first = self.across, self.lane, None
        if p.subgroup:
            place, inside = k.thread().divide_unsigned(p.subgroup)
            first = inside < p.lanes

        def put() -> None:
            for m, value in enumerate(sums):
                for i, element in enumerate(k.elements(value)):
                    k.store(element, self.scratch, place * size + (m * p.tile + i) + self.lane * WIDTH)

        if first is None or p.lanes == p.subgroup:
            put()
        else:
            k.when(first, put)
        if self.squares is not None:  # every lane has the same
            memory = self.squares

            def put_squares() -> None:
                for m, value in enumerate(squares):
                    k.store(value, memory, place * self.rows + m)

            k.when(inside.equals(0), put_squares)
        k.barrier()

    def _write(self, y: Buffer, columns: int, tile: Scalar, gated: bool) -> None:
        """The sums over the workgroup, spread over its threads."""
        k, p = self.k, self.p
        size = self.rows * p.tile
        for start in range(0, size, p.threads):
            element = k.thread() + start
            inside = element.minimum(size - 1)
            row, place = element.divide_unsigned(p.tile)
            length = self._inverse(inside.divide_unsigned(p.tile)[0])
            value = self._scaled(self._total(inside, 2 * size if gated else size), length)
            if gated:
                value = k.mul(self._silu(value), self._scaled(self._total(inside + size, 2 * size), length))
            column = tile * p.tile + place
            valid = (element < size) & (column < columns)
            if self.first is not None:
                row = self.first + row
                valid = valid & (row < self.count)

            def write(value: ir.Value = value, row: Scalar = row, column: Scalar = column) -> None:
                k.store(value, y, row * columns + column)

            k.when(valid, write)

    def _inverse(self, row: Scalar) -> ir.Value | None:
        """With a norm 1 / sqrt(mean square + epsilon) of a row."""
        if self.rms is None or self.squares is None:
            return None
        k = self.k
        mean = k.mul(self._total(row, self.rows, self.squares), k.constant(1.0 / self.depth))
        return k.rsqrt(k.add(mean, k.constant(self.rms.epsilon)))

    def _scaled(self, value: ir.Value, factor: ir.Value | None) -> ir.Value:
        return value if factor is None else self.k.mul(value, factor)

    def _total(self, element: Scalar, size: int, memory: Buffer | None = None) -> ir.Value:
        """The sum of an element's ``partial`` parts, of ``size`` elements each."""
        k, memory = self.k, self.scratch if memory is None else memory
        found = [k.load(memory, element + part * size) for part in range(self.p.partial)]
        while len(found) > 1:
            found = [k.add(found[i], found[i + 1]) if i + 1 < len(found) else found[i] for i in range(0, len(found), 2)]
        return found[0]

    def _silu(self, value: ir.Value) -> ir.Value:
        k = self.k
        return k.div(value, k.add(k.constant(1.0), k.exp(k.neg(value))))
