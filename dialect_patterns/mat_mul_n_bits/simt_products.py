"""The body of the GPU kernels of few rows times packed weights (``fused_simt.py``)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer, Kernel
from ..mat_mul.head_norm import HeadNorm, gated, inverse_of
from ..mat_mul.simt_products import Norm
from .contract import MatMulNBits
from .rounded import inverse_and_step
from .rounded_simt import largest_of, round_even
from .simt_weights import PackedWeights

_VECTOR = 4  # elements of A that are loaded at once


@dataclass(frozen=True)
class Plan:
    """How the product is cut.

    Attributes:
        across: Threads along K.
        groups: Such rows of threads in a workgroup.
        columns: Columns of a thread.
        subgroup: Threads of a subgroup, 0 to do without its operations.
        unroll: Words of a column that a thread loads at once.
    """

    across: int
    groups: int
    columns: int
    subgroup: int
    unroll: int

    @property
    def threads(self) -> int:
        """Threads of a workgroup."""
        return self.across * self.groups

    @property
    def tile(self) -> int:
        """Columns of a workgroup."""
        return self.groups * self.columns

    @property
    def shuffled(self) -> int:
        """Threads whose sums meet by shuffles."""
        return min(self.subgroup, self.across) if self.subgroup else 1

    @property
    def partial(self) -> int:
        """Sums of a column that meet in the workgroup's memory."""
        return self.across // self.shuffled

    def memory(self, rows: int) -> int:
        """Bytes of the workgroup's memory for that many rows."""
        return 4 * self.partial * rows * self.tile if self.partial > 1 else 0

    def __str__(self) -> str:
        return f"a{self.across}x{self.groups}c{self.columns}g{self.subgroup}u{self.unroll}"


def rounds_itself(contract: MatMulNBits, plan: Plan) -> bool:
    """Whether the kernel rounds A, where the contract has it rounded."""
    return contract.rounds_a and contract.block_words <= plan.shuffled


