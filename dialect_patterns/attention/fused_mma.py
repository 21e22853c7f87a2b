"""Attention of many queries on the matrix units of a GPU: one kernel that goes over the keys that are seen, by tiles.

    for each tile of 32 keys:  s  = softcap(scale * q k^T), -inf where hidden     32 x 32, by matrices of 16 x 16
                               m' = max(m, max s),  p = exp(s - m'),  l = exp(m - m') l + sum p
                               o  = exp(m - m') o + p v                           by matrices, in registers
    y = o / l

    %y = flow.dispatch @attention_fused_mma_...[%heads](%first, %q, %k, %v, %bias?, %sink?)

A workgroup of four subgroups does 32 of the R rows of a key head (its query heads and their tokens): scores and factors
pass through its memory, where rows are known; a subgroup holds 16 rows of half the outputs' columns. Keys and values
take turns in one tile of the memory, the next ones under way in registers. Queries, keys, values and p are f16, scores,
maxima and all sums f32. Parts of the keys and their join are those of ``fused_simt_tiles``.

A hidden key weighs 0, and 0 times NaN or inf is NaN: of a tile that not all rows see in whole, values that are no
numbers are taken out of the product, and added by themselves to the rows that see them.

Legal: for f16 on GPUs with such products and subgroups of 32, for 9 rows a key head or more, causal at one position, if
16 divides dk and 32 divides dv. Source: FlashAttention-2 (Dao 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

from iree.compiler import ir
from iree.compiler.dialects import arith

from ..emit.builder import Builder, Size
from ..emit.chunk_words import unpack
from ..emit.scalar import Scalar
from ..emit.simt_kernel import MAX_GROUPS, Buffer, Group, Kernel
from ..select import Legality, No, OtherMachine, Yes
from ..target import Target
from .core import AttentionShape
from .simt_bias import Bias
from .simt_call import why_not_by_position
from .simt_dispatch import Tiled, emit_tiled
from .simt_join import LOWEST, sink_of_row
from .simt_window import Window

_SIDE = 16
_CHUNK = 8  # f16 of 16 bytes
_WORDS = 4  # f32 of 16 bytes
_SUBGROUP = 32
_QUERIES = 32  # rows of a workgroup
_KEYS = 32  # of a tile
_ACROSS = 2  # subgroups along keys, or columns of the outputs; as many along the rows
_THREADS = _SUBGROUP * _ACROSS * _QUERIES // _SIDE
_SHARE = _THREADS // _QUERIES  # threads that share a row of scores
_LEAST_ROWS = 9
_EXPONENTS = 0x7C00
_MOST_COLUMNS = 256  # a subgroup holds 16 rows of half of them


@dataclass(frozen=True)
class _Places:
    """Where things lie in the workgroup's memory, in chunks; strides are odd numbers of them, against bank conflicts.

    Attributes:
        dk: Size of a query or key head.
        dv: Size of a value head.
        unit: f16 elements of one unit of a matrix's stride, and f32 ones.
    """

    dk: int
    dv: int
    unit: tuple[int, int]

    @property
    def stride_q(self) -> int:
        """From row to row of queries and of keys."""
        return self.dk // _CHUNK + 1

    @property
    def stride_v(self) -> int:
        """Of values."""
        return self.dv // _CHUNK + 1

    @property
    def stride_o(self) -> int:
        """Of outputs, which take the place of queries, keys and values in the end."""
        return self.dv // _WORDS + 1

    stride_s, stride_p, stride_f = _KEYS // _WORDS + 1, _KEYS // _CHUNK + 1, _SIDE // _WORDS

    @property
    def tile(self) -> int:
        """Keys, then values; queries are before."""
        return _QUERIES * self.stride_q

    @property
    def scores(self) -> int:
        """Scores, then weights, f32."""
        return max(self.tile + _KEYS * max(self.stride_q, self.stride_v), _QUERIES * self.stride_o)

    @property
    def weights(self) -> int:
        """Weights, f16."""
        return self.scores + _QUERIES * self.stride_s

    @property
    def factors(self) -> int:
        """What rows of the outputs are multiplied by, 16 times."""
        return self.weights + _QUERIES * self.stride_p

    @property
    def extra(self) -> int:
        """A matrix of each subgroup, f32."""
        return self.factors + _QUERIES * self.stride_f

    @property
    def chunks(self) -> int:
        """All of it."""
        return self.extra + _THREADS // _SUBGROUP * _SIDE * _SIDE // _WORDS

    def half(self, chunks: int) -> int:
        """A stride of f16 in the target's unit."""
        return chunks * _CHUNK // self.unit[0]

    def full(self, chunks: int) -> int:
        """A stride of f32 in the target's unit."""
        return chunks * _WORDS // self.unit[1]


