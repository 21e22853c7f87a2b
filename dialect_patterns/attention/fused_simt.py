"""Attention of a few queries over a KV cache on GPUs: reads the filled rows only, once, in two kernels.

    part p: m = max s, l = sum exp(s - m), o = sum exp(s - m) v        s[r, j] = softcap(scale * q[r] . k[j])
    y[r]  = sum_p exp(m_p - M) o_p[r] / sum_p exp(m_p - M) l_p         M = max_p m_p

    %m, %o = flow.dispatch @attention_fused_simt_parts_...[%heads](%first, %q, %k, %v, %bias?)
    %y     = flow.dispatch @attention_fused_simt_join_...[%rows](%m, %o)

The R rows of a key head (its query heads and their tokens) share each load of a key. ``L`` lanes of a subgroup hold a
key and sum its product by shuffles; the slots of a workgroup take turns with the keys and are joined in its memory, the
parts by the second kernel. The filled rows are dealt out evenly, so a short past costs no more than it must. A mask is
read as what it adds.

Legal: on GPUs with subgroup operations, for up to 8 rows a key head at one position. Cost: the filled
rows of the cache once. Source: Flash-Decoding (Dao et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

from iree.compiler import ir

from ..emit.builder import Builder, Size, tensor_type
from ..emit.scalar import Scalar
from ..emit.simt_kernel import MAX_GROUPS, Buffer, Group, Kernel, dispatch
from ..node import TensorSpec
from ..select import Legality, No, OtherMachine, Yes
from ..target import Target
from .core import AttentionShape
from .simt_bias import Bias
from .simt_call import WIDTH, Call, Sizes, why_not_by_position
from .simt_join import LOWEST, Gate, emit_join

_MAX_ROWS = 8
_THREADS = 128
_AHEAD = 4
"""Keys whose loads are under way."""
_SHORT = 8192
"""Keys of a cache up to which one is enough where a kernel's code is not in the caches when a step comes to it.

