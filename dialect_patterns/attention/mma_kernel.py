"""The kernel of strategy ``fused_mma`` of attention: 32 rows of a key head and one part of its keys; see there."""

from __future__ import annotations

from dataclasses import dataclass

from iree.compiler import ir
from iree.compiler.dialects import arith

from ..emit.chunk_words import unpack
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer, Kernel
from .mma_places import ACROSS, CHUNK, KEYS, QUERIES, SIDE, SUBGROUP, THREADS, WORDS, Places
from .simt_bias import Bias
from .simt_dispatch import Tiled
from .simt_join import LOWEST, sink_of_row
from .simt_window import Window

_SHARE = THREADS // QUERIES  # threads that share a row of scores
_EXPONENTS = 0x7C00


@dataclass
class MatrixAttention:
    """Emits the kernel of 32 rows and one part of the keys."""

    k: Kernel
    call: Tiled
    first: Scalar
    at: Places

    def emit(self) -> None:
        """Emit everything."""
        k, c, call = self.k, self.call.c, self.call
        self.c, self.n, heads = c, call.n, c.batch * c.kv_heads

        def count(elements: int) -> Scalar:
            return Scalar.constant(elements, "index")

        self.query = k.chunks(0, self.n.rows * (heads * c.dk // CHUNK))
        self.keys = k.chunks(1, count(heads * c.keys * c.dk // CHUNK))
        self.values = k.chunks(2, count(heads * c.keys * c.dv // CHUNK))
        self.head = k.item()
        self.bias = None if c.bias_dims is None else Bias(k, c, call.n, 3, self.head)
        rows = self.n.parts * self.n.rows * heads
        if call.whole:
            self.output = k.buffer(call.output, call.result, rows * (c.dv // WORDS), WORDS)
        else:
            self.stats = k.buffer(call.output, "f32", rows * 2)
            self.output = k.buffer(call.output + 1, "f32", rows * (c.dv // WORDS), WORDS)
        self.memory = k.shared_chunks(self.at.chunks)
        self.tops, self.sums, self.odd = k.shared(THREADS), k.shared(THREADS), k.shared(1)
        self.wide = c.dv // (ACROSS * SIDE)  # matrices of a subgroup's outputs
        block, self.part = k.tile(), Scalar.constant(0, "index")
        if not call.whole:
            block, self.part = block.divide_unsigned(self.n.parts)
        last = (self.n.rows - 1).divide_unsigned(QUERIES)[0]
        self.start = (last - block) * QUERIES  # rows that see the most come first
        self.window = Window(c, self.n, self.first, self.start, QUERIES, KEYS)
        subgroup, self.lane = k.thread().divide_unsigned(SUBGROUP)
        self.subgroup = subgroup
        self.down, self.across = subgroup.divide_unsigned(ACROSS)
        self.own, self.share = k.thread().divide_unsigned(_SHARE)
        self._run()

    def _run(self) -> None:
        k, c, call = self.k, self.c, self.call
        for line, chunk in self._spots(c.dk):
            row = self._row((self.start + line).minimum(self.n.rows - 1))
            value = k.load(self.query, row * (c.dk // CHUNK) + chunk)
            k.store_as_is(value, self.memory, line * self.at.stride_q + chunk)
        place, stop = self.window.all() if call.whole else self.window.part(self.part)
        keys = self._fetch_keys(place)
        count = len(keys)

        def tile(place: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            top, total, held, outputs = carried[0], carried[1], carried[2 : 2 + count], carried[2 + count :]
            k.barrier()
            self._put(held, c.dk, self.at.stride_q)
            k.when(k.thread().equals(0), lambda: k.store(k.constant(0.0), self.odd, Scalar.constant(0, "index")))
            values = self._fetch(self.values, c.keys, place, c.dv, self.window.last)
            k.barrier()
            self._write_products()
            k.barrier()
            scores = self._scores(place)
            self._put_values(values, place)
            following = self._fetch_keys(place + KEYS)
            k.barrier()
            top, total = self._weigh(scores, top, total)
            k.barrier()
            return [top, total, *following, *self._mix(place, outputs)]

        initial = [k.constant(LOWEST), k.constant(0.0)]
        if call.sink_type:  # as a key that is seen first, whose value is zero
            row = (self.start + self.own).minimum(self.n.rows - 1)
            own = k.select(self.share.equals(0), k.constant(1.0), k.constant(0.0))
            initial = [sink_of_row(k, c, call.n, call.sink_type, call.sink, self.head, row), own]
        zeros = [k.matrix_zero() for _ in range(self.wide)]
        top, total, *rest = k.loop(place, stop, KEYS, [*initial, *keys, *zeros], tile)
        self._write(top, total, rest[count:])

    # ---- loads -----------------------------------------------------------------------------------------------------
    def _spots(self, size: int) -> list[tuple[Scalar, Scalar]]:
        """Row and chunk of each of this thread's loads of 32 rows; the last ones again where there are too few."""
        across = size // CHUNK
        return [
            (self.k.thread() + i).minimum(KEYS * across - 1).divide_unsigned(across)
            for i in range(0, KEYS * across, THREADS)
        ]

    def _row(self, row: Scalar) -> Scalar:
        """Where a row of this key head is among all queries, or outputs."""
        c = self.c
        if not self.call.flat:
            return self.head * self.n.rows + row
        (batch, key_head), (member, token) = self.head.divide_unsigned(c.kv_heads), self.n.member(row)
        return (batch * self.n.tokens + token) * (c.kv_heads * c.group) + key_head * c.group + member

    def _fetch(self, buffer: Buffer, rows: int, row: Scalar, size: int, bound: Scalar) -> list[ir.Value]:
        """This thread's chunks of 32 rows of this head's ``rows``, none beyond ``bound``."""
        across = size // CHUNK
        return [
            self.k.load(buffer, (self.head * rows + (row + line).minimum(bound)) * across + chunk)
            for line, chunk in self._spots(size)
        ]

    def _fetch_keys(self, place: Scalar) -> list[ir.Value]:
        return self._fetch(self.keys, self.c.keys, place, self.c.dk, self.window.last)

    def _put(self, chunks: list[ir.Value], size: int, stride: int) -> None:
        """Write them to the tile."""
        for (line, chunk), value in zip(self._spots(size), chunks, strict=True):
            self.k.store_as_is(value, self.memory, line * stride + (chunk + self.at.tile))

    def _put_values(self, chunks: list[ir.Value], place: Scalar) -> None:
        """The same for values, without what is no number where not all rows see all keys."""
        k = self.k

        def as_they_are() -> list[ir.Value]:
            self._put(chunks, self.c.dv, self.at.stride_v)
            return []

        def numbers() -> list[ir.Value]:
            kept, odd = list[ir.Value](), None
            for chunk in chunks:
                found: list[ir.Value] = []
                for word in self._words(chunk):
                    for rest, is_odd in _halves(word):
                        word = is_odd.select(word & rest, word)
                        odd = is_odd if odd is None else odd | is_odd
                    found.append(arith.BitcastOp(k.type(1), word.value).result)
                kept.append(k.join(found))
            self._put(kept, self.c.dv, self.at.stride_v)
            assert odd is not None
            k.when(odd, lambda: k.store(k.constant(1.0), self.odd, Scalar.constant(0, "index")))
            return []

        if self.bias is not None:
            numbers()
        else:
            k.choose(self.window.all_seen(place), as_they_are, numbers, [])

    def _words(self, chunk: ir.Value) -> list[Scalar]:
        """The bits of a chunk."""
        return [Scalar(arith.BitcastOp(self.k.type(1, "i32"), word).result) for word in self.k.elements(chunk)]

    # ---- a tile ----------------------------------------------------------------------------------------------------
    def _write_products(self) -> None:
        """This subgroup's 16 x 16 products of queries and keys."""
        k, at, sums = self.k, self.at, self.k.matrix_zero()
        rows, keys = self.down * (SIDE * at.stride_q), self.across * (SIDE * at.stride_q) + at.tile
        for depth in range(self.c.dk // SIDE):
            step, stride = depth * (SIDE // CHUNK), at.half(at.stride_q)
            left = k.matrix_load("AOp", self.memory, rows + step, stride)
            right = k.matrix_load("BOp", self.memory, keys + step, stride, transposed=True)
            sums = k.matrix_multiply_add(left, right, sums)
        place = self.down * (SIDE * at.stride_s) + self.across * (SIDE // WORDS) + at.scores
        k.matrix_store(sums, self.memory, place, at.full(at.stride_s))

    def _own_chunks(self) -> list[Scalar]:
        """Where this thread's scores lie."""
        each = KEYS // _SHARE // WORDS
        return [self.own * self.at.stride_s + self.share * each + (self.at.scores + i) for i in range(each)]

    def _scores(self, place: Scalar) -> list[ir.Value]:
        """This thread's part of its row, whose largest one the others are told."""
        k, c = self.k, self.c
        products = [value for at in self._own_chunks() for value in k.elements(k.load(self.memory, at))]
        scores: list[ir.Value] = []
        for i, product in enumerate(products):
            key = place + self.share * len(products) + i
            score = k.mul(product, k.constant(c.scale))
            if c.softcap:
                score = k.mul(k.tanh(k.div(score, k.constant(c.softcap))), k.constant(c.softcap))
            if self.bias is not None:
                row = (self.start + self.own).minimum(self.n.rows - 1)
                score = self.bias.added(score, row, key.minimum(self.window.last))
            scores.append(k.select(self.window.sees(self.own, key), score, k.constant(float("-inf"))))
        highest = scores[0]
        for score in scores[1:]:
            highest = k.maximum(highest, score)
        k.store(highest, self.tops, k.thread())
        return scores

    def _weigh(self, scores: list[ir.Value], top: ir.Value, total: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Scores to weights; the row's next maximum and this thread's part of its sum."""
        k, at, new = self.k, self.at, top
        for other in range(_SHARE):
            new = k.maximum(new, k.load(self.tops, self.own * _SHARE + other))
        weights = [k.exp(k.sub(score, new)) for score in scores]
        shrink = k.exp(k.sub(top, new))
        total = k.mul(total, shrink)
        for weight in weights:
            total = k.add(total, weight)
        for i, spot in enumerate(self._own_chunks()):
            k.store_as_is(k.join(weights[i * WORDS : (i + 1) * WORDS]), self.memory, spot)
        k.store_as_is(k.chunk_of_f16(weights), self.memory, self.own * at.stride_p + self.share + at.weights)
        self._put_factor(shrink)
        return new, total

    def _put_factor(self, factor: ir.Value) -> None:
        spot = self.own * self.at.stride_f + self.share + self.at.factors
        self.k.store_as_is(self.k.splat(factor, WORDS), self.memory, spot)

    def _scaled(self, outputs: list[ir.Value]) -> list[ir.Value]:
        """This subgroup's outputs times the factors of their rows."""
        spot, stride = self.down * (SIDE * self.at.stride_f) + self.at.factors, self.at.full(self.at.stride_f)
        factors = self.k.matrix_load_sums(self.memory, spot, stride)
        return [self.k.matrix_multiply(output, factors) for output in outputs]

    def _mix(self, place: Scalar, outputs: list[ir.Value]) -> list[ir.Value]:
        """Add the weighted values of a tile to this subgroup's outputs."""
        k, at = self.k, self.at
        odd = Scalar(k.load(self.odd, Scalar.constant(0, "index"))) > 0.0
        turns = odd.select(Scalar.constant(1, "index"), Scalar.constant(0, "index"))
        zero = Scalar.constant(0, "index")
        outputs = k.loop(zero, turns, 1, self._scaled(outputs), lambda _, held: self._with_odd_ones(place, held))
        for step in range(KEYS // SIDE):
            weights = self.down * (SIDE * at.stride_p) + (at.weights + step * (SIDE // CHUNK))
            left = k.matrix_load("AOp", self.memory, weights, at.half(at.stride_p))
            for j in range(self.wide):
                column = (self.across * self.wide + j) * (SIDE // CHUNK)
                values = column + (at.tile + step * SIDE * at.stride_v)
                right = k.matrix_load("BOp", self.memory, values, at.half(at.stride_v))
                outputs[j] = k.matrix_multiply_add(left, right, outputs[j])
        return outputs

    def _with_odd_ones(self, place: Scalar, outputs: list[ir.Value]) -> list[ir.Value]:
        """The outputs with the values that are no numbers, for the rows that see them; eight of them a thread."""
        k, c, at = self.k, self.c, self.at
        line, half = self.lane.divide_unsigned(2)
        row = self.down * SIDE + line
        own = self.subgroup * (SIDE * SIDE // WORDS) + at.extra
        outputs = list(outputs)
        for j in range(self.wide):
            chunk = (self.across * self.wide + j) * (SIDE // CHUNK) + half

            def key(index: Scalar, sums: list[ir.Value], chunk: Scalar = chunk) -> list[ir.Value]:
                word, inside = index.divide_unsigned(WORDS)
                four = k.elements(k.load(self.memory, row * at.stride_s + word + at.scores))
                weight = four[-1]
                for i, value in enumerate(four[:-1]):
                    weight = k.select(inside.equals(i), value, weight)
                at_row = (place + index).minimum(self.window.last) + self.head * c.keys
                values = k.load(self.values, at_row * (c.dv // CHUNK) + chunk)
                odd = [is_odd for word in self._words(values) for _, is_odd in _halves(word)]
                seen = Scalar(weight) > 0.0
                return [
                    k.select(seen & is_odd, k.add(total, k.mul(value, weight)), total)
                    for value, is_odd, total in zip(unpack(k, values, "f16"), odd, sums, strict=True)
                ]

            stop = Scalar.constant(KEYS, "index")
            sums = k.loop(Scalar.constant(0, "index"), stop, 1, [k.constant(0.0)] * CHUNK, key)
            k.barrier()
            for i in range(CHUNK // WORDS):
                spot = own + line * (SIDE // WORDS) + half * 2 + i
                k.store_as_is(k.join(sums[i * WORDS : (i + 1) * WORDS]), self.memory, spot)
            k.barrier()
            more = k.matrix_load_sums(self.memory, own, at.full(SIDE // WORDS))
            outputs[j] = k.matrix_add(outputs[j], more)
        return outputs

    # ---- the end ---------------------------------------------------------------------------------------------------
    def _write(self, top: ir.Value, total: ir.Value, outputs: list[ir.Value]) -> None:
        k, c, at, call = self.k, self.c, self.at, self.call
        k.store(total, self.sums, k.thread())
        k.barrier()
        whole = k.load(self.sums, self.own * _SHARE)
        for other in range(1, _SHARE):
            whole = k.add(whole, k.load(self.sums, self.own * _SHARE + other))
        base = (self.head * self.n.parts + self.part) * self.n.rows
        if call.whole:
            self._put_factor(k.div(k.constant(1.0), k.maximum(whole, k.constant(1e-30))))  # of no key: 0
            k.barrier()
            outputs = self._scaled(outputs)
        else:
            own = self.start + self.own

            def write_stats() -> None:
                k.store(top, self.stats, (base + own) * 2)
                k.store(whole, self.stats, (base + own) * 2 + 1)

            k.when(self.share.equals(0) & (own < self.n.rows), write_stats)
        for j, output in enumerate(outputs):
            column = (self.across * self.wide + j) * (SIDE // WORDS)
            k.matrix_store(output, self.memory, self.down * (SIDE * at.stride_o) + column, at.full(at.stride_o))
        k.barrier()
        across = c.dv // WORDS
        for first in range(0, QUERIES * across, THREADS):
            line, column = (k.thread() + first).divide_unsigned(across)
            row, value = self.start + line, k.load(self.memory, line * at.stride_o + column)
            place = self._row(row) if call.whole else base + row

            def write(value: ir.Value = value, place: Scalar = place, column: Scalar = column) -> None:
                k.store(value, self.output, place * across + column)

            k.when(row < self.n.rows, write)


def _halves(word: Scalar) -> list[tuple[int, Scalar]]:
    """Of the two f16 of a word the mask of the other one, and whether it is no number: drivers compute x - x as 0."""
    masks = ((-(1 << 16), _EXPONENTS), (0xFFFF, _EXPONENTS << 16))
    return [(rest, (word & exponent).equals(exponent)) for rest, exponent in masks]