def _places(dk: int, dv: int, target: Target) -> _Places:
    return _Places(dk, dv, (1, 1) if target.matrix_stride == "elements" else (_CHUNK, _WORDS))


def is_legal(shape: AttentionShape, target: Target) -> Legality:
    """Where subgroups of 32 multiply matrices, for f16."""
    heads = shape.heads
    if not target.is_gpu:
        return OtherMachine(f"{target.name} is not a GPU")
    if types := {shape.dtype, shape.value_dtype or shape.dtype} - {"f16"}:
        return No(f"{' and '.join(sorted(types))}, not f16")
    if target.matrix_stride is None or target.subgroup_size != _SUBGROUP or target.max_threads < _THREADS:
        return No(f"{target.name} is compiled for without products of 16x16 matrices by subgroups of {_SUBGROUP}")
    if reason := why_not_by_position(shape):
        return No(reason)
    rows = heads.group * (shape.length or 0)
    if rows < _LEAST_ROWS or not heads.batch:
        return No(f"{rows} queries a key head, less than {_LEAST_ROWS}")
    if heads.dk % _SIDE or heads.dv % (_ACROSS * _SIDE) or not heads.dk or not 0 < heads.dv <= _MOST_COLUMNS:
        return No(f"head sizes {heads.dk} and {heads.dv} are not multiples of {_SIDE} and {_ACROSS * _SIDE}, or large")
    if heads.batch * heads.kv > MAX_GROUPS:
        return No(f"more than {MAX_GROUPS} key heads")
    need = 16 * _places(heads.dk, heads.dv, target).chunks + 4 * (2 * _THREADS + 1)
    if need > target.workgroup_memory:
        return No(f"{need} bytes of the workgroup's memory, more than {target.workgroup_memory}")
    return Yes()


def emit_attention_fused_mma(
    b: Builder, target: Target, q: ir.Value, k: ir.Value, v: ir.Value, *,
    first: Size, scale: float, softcap: float, left: int | None, sink: ir.Value | None,
    bias: ir.Value | None, heads: int | None,
) -> ir.Value:  # fmt: skip
    """As :func:`~.simt_dispatch.emit_tiled`, whose parameters these are."""

    def body(kernel: Kernel, call: Tiled, given: Scalar) -> None:
        _Matrices(kernel, call, given, _places(call.c.dk, call.c.dv, target)).emit()

    return emit_tiled(
        "fused_mma", Group(_THREADS, _SUBGROUP), _QUERIES, body, b, target, q, k, v,
        first=first, scale=scale, softcap=softcap, left=left, sink=sink, bias=bias, heads=heads,
    )  # fmt: skip


def _halves(word: Scalar) -> list[tuple[int, Scalar]]:
    """Of the two f16 of a word the mask of the other one, and whether it is no number: drivers compute x - x as 0."""
    masks = ((-(1 << 16), _EXPONENTS), (0xFFFF, _EXPONENTS << 16))
    return [(rest, (word & exponent).equals(exponent)) for rest, exponent in masks]


