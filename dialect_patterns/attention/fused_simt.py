"""Attention of a few queries over a KV cache on GPUs: reads the filled rows only, once, in two kernels.

    part p: m = max s, l = sum exp(s - m), o = sum exp(s - m) v        s[r, j] = softcap(scale * q[r] . k[j])
    y[r]  = sum_p exp(m_p - M) o_p[r] / sum_p exp(m_p - M) l_p         M = max_p m_p

    %m, %o = flow.dispatch @attention_fused_simt_parts_...[%heads](%first, %q, %k, %v)
    %y     = flow.dispatch @attention_fused_simt_join_...[%rows](%m, %o)

The R rows of a key head (its query heads and their tokens) share each load of a key. ``L`` lanes of a subgroup hold a
key and sum its product by shuffles; the slots of a workgroup take turns with the keys and are joined in its memory, the
parts by the second kernel. The filled rows are dealt out evenly, so a short past costs no more than it must.

Legal: on GPUs with subgroup operations, for up to 8 rows a key head at one position, without a mask. Cost: the filled
rows of the cache once. Source: Flash-Decoding (Dao et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

from iree.compiler import ir

from ..emit.builder import Builder, Size, spec_of, tensor_type
from ..emit.scalar import Scalar
from ..emit.simt_kernel import MAX_GROUPS, Buffer, Group, Kernel, dispatch
from ..node import TensorSpec
from ..select import Legality, No, Yes
from ..target import Target
from .core import AttentionShape

_WIDTH = 4
_MAX_ROWS = 8
_THREADS = 128
_KEYS = 64  # of the capacity, for each part
_MAX_PARTS = 64
_AHEAD = 4  # keys whose loads are under way
LOWEST = -1e30
"""Below every score, and exp(-inf - it) is 0."""


@dataclass(frozen=True)
class Call:
    """What is to be computed.

    Attributes:
        batch: B.
        kv_heads: Hkv.
        group: Query heads of a key head.
        tokens: T.
        keys: Rows of the cache.
        dk: Size of a query or key head.
        dv: Size of a value head.
        dtype: Element type of queries and keys.
        value_dtype: Element type of values.
        scale: Factor on q . k.
        softcap: c in c * tanh(s / c), 0 for none.
        left: How many keys before its own position a query sees, None for all.
    """

    batch: int
    kv_heads: int
    group: int
    tokens: int
    keys: int
    dk: int
    dv: int
    dtype: str
    value_dtype: str
    scale: float
    softcap: float
    left: int | None

    @staticmethod
    def of(q: ir.Value, k: ir.Value, v: ir.Value, scale: float, softcap: float, left: int | None) -> Call:
        """The call for q [B, Hq, T, dk] and the cache k, v [B, Hkv, S, d], all sizes static."""
        batch, q_heads, tokens, dk = (size or 0 for size in spec_of(q).shape)
        kv_heads, keys, dv = (size or 0 for size in spec_of(v).shape[1:])
        types = spec_of(k).dtype, spec_of(v).dtype
        return Call(batch, kv_heads, q_heads // kv_heads, tokens, keys, dk, dv, *types, scale, softcap, left)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the outputs, [B, Hq, T, dv]."""
        return (self.batch, self.kv_heads * self.group, self.tokens, self.dv)

    @property
    def rows(self) -> int:
        """R, the queries of a key head."""
        return self.group * self.tokens

    @property
    def parts(self) -> int:
        """P, workgroups of a key head."""
        return max(1, min(_MAX_PARTS, self.keys // _KEYS))

    def lanes(self, target: Target) -> int:
        """L, threads that hold a key."""
        lanes = target.subgroup_size
        while lanes > 1 and (self.dk % (lanes * _WIDTH) or self.dv % (lanes * _WIDTH)):
            lanes //= 2
        return lanes

    def __str__(self) -> str:
        window = "" if self.left is None else f"_w{self.left}"
        factors = f"{self.scale.hex()}_{self.softcap.hex()}" if self.softcap else self.scale.hex()
        factors = factors.replace(".", "p").replace("-", "m").replace("+", "")
        types = self.dtype if self.dtype == self.value_dtype else f"{self.dtype}_{self.value_dtype}"
        sizes = f"{self.batch}x{self.kv_heads}x{self.group}x{self.tokens}_s{self.keys}_d{self.dk}x{self.dv}"
        return f"{types}_{sizes}{window}_{factors}"


def why_not_by_position(shape: AttentionShape) -> str:
    """Why the position alone does not tell which rows of a cache are seen, or how many there are; empty if it does."""
    if shape.masked:
        return "it has a mask"
    if not shape.causal:
        return "it is not causal at one position for all rows of the batch"
    return "open sizes" if None in (shape.length, shape.heads.batch, shape.keys) else ""


def is_legal(shape: AttentionShape, target: Target) -> Legality:
    """For a few static rows, where a subgroup can share a key."""
    heads, tokens = shape.heads, shape.length
    if not target.subgroup_size:
        return No(f"{target.name} is compiled for without subgroup operations")
    if reason := why_not_by_position(shape):
        return No(reason)
    assert tokens is not None
    assert heads.batch is not None
    if not 1 <= heads.group * tokens <= _MAX_ROWS:
        return No(f"{heads.group * tokens} queries a key head, not 1 to {_MAX_ROWS}")
    if heads.dk % _WIDTH or heads.dv % _WIDTH:
        return No(f"head sizes {heads.dk} and {heads.dv} are not multiples of {_WIDTH}")
    if heads.batch * heads.q * tokens > MAX_GROUPS:
        return No(f"more than {MAX_GROUPS} queries")
    if max(heads.dk, heads.dv) > 512:
        return No(f"a thread cannot hold its part of a head of {max(heads.dk, heads.dv)}")
    return Yes()


def emit_attention_fused_simt(
    b: Builder, target: Target, q: ir.Value, k: ir.Value, v: ir.Value, *,
    first: Size, scale: float, softcap: float, left: int | None,
) -> ir.Value:  # fmt: skip
    """[B, Hq, T, dv] from q [B, Hq, T, dk] and the cache k, v [B, Hkv, S, d]; query i sees the keys up to first + i."""
    c = Call.of(q, k, v, scale, softcap, left)
    q = b.cast(q, c.dtype)
    heads, lanes = c.batch * c.kv_heads, c.lanes(target)
    group = Group(max(_THREADS, target.subgroup_size), target.subgroup_size)
    stats = tensor_type([heads, c.parts, c.rows, 2], "f32")
    sums = tensor_type([heads, c.parts, c.rows, c.dv], "f32")
    numbers = [] if isinstance(first, int) else [first]

    def parts(kernel: Kernel) -> None:
        given = Scalar.constant(first, "index") if isinstance(first, int) else kernel.number(0)
        _Parts(kernel, c, lanes, given).emit()

    lead = f"at{first}_" if isinstance(first, int) else ""
    name = f"attention_fused_simt_parts_{lead}{c}_g{target.subgroup_size}"
    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [(stats, []), (sums, [])]
    found = dispatch(name, group, c.parts, b.index(heads), numbers, [q, k, v], outputs, parts)
    return emit_join(b, target, c, c.parts, found, TensorSpec(c.shape, c.dtype))


def emit_join(b: Builder, target: Target, c: Call, parts: int, found: list[ir.Value], result: TensorSpec) -> ir.Value:
    """The outputs from their parts.

    Args:
        b: The builder.
        target: To compile for.
        c: What is computed.
        parts: P.
        found: Maxima and sums [B * Hkv, P, R, 2] and weighted values [B * Hkv, P, R, dv], f32.
        result: Type of the outputs [B, Hq, T, dv].
    """
    heads, wide = c.batch * c.kv_heads, min(target.max_threads, c.dv // _WIDTH)
    name = f"attention_fused_simt_join_{result.dtype}_h{heads}_p{parts}_r{c.rows}_d{c.dv}"
    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [(tensor_type(result.shape, result.dtype), [])]

    def body(kernel: Kernel) -> None:
        _emit_join(kernel, c, parts, result.dtype)

    return dispatch(name, Group(wide, 0), 1, b.index(heads * c.rows), [], found, outputs, body)[0]


@dataclass
class _Parts:
    """Emits the kernel of one part: some keys of one key head."""

    k: Kernel
    c: Call
    lanes: int
    first: Scalar

    def emit(self) -> None:
        """Emit everything."""
        k, c = self.k, self.c
        heads, vectors = c.batch * c.kv_heads, c.dk // _WIDTH
        self.slots = k.group.threads // self.lanes

        def count(elements: int) -> Scalar:
            return Scalar.constant(elements, "index")

        self.query = k.buffer(0, c.dtype, count(heads * c.rows * vectors), _WIDTH)
        self.keys = k.buffer(1, c.dtype, count(heads * c.keys * vectors), _WIDTH)
        self.values = k.buffer(2, c.value_dtype, count(heads * c.keys * c.dv // _WIDTH), _WIDTH)
        self.stats = k.buffer(3, "f32", count(heads * c.parts * c.rows * 2))
        self.sums = k.buffer(4, "f32", count(heads * c.parts * c.rows * c.dv))
        self.head, self.part = k.item(), k.tile()
        self.slot, self.lane = k.thread().divide_unsigned(self.lanes)
        self._join(*self._run())

    def _vectors(self, buffer: Buffer, row: Scalar, size: int) -> list[ir.Value]:
        """This lane's part of a row."""
        loads = size // _WIDTH // self.lanes
        return [self.k.load(buffer, row * (size // _WIDTH) + (self.lane + i * self.lanes)) for i in range(loads)]

    def _run(self) -> tuple[list[ir.Value], list[ir.Value], list[list[ir.Value]]]:
        """Maximum, sum and weighted values over this slot's keys, for each row."""
        k, c = self.k, self.c
        queries = [
            [k.widen(self.query, x) for x in self._vectors(self.query, self.head * c.rows + r, c.dk)]
            for r in range(c.rows)
        ]
        end = self.first + c.tokens
        start = Scalar.constant(0, "index") if c.left is None else (self.first - c.left).maximum(0)
        turns = c.parts * self.slots
        each = (end - start + (turns - 1)).divide_unsigned(turns)[0]  # keys of a slot
        base = start + (self.part * self.slots + self.slot) * each
        stop = (base + each).minimum(end)
        loads, last = c.dv // _WIDTH // self.lanes, end - 1

        def step(index: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            most, total, mixed = carried[: c.rows], carried[c.rows : 2 * c.rows], carried[2 * c.rows :]
            places = [base + index + u for u in range(_AHEAD)]
            rows = [self.head * c.keys + place.minimum(last) for place in places]
            keys = [self._vectors(self.keys, row, c.dk) for row in rows]
            values = [self._vectors(self.values, row, c.dv) for row in rows]
            wide = [[k.widen(self.keys, x) for x in key] for key in keys]
            scores = [[self._score(query, key) for key in wide] for query in queries]
            held = [[k.widen(self.values, x) for x in value] for value in values]
            result: list[ir.Value] = []
            for r in range(c.rows):
                seen = [self._seen(r, place, stop, s) for place, s in zip(places, scores[r], strict=True)]
                highest = most[r]
                for score in seen:
                    highest = k.maximum(highest, score)
                shrink = k.exp(k.sub(most[r], highest))
                weights = [k.exp(k.sub(score, highest)) for score in seen]
                total[r] = k.mul(total[r], shrink)
                for weight in weights:
                    total[r] = k.add(total[r], weight)
                most[r] = highest
                summed = [k.mul(value, k.splat(shrink, _WIDTH)) for value in mixed[r * loads : (r + 1) * loads]]
                result += self._mix(r, places, stop, weights, held, summed)
            return [*most, *total, *result]

        initial = [k.constant(LOWEST)] * c.rows + [k.constant(0.0)] * c.rows
        initial += [k.constant(0.0, _WIDTH)] * (c.rows * loads)
        found = k.loop(Scalar.constant(0, "index"), each, _AHEAD, initial, step)
        mixed = found[2 * c.rows :]
        return found[: c.rows], found[c.rows : 2 * c.rows], [mixed[r * loads : (r + 1) * loads] for r in range(c.rows)]

    def _mix(
        self, row: int, places: list[Scalar], stop: Scalar, weights: list[ir.Value], held: list[list[ir.Value]],
        sums: list[ir.Value],
    ) -> list[ir.Value]:  # fmt: skip
        """The sums of a row and its weighted values; hidden ones weigh 0, which NaN and inf are left out for."""
        k, c = self.k, self.c

        def added(guarded: bool) -> list[ir.Value]:
            found = list(sums)
            for place, weight, value in zip(places, weights, held, strict=True):
                for i, part in enumerate(value):
                    one = k.fma(k.splat(weight, _WIDTH), part, found[i])
                    found[i] = k.select(self._sees(row, place, stop), one, found[i]) if guarded else one
            return found

        if c.tokens == 1:  # all keys that are read are seen
            return added(guarded=False)
        first, last = places[0], places[-1]
        alike = (last < stop) & (last <= self.first)
        if c.left is not None:
            alike = alike & (self.first + (c.tokens - 1 - c.left) <= first)
        return k.choose(alike, lambda: added(guarded=False), lambda: added(guarded=True), [s.type for s in sums])

    def _score(self, query: list[ir.Value], key: list[ir.Value]) -> ir.Value:
        k = self.k
        part = k.mul(query[0], key[0])
        for a, b in zip(query[1:], key[1:], strict=True):
            part = k.fma(a, b, part)
        a, b, c, d = k.elements(part)
        total, offset = k.add(k.add(a, b), k.add(c, d)), 1
        while offset < self.lanes:
            total = k.add(total, k.shuffle_xor(total, offset))
            offset *= 2
        total = k.mul(total, k.constant(self.c.scale))
        if self.c.softcap:
            total = k.mul(k.tanh(k.div(total, k.constant(self.c.softcap))), k.constant(self.c.softcap))
        return total

    def _seen(self, row: int, place: Scalar, stop: Scalar, score: ir.Value) -> ir.Value:
        """The score, or -inf for a key of another slot or one that the row does not see."""
        return self.k.select(self._sees(row, place, stop), score, self.k.constant(float("-inf")))

    def _sees(self, row: int, place: Scalar, stop: Scalar) -> Scalar:
        """Whether a key is this slot's and the row sees it."""
        c, own = self.c, self.first + row % self.c.tokens
        seen = place < stop
        if c.tokens > 1:
            seen = seen & (place <= own)
            if c.left is not None:
                seen = seen & (own - c.left <= place)
        return seen

    def _join(self, most: list[ir.Value], total: list[ir.Value], mixed: list[list[ir.Value]]) -> None:
        """Join the slots in the workgroup's memory and write the part, one row after the other."""
        k, c = self.k, self.c
        threads, slots, lanes = k.group.threads, self.slots, self.lanes
        scratch, held = k.shared(slots * c.dv), k.shared(2 * slots * c.rows)

        def put() -> None:
            for r in range(c.rows):
                k.store(most[r], held, self.slot * (2 * c.rows) + 2 * r)
                k.store(total[r], held, self.slot * (2 * c.rows) + (2 * r + 1))

        k.when(self.lane.equals(0), put)
        k.barrier()
        for r in range(c.rows):
            tops = [k.load(held, Scalar.constant(s * 2 * c.rows + 2 * r, "index")) for s in range(slots)]
            sums = [k.load(held, Scalar.constant(s * 2 * c.rows + 2 * r + 1, "index")) for s in range(slots)]
            top = tops[0]
            for other in tops[1:]:
                top = k.maximum(top, other)
            whole = k.constant(0.0)
            for one, other in zip(sums, tops, strict=True):
                whole = k.fma(one, k.exp(k.sub(other, top)), whole)
            own = k.splat(k.exp(k.sub(most[r], top)), _WIDTH)
            for i, value in enumerate(mixed[r]):
                start = self.slot * c.dv + (self.lane + i * lanes) * _WIDTH
                for e, element in enumerate(k.elements(k.mul(value, own))):
                    k.store(element, scratch, start + e)
            k.barrier()
            row = (self.head * c.parts + self.part) * c.rows + r
            for start in range(0, c.dv, threads):
                column = k.thread() + start

                def write(column: Scalar = column, row: Scalar = row) -> None:
                    value = k.load(scratch, column)
                    for s in range(1, slots):
                        value = k.add(value, k.load(scratch, column + s * c.dv))
                    k.store(value, self.sums, row * c.dv + column)

                k.when(column < c.dv, write)

            def write_stats(row: Scalar = row, top: ir.Value = top, whole: ir.Value = whole) -> None:
                k.store(top, self.stats, row * 2)
                k.store(whole, self.stats, row * 2 + 1)

            k.when(k.thread().equals(0), write_stats)
            if r + 1 < c.rows:
                k.barrier()


def _emit_join(k: Kernel, c: Call, parts: int, dtype: str) -> None:
    """Join the parts of one row."""
    heads, vectors = c.batch * c.kv_heads, c.dv // _WIDTH
    stats = k.buffer(0, "f32", Scalar.constant(heads * parts * c.rows * 2, "index"))
    sums = k.buffer(1, "f32", Scalar.constant(heads * parts * c.rows * vectors, "index"), _WIDTH)
    output = k.buffer(2, dtype, Scalar.constant(heads * c.rows * vectors, "index"), _WIDTH)
    head, row = k.item().divide_unsigned(c.rows)

    def place(part: Scalar) -> Scalar:
        return (head * parts + part) * c.rows + row

    start, stop = Scalar.constant(0, "index"), Scalar.constant(parts, "index")

    def highest(part: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
        return [k.maximum(carried[0], k.load(stats, place(part) * 2))]

    (top,) = k.loop(start, stop, 1, [k.constant(LOWEST)], highest)
    for first in range(0, vectors, k.group.threads):
        column = (k.thread() + first).minimum(vectors - 1)

        def add(part: Scalar, carried: list[ir.Value], column: Scalar = column) -> list[ir.Value]:
            own = k.exp(k.sub(k.load(stats, place(part) * 2), top))
            value = k.load(sums, place(part) * vectors + column)
            return [
                k.fma(k.load(stats, place(part) * 2 + 1), own, carried[0]),
                k.fma(value, k.splat(own, _WIDTH), carried[1]),
            ]

        whole, mixed = k.loop(start, stop, 1, [k.constant(0.0), k.constant(0.0, _WIDTH)], add)
        result = k.div(mixed, k.splat(k.maximum(whole, k.constant(1e-30)), _WIDTH))
        k.store(result, output, (head * c.rows + row) * vectors + column)