class ProductsKernel:
    """Emits the kernel.

    Args:
        k: Emits instructions.
        products: What to compute, alike but for their columns.
        dtype: Element type of A as the kernel gets it.
        plan: How each is cut.
        norm: What is done with A first.
    """

    def __init__(
        self, k: Kernel, products: Sequence[MatMulNBits], dtype: str, plan: Plan, norm: Norm | HeadNorm | None
    ) -> None:
        c = products[0]
        self.k, self.c, self.p, self.rows, self.norm = k, c, plan, c.rows or 0, norm
        self.rms = norm if isinstance(norm, Norm) else None
        self._products = products
        self._rounds = rounds_itself(c, plan)
        row = _count(self.rows * c.padded_depth // _VECTOR)
        self._a, self._weights, binding = k.buffer(0, dtype, row, _VECTOR), list[PackedWeights](), 1
        for product in products:
            self._weights.append(PackedWeights(k, product, 1, binding))
            binding = self._weights[-1].output
        given = 0 if norm is None else len(norm.operands)
        first = _count((norm.size if isinstance(norm, HeadNorm) else c.depth) // _VECTOR)
        self._lists = [k.buffer(binding + i, c.a.dtype, row if i else first, _VECTOR) for i in range(given)]
        self._results, self._row = binding + given, row

    def emit(self, gated: bool) -> None:
        """Emit everything; see ``emit_products``."""
        k, p = self.k, self.p
        sets = [self._weights] if gated else [[weights] for weights in self._weights]
        counts = [product.columns for product in self._products[: len(sets)]]
        y = [k.buffer(self._results + i, self.c.a.dtype, _count(self.rows * n)) for i, n in enumerate(counts)]
        self._group, self._lane = k.thread().divide_unsigned(p.across)
        self._scratch = k.shared(p.partial * self.rows * p.tile * len(sets[0])) if p.partial > 1 else None
        self._squares = k.shared(p.partial) if p.partial > 1 and self.rms is not None else None
        bounds = [0, *itertools.accumulate(-(-count // p.tile) for count in counts)]
        tile, with_sum = k.tile(), self.norm is not None and self.norm.with_sum
        for weights, result, count, (first, stop) in zip(sets, y, counts, itertools.pairwise(bounds), strict=True):

            def one(
                weights: list[PackedWeights] = weights, result: Buffer = result, count: int = count, first: int = first
            ) -> None:
                self._emit_tile(weights, result, count, tile - first if first else tile)

            if len(sets) == 1 and not with_sum:
                one()
            else:
                k.when((tile >= first) & (tile < stop), one)
        if with_sum:
            total = k.buffer(self._results + len(y), self.c.a.dtype, self._row, _VECTOR)
            k.when(tile.equals(bounds[-1]), lambda: self._write_sum(total))

    def _emit_tile(self, weights: list[PackedWeights], y: Buffer, count: int, tile: Scalar) -> None:
        p = self.p
        self._now, self._y, self._n, self._tile = weights, y, count, tile
        first = tile * p.tile + self._group * p.columns
        self._columns: list[Scalar] = [first + i for i in range(p.columns)]
        if count % p.tile:  # threads beyond the last column compute it again and write nothing
            self._columns = [column.minimum(count - 1) for column in self._columns]
        sums = self._sums()
        squares = [] if self.rms is None else [self._across(sums.pop())]
        sums = self._shuffled([*sums, *squares])
        squares = [sums.pop()] if squares else []
        if self._scratch is None:
            self._write_own(sums, first, self._inverse(squares))
        else:
            self._write_shared(sums, squares, self._scratch)

    def _write_sum(self, y: Buffer) -> None:
        """What was normalised, rounded; of one row."""
        k, size = self.k, self.c.depth // _VECTOR
        for start in range(0, size, self.p.threads):
            place = k.thread() + start

            def write(place: Scalar = place) -> None:
                k.store(self._added(place)(), y, place)

            k.when(place < size, write)

    def _added(self, place: Scalar) -> Callable[[], ir.Value]:
        """Loads a vector of A, with what is added; returns what widens it."""
        k, lists = self.k, [self._a, *(self._lists[1:] if self.rms is not None else [])]
        stored = [k.load(one, place) for one in lists]

        def widen() -> ir.Value:
            wide = [k.widen(one, value) for one, value in zip(lists, stored, strict=True)]
            return wide[0] if len(wide) == 1 else k.add(*wide)

        return widen

    def _across(self, value: ir.Value) -> ir.Value:
        """The sum of the elements."""
        one, two, three, four = self.k.elements(value)
        return self.k.add(self.k.add(one, two), self.k.add(three, four))

    # ---- sums of a thread, [weights][row][column] in one list, behind them a norm's squares ----------
    def _sums(self) -> list[ir.Value]:
        k, p = self.k, self.p
        steps = -(-self.c.row_words // p.across)
        sums = [k.constant(0.0)] * (len(self._now) * self.rows * p.columns)
        sums += [k.constant(0.0, _VECTOR)] if self.rms is not None else []
        whole = steps // p.unroll * p.unroll
        if whole == p.unroll:
            sums = self._step(_count(0), p.unroll, sums)
        elif whole:
            sums = k.loop(_count(0), _count(whole), p.unroll, sums, lambda i, carried: self._step(i, p.unroll, carried))
        return self._step(_count(whole), steps - whole, sums) if steps > whole else sums

    def _step(self, index: Scalar, unroll: int, sums: list[ir.Value]) -> list[ir.Value]:
        """Add ``unroll`` words of each column; all loads come first."""
        k, c, p, sums = self.k, self.c, self.p, list(sums)
        places = [(index + u) * p.across + self._lane for u in range(unroll)]
        valid = [place < c.row_words for place in places]
        if c.row_words % p.across:  # words beyond the last one count nothing
            places = [place.minimum(c.row_words - 1) for place in places]
        weights = [[[one.load(column, place) for column in self._columns] for one in self._now] for place in places]
        vectors, row = c.per_word // _VECTOR, c.padded_depth // _VECTOR
        inputs = [
            [[self._added(place * vectors + (m * row + i)) for i in range(vectors)] for m in range(self.rows)]
            for place in places
        ]
        scales = [
            [k.load(self._lists[0], place * vectors + i) for i in range(vectors)] if self.rms is not None else []
            for place in places
        ]
        heads = [self._head(place, vectors) for place in places]
        for place, fits, loads, given, scale, head in zip(places, valid, weights, inputs, scales, heads, strict=True):
            wide = [[widen() for widen in one] for one in given]
            if head is not None:
                wide = [head(wide[0])]
            if scale:
                for vector in wide[0]:
                    sums[-1] = k.fma(vector, vector, sums[-1])
                pairs = zip(wide[0], scale, strict=True)
                wide = [[k.mul(vector, k.widen(self._lists[0], factor)) for vector, factor in pairs]]
            rows = [[e for vector in one for e in k.elements(vector)] for one in wide]
            if self._rounds:
                rounded = [self._rounded(one) for one in rows]
                sums = self._add(sums, [r[0] for r in rounded], [r[1] for r in rounded], loads, place, fits)
            else:
                sums = self._add(sums, rows, None, loads, place, fits)
        return sums

    def _head(self, place: Scalar, vectors: int) -> Callable[[list[ir.Value]], list[ir.Value]] | None:
        """With a norm by heads: loads what a word of A takes beside; returns what computes with it."""
        k, norm = self.k, self.norm
        if not isinstance(norm, HeadNorm):
            return None
        words = norm.size // self.c.per_word
        inside = place.divide_unsigned(words)[1]
        scales = [k.load(self._lists[0], inside * vectors + i) for i in range(vectors)]
        gates = [k.load(self._lists[1], place * vectors + i) for i in range(vectors)]

        def compute(word: list[ir.Value]) -> list[ir.Value]:
            squares = k.constant(0.0, _VECTOR)
            for vector in word:
                squares = k.fma(vector, vector, squares)
            inverse, found = inverse_of(k, norm, squares, words), list[ir.Value]()
            for vector, scale, gate in zip(word, scales, gates, strict=True):
                wide = k.widen(self._lists[0], scale), k.widen(self._lists[1], gate)
                found.append(gated(k, norm, vector, inverse, *wide))
            return found

        return compute

    def _rounded(self, values: list[ir.Value]) -> tuple[list[ir.Value], ir.Value]:
        """This thread's elements of a row as whole numbers, and what they count; see ``rounded``."""
        k, c = self.k, self.c
        most = largest_of(Scalar(values[0]).abs().value, values[1:])
        offset = 1
        while offset < c.block_words:
            most = Scalar(most).maximum(Scalar(k.shuffle_xor(most, offset))).value
            offset *= 2
        inverse, step = inverse_and_step(Scalar(most))
        return [round_even(k, k.mul(value, inverse.value)) for value in values], step.value

    def _add(
        self, sums: list[ir.Value], rows: list[list[ir.Value]], steps: list[ir.Value] | None,
        loads: list[list[list[ir.Value]]], place: Scalar, fits: Scalar,
    ) -> list[ir.Value]:  # fmt: skip
        """Add one word of each column; ``steps`` is what the elements of each row count, None for one."""
        k, c, p = self.k, self.c, self.p
        sums = list(sums)
        totals = [self._total(values) for values in rows] if c.zero_points != "default" else []
        for i, (weights, own) in enumerate(zip(self._now, loads, strict=True)):
            for j, (column, stored) in enumerate(zip(self._columns, own, strict=True)):
                (part,) = weights.unpack(stored, column, place)
                scale = part.scale
                if c.row_words % p.across:
                    scale = k.select(fits, scale, k.constant(0.0))
                for m, values in enumerate(rows):
                    product = k.mul(values[0], part.values[0])
                    for value, weight in zip(values[1:], part.values[1:], strict=True):
                        product = k.fma(value, weight, product)
                    if part.offset is not None:
                        product = k.sub(product, k.mul(part.offset, totals[m]))
                    factor = scale if steps is None else k.mul(scale, steps[m])
                    at = (i * self.rows + m) * p.columns + j
                    sums[at] = k.fma(product, factor, sums[at])
        return sums

    def _total(self, values: list[ir.Value]) -> ir.Value:
        total = values[0]
        for value in values[1:]:
            total = self.k.add(total, value)
        return total

    # ---- sums of a workgroup ----------------------------------------------------------------------------------------
    def _shuffled(self, sums: list[ir.Value]) -> list[ir.Value]:
        offset = 1
        while offset < self.p.shuffled:
            sums = [self.k.add(value, self.k.shuffle_xor(value, offset)) for value in sums]
            offset *= 2
        return sums

    def _inverse(self, squares: Sequence[ir.Value]) -> ir.Value | None:
        """With a norm 1 / sqrt(mean square + epsilon), of the squares of all of a row."""
        if self.rms is None:
            return None
        k = self.k
        mean = k.mul(squares[0], k.constant(1.0 / self.c.depth))
        return k.rsqrt(k.add(mean, k.constant(self.rms.epsilon)))

    def _write_own(self, sums: list[ir.Value], first: Scalar, inverse: ir.Value | None) -> None:
        """Where all sums of a thread are whole: the first of those that have the same writes them."""
        k, p = self.k, self.p

        def write() -> None:
            for j in range(p.columns):
                column = first + j

                def write_column(j: int = j, column: Scalar = column) -> None:
                    for m in range(self.rows):
                        whole = sums[m * p.columns + j :: self.rows * p.columns]
                        self._store(whole, inverse, _count(m), column)

                if self._n % p.tile:
                    k.when(column < self._n, write_column)
                else:
                    write_column()

        k.when(self._lane.equals(0), write)

    def _write_shared(self, sums: list[ir.Value], squares: list[ir.Value], scratch: Buffer) -> None:
        """Through the workgroup's memory, [partial][weights][row][column of the tile]."""
        k, p = self.k, self.p
        size, sets, memory = self.rows * p.tile, len(self._now), self._squares
        part, inside = self._lane.divide_unsigned(p.shuffled)
        start = part * (sets * size) + self._group * p.columns

        def put() -> None:
            for i, value in enumerate(sums):
                m, j = divmod(i, p.columns)
                k.store(value, scratch, start + (m * p.tile + j))

        def put_squares(memory: Buffer) -> None:
            k.store(squares[0], memory, part)

        if p.shuffled > 1:
            k.when(inside.equals(0), put)
        else:
            put()
        if memory is not None:
            k.when(inside.equals(0) & self._group.equals(0), lambda: put_squares(memory))
        k.barrier()
        inverse = self._inverse([] if memory is None else [self._meeting(memory, _count(0), 1)])
        for offset in range(0, size, p.threads):
            element = k.thread() + offset
            row, place = element.divide_unsigned(p.tile)
            column = self._tile * p.tile + place

            def write(element: Scalar = element, row: Scalar = row, column: Scalar = column) -> None:
                whole = [self._meeting(scratch, element + i * size, sets * size) for i in range(sets)]
                self._store(whole, inverse, row, column)

            k.when((element < size) & (column < self._n), write)

    def _meeting(self, memory: Buffer, element: Scalar, size: int) -> ir.Value:
        k = self.k
        found = [k.load(memory, element + part * size) for part in range(self.p.partial)]
        while len(found) > 1:
            found = [k.add(found[i], found[i + 1]) for i in range(0, len(found), 2)]
        return found[0]

    def _store(self, sums: Sequence[ir.Value], inverse: ir.Value | None, row: Scalar, column: Scalar) -> None:
        k, values = self.k, list[ir.Value]()
        for weights, whole in zip(self._now, sums, strict=True):
            value = whole if inverse is None else k.mul(whole, inverse)
            values.append(k.add(value, weights.bias(column)) if self.c.with_bias else value)
        if len(values) == 2:
            gate, up = values
            values = [k.mul(k.div(gate, k.add(k.constant(1.0), k.exp(k.neg(gate)))), up)]
        k.store(values[0], self._y, row * self._n + column)


def _count(elements: int) -> Scalar:
    return Scalar.constant(elements, "index")