@dataclass
class _Matrices:
    """Emits the kernel of 32 rows and one part of the keys."""

    k: Kernel
    call: Tiled
    first: Scalar
    at: _Places

    def emit(self) -> None:
        """Emit everything."""
        k, c, call = self.k, self.call.c, self.call
        self.c, self.n, heads = c, call.n, c.batch * c.kv_heads

        def count(elements: int) -> Scalar:
            return Scalar.constant(elements, "index")

        self.query = k.chunks(0, self.n.rows * (heads * c.dk // _CHUNK))
        self.keys = k.chunks(1, count(heads * c.keys * c.dk // _CHUNK))
        self.values = k.chunks(2, count(heads * c.keys * c.dv // _CHUNK))
        self.head = k.item()
        self.bias = None if c.bias_dims is None else Bias(k, c, call.n, 3, self.head)
        rows = self.n.parts * self.n.rows * heads
        if call.whole:
            self.output = k.buffer(call.output, call.result, rows * (c.dv // _WORDS), _WORDS)
        else:
            self.stats = k.buffer(call.output, "f32", rows * 2)
            self.output = k.buffer(call.output + 1, "f32", rows * (c.dv // _WORDS), _WORDS)
        self.memory = k.shared_chunks(self.at.chunks)
        self.tops, self.sums, self.odd = k.shared(_THREADS), k.shared(_THREADS), k.shared(1)
        self.wide = c.dv // (_ACROSS * _SIDE)  # matrices of a subgroup's outputs
        block, self.part = k.tile(), Scalar.constant(0, "index")
        if not call.whole:
            block, self.part = block.divide_unsigned(self.n.parts)
        last = (self.n.rows - 1).divide_unsigned(_QUERIES)[0]
        self.start = (last - block) * _QUERIES  # rows that see the most come first
        self.window = Window(c, self.n, self.first, self.start, _QUERIES, _KEYS)
        subgroup, self.lane = k.thread().divide_unsigned(_SUBGROUP)
        self.subgroup = subgroup
        self.down, self.across = subgroup.divide_unsigned(_ACROSS)
        self.own, self.share = k.thread().divide_unsigned(_SHARE)
        self._run()

    def _run(self) -> None:
        k, c, call = self.k, self.c, self.call
        for line, chunk in self._spots(c.dk):
            row = self._row((self.start + line).minimum(self.n.rows - 1))
            value = k.load(self.query, row * (c.dk // _CHUNK) + chunk)
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
            following = self._fetch_keys(place + _KEYS)
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
        top, total, *rest = k.loop(place, stop, _KEYS, [*initial, *keys, *zeros], tile)
        self._write(top, total, rest[count:])

    # ---- loads -----------------------------------------------------------------------------------------------------
    def _spots(self, size: int) -> list[tuple[Scalar, Scalar]]:
        """Row and chunk of each of this thread's loads of 32 rows; the last ones again where there are too few."""
        across = size // _CHUNK
        return [
            (self.k.thread() + i).minimum(_KEYS * across - 1).divide_unsigned(across)
            for i in range(0, _KEYS * across, _THREADS)
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
        across = size // _CHUNK
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
        rows, keys = self.down * (_SIDE * at.stride_q), self.across * (_SIDE * at.stride_q) + at.tile
        for depth in range(self.c.dk // _SIDE):
            step, stride = depth * (_SIDE // _CHUNK), at.half(at.stride_q)
            left = k.matrix_load("AOp", self.memory, rows + step, stride)
            right = k.matrix_load("BOp", self.memory, keys + step, stride, transposed=True)
            sums = k.matrix_multiply_add(left, right, sums)
        place = self.down * (_SIDE * at.stride_s) + self.across * (_SIDE // _WORDS) + at.scores
        k.matrix_store(sums, self.memory, place, at.full(at.stride_s))

    def _own_chunks(self) -> list[Scalar]:
        """Where this thread's scores lie."""
        each = _KEYS // _SHARE // _WORDS
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
            k.store_as_is(k.join(weights[i * _WORDS : (i + 1) * _WORDS]), self.memory, spot)
        k.store_as_is(k.chunk_of_f16(weights), self.memory, self.own * at.stride_p + self.share + at.weights)
        self._put_factor(shrink)
        return new, total

    def _put_factor(self, factor: ir.Value) -> None:
        spot = self.own * self.at.stride_f + self.share + self.at.factors
        self.k.store_as_is(self.k.splat(factor, _WORDS), self.memory, spot)

    def _scaled(self, outputs: list[ir.Value]) -> list[ir.Value]:
        """This subgroup's outputs times the factors of their rows."""
        spot, stride = self.down * (_SIDE * self.at.stride_f) + self.at.factors, self.at.full(self.at.stride_f)
        factors = self.k.matrix_load_sums(self.memory, spot, stride)
        return [self.k.matrix_multiply(output, factors) for output in outputs]

    def _mix(self, place: Scalar, outputs: list[ir.Value]) -> list[ir.Value]:
        """Add the weighted values of a tile to this subgroup's outputs."""
        k, at = self.k, self.at
        odd = Scalar(k.load(self.odd, Scalar.constant(0, "index"))) > 0.0
        turns = odd.select(Scalar.constant(1, "index"), Scalar.constant(0, "index"))
        zero = Scalar.constant(0, "index")
        outputs = k.loop(zero, turns, 1, self._scaled(outputs), lambda _, held: self._with_odd_ones(place, held))
        for step in range(_KEYS // _SIDE):
            weights = self.down * (_SIDE * at.stride_p) + (at.weights + step * (_SIDE // _CHUNK))
            left = k.matrix_load("AOp", self.memory, weights, at.half(at.stride_p))
            for j in range(self.wide):
                column = (self.across * self.wide + j) * (_SIDE // _CHUNK)
                values = column + (at.tile + step * _SIDE * at.stride_v)
                right = k.matrix_load("BOp", self.memory, values, at.half(at.stride_v))
                outputs[j] = k.matrix_multiply_add(left, right, outputs[j])
        return outputs

    def _with_odd_ones(self, place: Scalar, outputs: list[ir.Value]) -> list[ir.Value]:
        """The outputs with the values that are no numbers, for the rows that see them; eight of them a thread."""
        k, c, at = self.k, self.c, self.at
        line, half = self.lane.divide_unsigned(2)
        row = self.down * _SIDE + line
        own = self.subgroup * (_SIDE * _SIDE // _WORDS) + at.extra
        outputs = list(outputs)
        for j in range(self.wide):
            chunk = (self.across * self.wide + j) * (_SIDE // _CHUNK) + half

            def key(index: Scalar, sums: list[ir.Value], chunk: Scalar = chunk) -> list[ir.Value]:
                word, inside = index.divide_unsigned(_WORDS)
                four = k.elements(k.load(self.memory, row * at.stride_s + word + at.scores))
                weight = four[-1]
                for i, value in enumerate(four[:-1]):
                    weight = k.select(inside.equals(i), value, weight)
                at_row = (place + index).minimum(self.window.last) + self.head * c.keys
                values = k.load(self.values, at_row * (c.dv // _CHUNK) + chunk)
                odd = [is_odd for word in self._words(values) for _, is_odd in _halves(word)]
                seen = Scalar(weight) > 0.0
                return [
                    k.select(seen & is_odd, k.add(total, k.mul(value, weight)), total)
                    for value, is_odd, total in zip(unpack(k, values, "f16"), odd, sums, strict=True)
                ]

            stop = Scalar.constant(_KEYS, "index")
            sums = k.loop(Scalar.constant(0, "index"), stop, 1, [k.constant(0.0)] * _CHUNK, key)
            k.barrier()
            for i in range(_CHUNK // _WORDS):
                spot = own + line * (_SIDE // _WORDS) + half * 2 + i
                k.store_as_is(k.join(sums[i * _WORDS : (i + 1) * _WORDS]), self.memory, spot)
            k.barrier()
            more = k.matrix_load_sums(self.memory, own, at.full(_SIDE // _WORDS))
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
            column = (self.across * self.wide + j) * (_SIDE // _WORDS)
            k.matrix_store(output, self.memory, self.down * (_SIDE * at.stride_o) + column, at.full(at.stride_o))
        k.barrier()
        across = c.dv // _WORDS
        for first in range(0, _QUERIES * across, _THREADS):
            line, column = (k.thread() + first).divide_unsigned(across)
            row, value = self.start + line, k.load(self.memory, line * at.stride_o + column)
            place = self._row(row) if call.whole else base + row

            def write(value: ir.Value = value, place: Scalar = place, column: Scalar = column) -> None:
                k.store(value, self.output, place * across + column)

            k.when(row < self.n.rows, write)