Vulkan on an H100, f16, 1,000 / 4,096 / 32,700 filled rows: 12.4 / 15.0 / 56.8 us, with four 18.1 / 20.1 / 47.6; CUDA,
where the code is there, 6.5 / 14.0 / 79.3 and 5.2 / 8.7 / 35.5.
"""
_JOINED_BYTES = 1 << 14  # of a workgroup's memory at most, with as few as this beside it
_SPARE_BYTES = 1 << 10


def is_legal(shape: AttentionShape, target: Target) -> Legality:
    """For a few static rows, where a subgroup can share a key."""
    heads, tokens = shape.heads, shape.length
    if not target.is_gpu:
        return OtherMachine(f"{target.name} is not a GPU")
    if not target.subgroup_size:
        return No(f"{target.name} is compiled for without subgroup operations")
    if reason := why_not_by_position(shape):
        return No(reason)
    assert tokens is not None
    assert heads.batch is not None
    if not 1 <= heads.group * tokens <= _MAX_ROWS:
        return No(f"{heads.group * tokens} queries a key head, not 1 to {_MAX_ROWS}")
    if heads.dk % WIDTH or heads.dv % WIDTH:
        return No(f"head sizes {heads.dk} and {heads.dv} are not multiples of {WIDTH}")
    if heads.batch * heads.q * tokens > MAX_GROUPS:
        return No(f"more than {MAX_GROUPS} queries")
    if max(heads.dk, heads.dv) > 512:
        return No(f"a thread cannot hold its part of a head of {max(heads.dk, heads.dv)}")
    return Yes()


def emit_attention_fused_simt(
    b: Builder, target: Target, q: ir.Value, k: ir.Value, v: ir.Value, *,
    first: Size, scale: float, softcap: float, left: int | None, sink: ir.Value | None,
    bias: ir.Value | None, gate: tuple[Gate, ir.Value] | None = None,
) -> ir.Value:  # fmt: skip
    """[B, Hq, T, dv] from q [B, Hq, T, dk] and the cache k, v [B, Hkv, S, d]; query i sees the keys up to first + i."""
    c = Call.of(q, k, v, scale, softcap, left, bias)
    q = b.cast(q, c.dtype)
    heads, lanes = c.batch * c.kv_heads, c.lanes(target)
    group = Group(max(_THREADS, target.subgroup_size), target.subgroup_size)
    stats = tensor_type([heads, c.parts, c.rows, 2], "f32")
    sums = tensor_type([heads, c.parts, c.rows, c.dv], "f32")
    numbers = [] if isinstance(first, int) else [first]
    ahead = 1 if target.cold_code and c.keys <= _SHORT else _AHEAD

    def parts(kernel: Kernel) -> None:
        given = Scalar.constant(first, "index") if isinstance(first, int) else kernel.number(0)
        memory = min(target.workgroup_memory - _SPARE_BYTES, _JOINED_BYTES)
        _Parts(kernel, c, lanes, given, memory, ahead).emit()

    lead = f"at{first}_" if isinstance(first, int) else ""
    name = f"attention_fused_simt_parts_{lead}{c}_g{target.subgroup_size}"
    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [(stats, []), (sums, [])]
    inputs = [q, k, v] if bias is None else [q, k, v, bias]
    found = dispatch(name, group, c.parts, b.index(heads), numbers, inputs, outputs, parts)
    return emit_join(b, target, c, c.parts, found, sink, TensorSpec(c.shape, c.dtype), gate)


@dataclass
class _Parts:
    """Emits the kernel of one part: some keys of one key head."""

    k: Kernel
    c: Call
    lanes: int
    first: Scalar
    memory: int
    ahead: int

    def emit(self) -> None:
        """Emit everything."""
        k, c = self.k, self.c
        heads, vectors = c.batch * c.kv_heads, c.dk // WIDTH
        self.slots = k.group.threads // self.lanes

        def count(elements: int) -> Scalar:
            return Scalar.constant(elements, "index")

        self.query = k.buffer(0, c.dtype, count(heads * c.rows * vectors), WIDTH)
        self.keys = k.buffer(1, c.dtype, count(heads * c.keys * vectors), WIDTH)
        self.values = k.buffer(2, c.value_dtype, count(heads * c.keys * c.dv // WIDTH), WIDTH)
        self.head, self.part = k.item(), k.tile()
        sizes = Sizes(*(count(size) for size in (c.tokens, c.rows, c.parts)))
        self.bias = None if c.bias_dims is None else Bias(k, c, sizes, 3, self.head)
        outputs = 3 if self.bias is None else 4
        self.stats = k.buffer(outputs, "f32", count(heads * c.parts * c.rows * 2))
        self.sums = k.buffer(outputs + 1, "f32", count(heads * c.parts * c.rows * c.dv // WIDTH), WIDTH)
        self.slot, self.lane = k.thread().divide_unsigned(self.lanes)
        self._join(*self._run())

    def _vectors(self, buffer: Buffer, row: Scalar, size: int) -> list[ir.Value]:
        """This lane's part of a row."""
        loads = size // WIDTH // self.lanes
        return [self.k.load(buffer, row * (size // WIDTH) + (self.lane + i * self.lanes)) for i in range(loads)]

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
        loads, last = c.dv // WIDTH // self.lanes, end - 1

        def step(index: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            most, total, mixed = carried[: c.rows], carried[c.rows : 2 * c.rows], carried[2 * c.rows :]
            places = [base + index + u for u in range(self.ahead)]
            rows = [self.head * c.keys + place.minimum(last) for place in places]
            keys = [self._vectors(self.keys, row, c.dk) for row in rows]
            values = [self._vectors(self.values, row, c.dv) for row in rows]
            wide = [[k.widen(self.keys, x) for x in key] for key in keys]
            scores = [[self._score(query, key) for key in wide] for query in queries]
            held = [[k.widen(self.values, x) for x in value] for value in values]
            result: list[ir.Value] = []
            for r in range(c.rows):
                seen = [self._seen(r, place, stop, last, s) for place, s in zip(places, scores[r], strict=True)]
                highest = most[r]
                for score in seen:
                    highest = k.maximum(highest, score)
                shrink = k.exp(k.sub(most[r], highest))
                weights = [k.exp(k.sub(score, highest)) for score in seen]
                total[r] = k.mul(total[r], shrink)
                for weight in weights:
                    total[r] = k.add(total[r], weight)
                most[r] = highest
                summed = [k.mul(value, k.splat(shrink, WIDTH)) for value in mixed[r * loads : (r + 1) * loads]]
                result += self._mix(r, places, stop, weights, held, summed)
            return [*most, *total, *result]

        initial = [k.constant(LOWEST)] * c.rows + [k.constant(0.0)] * c.rows
        initial += [k.constant(0.0, WIDTH)] * (c.rows * loads)
        found = k.loop(Scalar.constant(0, "index"), each, self.ahead, initial, step)
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
            for weight, value in zip(weights, held, strict=True):
                for i, part in enumerate(value):
                    one = k.fma(k.splat(weight, WIDTH), part, found[i])
                    found[i] = k.select(Scalar(weight).equals(0.0), found[i], one) if guarded else one
            return found

        if c.bias_dims is None and c.tokens == 1:  # all keys that are read are seen
            return added(guarded=False)
        first, last = places[0], places[-1]
        if c.bias_dims is not None:
            alike = Scalar(weights[0]) > 0.0
            for weight in weights[1:]:
                alike = alike & (Scalar(weight) > 0.0)
        else:
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

    def _seen(self, row: int, place: Scalar, stop: Scalar, last: Scalar, score: ir.Value) -> ir.Value:
        """The score, or -inf for a key of another slot or one that the row does not see."""
        c, own = self.c, self.first + row % self.c.tokens
        seen = place < stop
        if c.tokens > 1:
            seen = seen & (place <= own)
            if c.left is not None:
                seen = seen & (own - c.left <= place)
        if self.bias is not None:
            score = self.bias.added(score, Scalar.constant(row, "index"), place.minimum(last))
        return self.k.select(seen, score, self.k.constant(float("-inf")))

    def _join(self, most: list[ir.Value], total: list[ir.Value], mixed: list[list[ir.Value]]) -> None:
        """Join the slots in the workgroup's memory and write the part, as many rows at once as there is room for."""
        k, c, slots = self.k, self.c, self.slots
        vectors = c.dv // WIDTH
        at_once = max(1, min(c.rows, self.memory // (slots * c.dv * 4)))
        scratch, held = k.shared_chunks(slots * at_once * vectors), k.shared(2 * slots * c.rows)

        def put() -> None:
            for r in range(c.rows):
                k.store(most[r], held, self.slot * (2 * c.rows) + 2 * r)
                k.store(total[r], held, self.slot * (2 * c.rows) + (2 * r + 1))

        k.when(self.lane.equals(0), put)
        k.barrier()
        for first in range(0, c.rows, at_once):
            rows = range(first, min(c.rows, first + at_once))
            row = (self.head * c.parts + self.part) * c.rows + first
            for r in rows:
                self._put_row(r, held, row + (r - first), most[r], mixed[r], scratch, (r - first) * slots * vectors)
            k.barrier()
            for start in range(0, len(rows) * vectors, k.group.threads):
                place = k.thread() + start

                def write(place: Scalar = place, row: Scalar = row) -> None:
                    line, column = place.divide_unsigned(vectors)
                    at = line * (slots * vectors) + column
                    value = k.load(scratch, at)
                    for s in range(1, slots):
                        value = k.add(value, k.load(scratch, at + s * vectors))
                    k.store(value, self.sums, (row + line) * vectors + column)

                k.when(place < len(rows) * vectors, write)
            if first + at_once < c.rows:
                k.barrier()

    def _put_row(
        self, r: int, held: Buffer, row: Scalar, most: ir.Value, mixed: list[ir.Value], scratch: Buffer, at: int
    ) -> None:
        """This slot's values of a row over the maximum of all slots; the row's maximum and sum to where they belong."""
        k, c, slots = self.k, self.c, self.slots
        tops, sums = (
            [k.load(held, Scalar.constant(s * 2 * c.rows + 2 * r + i, "index")) for s in range(slots)] for i in range(2)
        )
        top = tops[0]
        for other in tops[1:]:
            top = k.maximum(top, other)
        whole = k.constant(0.0)
        for one, other in zip(sums, tops, strict=True):
            whole = k.fma(one, k.exp(k.sub(other, top)), whole)
        own = k.splat(k.exp(k.sub(most, top)), WIDTH)
        for i, value in enumerate(mixed):
            start = self.slot * (c.dv // WIDTH) + (self.lane + i * self.lanes) + at
            k.store_as_is(k.mul(value, own), scratch, start)

        def write_stats() -> None:
            k.store(top, self.stats, row * 2)
            k.store(whole, self.stats, row * 2 + 1)

        k.when(k.thread().equals(0), write_stats)
