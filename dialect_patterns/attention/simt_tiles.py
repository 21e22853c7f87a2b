"""Attention of many queries on GPUs: one kernel that goes over the keys that are seen, tile by tile.

    for each tile of 32 keys:  s  = softcap(scale * q k^T), -inf where hidden     32 x 32, in the workgroup's memory
                               m' = max(m, max s),  p = exp(s - m'),  l = exp(m - m') l + sum p
                               o  = exp(m - m') o + p v                           in registers
    y = o / l

    %y = flow.dispatch @attention_fused_simt_tiles_...[%heads](%first, %q, %k, %v, %bias?, %sink?)

A workgroup does 32 of the R rows of a key head (its query heads and their tokens) and reads keys up to the position of
the last one only: what a cache holds beyond the filled rows, and half of a prompt's own keys, cost nothing. Where such
workgroups are few, the keys are dealt out to several, which ``attention_simt``'s second kernel joins. Slices of queries
and keys pass through the workgroup's memory, the next ones under way; values come straight from the first-level cache.
It needs no subgroup operations.

Legal: on GPUs, causal at one position; a mask is read as what it adds. Cost: dk + dv multiply-adds for a query and
key seen, at 13 TFLOP/s on an H100 (T=512, d=256, no mask). IREE's products on matrix units take 0.26 ms for a cache of
4,096 rows there, however few are filled, this kernel 0.16 to 1.2 ms; on Vulkan, where IREE has none, 4.5 ms
against 0.2 to 1.5. Source: FlashAttention-2 (Dao 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

from iree.compiler import ir

from ..emit.builder import Builder, Size
from ..emit.scalar import Scalar
from ..emit.simt_kernel import MAX_GROUPS, Buffer, Group, Kernel
from ..select import Legality, No, OtherMachine, Yes
from ..target import Target
from .core import AttentionShape
from .simt_bias import Bias
from .simt_call import WIDTH, Call, why_not_by_position
from .simt_dispatch import Tiled, emit_tiled
from .simt_join import LOWEST, sink_of_row
from .simt_window import Window

_THREADS = 128
_QUERIES = 32  # rows of a workgroup
_KEYS = 32  # of a tile
_SLICE = 8  # loads of a row that pass through the workgroup's memory at once
_ROWS, _COLUMNS = 2, 4  # scores of a thread
_COLUMN_GROUPS = _KEYS // _COLUMNS
_SHARE = 4  # threads that share a row of scores
_LEAST_GROUPS, _MOST_GROUPS = 4, 16  # threads along the columns of the values
_UNROLL = 4  # keys whose values are under way
_MAX_SIZE = 512


def is_legal(shape: AttentionShape, target: Target) -> Legality:
    """For any number of static rows."""
    heads = shape.heads
    if not target.is_gpu:
        return OtherMachine(f"{target.name} is not a GPU")
    if reason := why_not_by_position(shape):
        return No(reason)
    if not shape.length or not heads.batch:
        return No("there is no query")
    if heads.dk % WIDTH or _groups(heads.dv) < _LEAST_GROUPS:
        return No(f"head size {heads.dk} is not a multiple of {WIDTH} or {heads.dv} not of {WIDTH * _LEAST_GROUPS}")
    if heads.batch * heads.kv > MAX_GROUPS:
        return No(f"more than {MAX_GROUPS} key heads")
    if heads.dv > _MAX_SIZE:
        return No(f"a thread cannot hold its part of a head of {heads.dv}")
    return Yes()


def _groups(dv: int) -> int:
    """Threads along the columns of the values: the largest power of two that divides their loads."""
    loads = dv // WIDTH if dv % WIDTH == 0 else 0
    return min(loads & -loads, _MOST_GROUPS)


def emit_attention_fused_simt_tiles(
    b: Builder, target: Target, q: ir.Value, k: ir.Value, v: ir.Value, *,
    first: Size, scale: float, softcap: float, left: int | None, sink: ir.Value | None,
    bias: ir.Value | None,
) -> ir.Value:  # fmt: skip
    """[B, Hq, T, dv] from q [B, Hq, T, dk] and the cache k, v [B, Hkv, S, d]; query i sees the keys up to first + i."""

    def body(kernel: Kernel, call: Tiled, given: Scalar) -> None:
        _Tiles(kernel, call.c, given, call).emit()

    return emit_tiled(
        "fused_simt_tiles", Group(_THREADS, 0), _QUERIES, body, b, target, q, k, v,
        first=first, scale=scale, softcap=softcap, left=left, sink=sink, bias=bias,
    )  # fmt: skip


@dataclass
class _Tiles:
    """Emits the kernel of 32 rows and one part of the keys."""

    k: Kernel
    c: Call
    first: Scalar
    call: Tiled

    def emit(self) -> None:
        """Emit everything."""
        k, c = self.k, self.c
        self.n, heads, vectors = self.call.n, c.batch * c.kv_heads, c.dk // WIDTH

        def count(elements: int) -> Scalar:
            return Scalar.constant(elements, "index")

        self.query = k.buffer(0, c.dtype, self.n.rows * (heads * vectors), WIDTH)
        self.keys = k.buffer(1, c.dtype, count(heads * c.keys * vectors), WIDTH)
        self.values = k.buffer(2, c.value_dtype, count(heads * c.keys * c.dv // WIDTH), WIDTH)
        self.head = k.item()
        self.bias = None if c.bias_dims is None else Bias(k, c, self.n, 3, self.head)
        self.sink_type, outputs = self.call.sink_type, self.call.output
        rows = self.n.parts * self.n.rows * heads
        if self.call.whole:
            self.output = k.buffer(outputs, self.call.result, rows * (c.dv // WIDTH), WIDTH)
        else:
            self.stats = k.buffer(outputs, "f32", rows * 2)
            self.output = k.buffer(outputs + 1, "f32", rows * (c.dv // WIDTH), WIDTH)
        self.slice = max(n for n in range(1, _SLICE + 1) if vectors % n == 0)
        self.stride = self.slice | 1  # odd, against bank conflicts
        self.tile_q, self.tile_k = (k.shared_chunks(n * self.stride) for n in (_QUERIES, _KEYS))
        self.scores = k.shared(_QUERIES * (_KEYS + 1))
        self.tops, self.sums = k.shared(_QUERIES * _SHARE), k.shared(_QUERIES * _SHARE)
        self.factors = k.shared(_QUERIES)
        block, self.part = k.tile(), Scalar.constant(0, "index")
        if not self.call.whole:
            block, self.part = block.divide_unsigned(self.n.parts)
        self.start = block * _QUERIES
        self.row, self.column = k.thread().divide_unsigned(_COLUMN_GROUPS)
        self.own, self.share = k.thread().divide_unsigned(_SHARE)
        self.groups = _groups(c.dv)
        self.out_row, self.out_column = k.thread().divide_unsigned(self.groups)
        self.out_rows = _QUERIES * self.groups // _THREADS
        self.loads = c.dv // WIDTH // self.groups
        self._run()

    def _run(self) -> None:
        k, c = self.k, self.c
        self.window = Window(c, self.n, self.first, self.start, _QUERIES, _KEYS)
        self.last = self.window.last
        place, stop = self.window.all() if self.call.whole else self.window.part(self.part)

        def tile(place: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            self._write_scores(place, self._products(place))
            top, total = self._softmax(carried[0], carried[1])
            return [top, total, *self._mix(place, carried[2:])]

        initial = [k.constant(LOWEST), k.constant(0.0)]
        if self.sink_type:  # as a key that is seen first, whose value is zero
            row = (self.start + self.own).minimum(self.n.rows - 1)
            initial = [sink_of_row(k, c, self.n, self.sink_type, self.call.sink, self.head, row), k.constant(1.0)]
        initial += [k.constant(0.0, WIDTH)] * (self.out_rows * self.loads)
        top, total, *mixed = k.loop(place, stop, _KEYS, initial, tile)
        if not self.call.whole:
            self._write_part(top, total, mixed)
            return
        k.barrier()
        k.when(self.share.equals(0), lambda: k.store(total, self.factors, self.own))
        k.barrier()
        sums = [k.maximum(k.load(self.factors, row), k.constant(1e-30)) for row in self._out_rows()]  # of no key: 0
        shares = [k.div(k.constant(1.0), total) for total in sums]
        scaled = [k.mul(value, k.splat(shares[i // self.loads], WIDTH)) for i, value in enumerate(mixed)]
        self._write_rows(scaled, self.head * self.n.rows)

    def _out_rows(self) -> list[Scalar]:
        """The rows of the outputs that this thread holds a part of, in the workgroup."""
        return [self.out_row * self.out_rows + r for r in range(self.out_rows)]

    def _write_rows(self, values: list[ir.Value], base: Scalar) -> None:
        """Write this thread's part of the outputs, ``base`` the row of the key head's first one."""
        k, c = self.k, self.c
        for r, row in enumerate(self._out_rows()):
            own = self.start + row

            def write(r: int = r, own: Scalar = own) -> None:
                for i in range(self.loads):
                    place = (base + own) * (c.dv // WIDTH) + (self.out_column + i * self.groups)
                    k.store(values[r * self.loads + i], self.output, place)

            k.when(own < self.n.rows, write)

    def _write_part(self, top: ir.Value, total: ir.Value, mixed: list[ir.Value]) -> None:
        k = self.k
        base = (self.head * self.n.parts + self.part) * self.n.rows
        self._write_rows(mixed, base)
        own = self.start + self.own

        def write() -> None:
            k.store(top, self.stats, (base + own) * 2)
            k.store(total, self.stats, (base + own) * 2 + 1)

        k.when(self.share.equals(0) & (own < self.n.rows), write)

    # ---- scores ----------------------------------------------------------------------------------------------------
    def _fetch(self, buffer: Buffer, row: Scalar, count: int, bound: Scalar, part: Scalar) -> list[ir.Value]:
        """This thread's loads of a slice of ``count`` rows from ``row`` on."""
        k, vectors = self.k, self.c.dk // WIDTH
        found: list[ir.Value] = []
        for line, place in self._places(count):
            at = (row + line).minimum(bound)
            base = self.head * (self.n.rows if buffer is self.query else self.c.keys)
            found.append(k.load(buffer, (base + at) * vectors + part * self.slice + place))
        return found

    def _places(self, count: int) -> list[tuple[Scalar, Scalar]]:
        """Row and place in a slice of each of this thread's loads."""
        size = count * self.slice
        return [(self.k.thread() + i).minimum(size - 1).divide_unsigned(self.slice) for i in range(0, size, _THREADS)]

    def _products(self, place: Scalar) -> list[ir.Value]:
        """This thread's 2 x 4 products of queries and keys."""
        k, c = self.k, self.c
        slices = c.dk // WIDTH // self.slice
        final = self.n.rows - 1

        def fetch(part: Scalar) -> list[ir.Value]:
            queries = self._fetch(self.query, self.start, _QUERIES, final, part)
            return [*queries, *self._fetch(self.keys, place, _KEYS, self.last, part)]

        places_q, places_k = self._places(_QUERIES), self._places(_KEYS)

        def step(part: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            count = len(places_q) + len(places_k)
            loaded, sums = carried[:count], list(carried[count:])
            k.barrier()
            for (line, spot), value in zip(places_q, loaded, strict=False):
                k.store(k.widen(self.query, value), self.tile_q, line * self.stride + spot)
            for (line, spot), value in zip(places_k, loaded[len(places_q) :], strict=True):
                k.store(k.widen(self.keys, value), self.tile_k, line * self.stride + spot)
            k.barrier()
            following = fetch((part + 1).minimum(slices - 1)) if slices > 1 else loaded
            for i in range(self.slice):
                left = [k.load(self.tile_q, (self.row * _ROWS + r) * self.stride + i) for r in range(_ROWS)]
                right = [
                    k.load(self.tile_k, (self.column + j * _COLUMN_GROUPS) * self.stride + i) for j in range(_COLUMNS)
                ]
                for r in range(_ROWS):
                    for j in range(_COLUMNS):
                        sums[r * _COLUMNS + j] = k.fma(left[r], right[j], sums[r * _COLUMNS + j])
            return [*following, *sums]

        start = Scalar.constant(0, "index")
        initial = [*fetch(start), *[k.constant(0.0, WIDTH)] * (_ROWS * _COLUMNS)]
        found = k.loop(start, Scalar.constant(slices, "index"), 1, initial, step)
        totals: list[ir.Value] = []
        for value in found[-_ROWS * _COLUMNS :]:
            a, b, c_, d = k.elements(value)
            totals.append(k.add(k.add(a, b), k.add(c_, d)))
        return totals

    def _write_scores(self, place: Scalar, products: list[ir.Value]) -> None:
        """Scale, hide, and hand this thread's scores to the workgroup."""
        k, c = self.k, self.c
        for index, product in enumerate(products):
            line = self.row * _ROWS + index // _COLUMNS
            key = self.column + index % _COLUMNS * _COLUMN_GROUPS
            score = k.mul(product, k.constant(c.scale))
            if c.softcap:
                score = k.mul(k.tanh(k.div(score, k.constant(c.softcap))), k.constant(c.softcap))
            if self.bias is not None:
                row, at = (self.start + line).minimum(self.n.rows - 1), (place + key).minimum(self.last)
                score = self.bias.added(score, row, at)
            seen = self.window.sees(line, place + key)
            k.store(k.select(seen, score, k.constant(float("-inf"))), self.scores, line * (_KEYS + 1) + key)
        k.barrier()

    def _softmax(self, top: ir.Value, total: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Scores to weights; the next maximum and sum of this thread's row."""
        k, each = self.k, _KEYS // _SHARE
        places = [self.own * (_KEYS + 1) + self.share * each + i for i in range(each)]
        scores = [k.load(self.scores, place) for place in places]
        highest = scores[0]
        for score in scores[1:]:
            highest = k.maximum(highest, score)
        mine = self.own * _SHARE + self.share
        k.store(highest, self.tops, mine)
        k.barrier()
        new = top
        for other in range(_SHARE):
            new = k.maximum(new, k.load(self.tops, self.own * _SHARE + other))
        part = k.constant(0.0)
        for place, score in zip(places, scores, strict=True):
            weight = k.exp(k.sub(score, new))
            part = k.add(part, weight)
            k.store(weight, self.scores, place)
        shrink = k.exp(k.sub(top, new))
        k.store(part, self.sums, mine)
        k.when(self.share.equals(0), lambda: k.store(shrink, self.factors, self.own))
        k.barrier()
        total = k.mul(total, shrink)
        for other in range(_SHARE):
            total = k.add(total, k.load(self.sums, self.own * _SHARE + other))
        return new, total

    # ---- values ----------------------------------------------------------------------------------------------------
    def _mix(self, place: Scalar, mixed: list[ir.Value]) -> list[ir.Value]:
        """Add the weighted values of a tile to this thread's part of the outputs."""
        k, c = self.k, self.c
        rows = self._out_rows()
        shrink = [k.splat(k.load(self.factors, row), WIDTH) for row in rows]
        held = [k.mul(value, shrink[index // self.loads]) for index, value in enumerate(mixed)]

        def all_keys(guarded: bool) -> list[ir.Value]:
            def step(key: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
                sums = list(carried)
                at = [(place + key + u).minimum(self.last) + self.head * c.keys for u in range(_UNROLL)]
                values = [
                    [
                        k.load(self.values, row * (c.dv // WIDTH) + (self.out_column + i * self.groups))
                        for i in range(self.loads)
                    ]
                    for row in at
                ]
                for u, stored in enumerate(values):
                    wide = [k.widen(self.values, value) for value in stored]
                    for r, row in enumerate(rows):
                        weight = k.load(self.scores, row * (_KEYS + 1) + key + u)
                        factor = k.splat(weight, WIDTH)
                        for i, value in enumerate(wide):
                            one = r * self.loads + i
                            added = k.fma(factor, value, sums[one])
                            if guarded:
                                added = k.select(Scalar(weight).equals(0.0), sums[one], added)
                            sums[one] = added
                return sums

            return k.loop(Scalar.constant(0, "index"), Scalar.constant(_KEYS, "index"), _UNROLL, held, step)

        if self.bias is not None:
            return all_keys(guarded=True)
        # A hidden key weighs 0, and 0 times NaN or inf is NaN: they are left out where not all rows see all keys.
        types = [value.type for value in held]
        return k.choose(
            self.window.all_seen(place), lambda: all_keys(guarded=False), lambda: all_keys(guarded=True), types
        )
