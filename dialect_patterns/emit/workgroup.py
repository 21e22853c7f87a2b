"""Passes over a row of numbers by the threads of a workgroup, each with a vector at a time; on a CPU it is one thread.

All numbers are f32. What is asked of a whole row comes back the same to every thread, so that all of them take the same
way and meet at the same barriers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from iree.compiler import ir
from iree.compiler.dialects import arith, scf

from ..target import Target
from .builder import Builder
from .scalar import Scalar
from .simt_kernel import Buffer, Group, Kernel

Kind = Literal["add", "max", "min"]
NEUTRAL: dict[Kind, float] = {"add": 0.0, "max": float("-inf"), "min": float("inf")}
_WIDTH, _MOST_WIDTH = 4, 16
_MAX_THREADS, _MAX_THREADS_BY_MEMORY = 1024, 256
_PARTS = 16
"""Without subgroup operations: sums that so many threads make of the others' values."""

_MOST_VALUES = 4
"""Values that are reduced at once."""

_LEAST_EXPONENT = -87.3
"""Below it f32 has no normal number for the exponential."""


@dataclass(frozen=True)
class RowShape:
    """How a row is gone through.

    Attributes:
        width: Numbers of a strip, which a thread takes at once.
        strips: Strips of a row, the last one filled up.
        threads: Threads of a workgroup.
        subgroup: Threads of a subgroup, 0 where there are none.
    """

    width: int
    strips: int
    threads: int
    subgroup: int

    @property
    def group(self) -> Group:
        """The workgroup."""
        return Group(self.threads, self.subgroup)

    def filled(self, b: Builder, rows: ir.Value) -> ir.Value:
        """Rows of whole strips, [B, V]: what is not there is less than any number."""
        return b.pad_end(rows, 1, self.strips * self.width, float("-inf"))


def row_shape(size: int, target: Target) -> RowShape:
    """For rows of so many numbers."""
    if not target.is_gpu:
        width = min(max(target.vector_bits // 32, _WIDTH), _MOST_WIDTH)
        return RowShape(width, -(-size // width), 1, 0)
    strips, threads = -(-size // _WIDTH), target.subgroup_size or _PARTS
    limit = min(_MAX_THREADS if target.subgroup_size else _MAX_THREADS_BY_MEMORY, target.max_threads)
    while 2 * threads <= limit and threads < strips:
        threads *= 2
    return RowShape(_WIDTH, strips, threads, target.subgroup_size)


def store_i64(k: Kernel, value: Scalar, pairs: Buffer, at: Scalar) -> None:
    """An i32 as two of them that are its i64, which not every GPU has: see :func:`load_i64`."""
    high = (value < 0).select(Scalar.constant(-1, "i32"), Scalar.constant(0, "i32"))
    k.store_as_is(value.value, pairs, at * 2)
    k.store_as_is(high.value, pairs, at * 2 + 1)


def load_i64(pairs: ir.Value, count: int) -> ir.Value:
    """Pairs of i32, [count, 2], as i64."""
    kind = ir.RankedTensorType.get([count], ir.IntegerType.get_signless(64))
    sizes = {"operandSegmentSizes": ir.DenseI32ArrayAttr.get([1, 0, 0])}
    return ir.Operation.create("flow.tensor.bitcast", results=[kind], operands=[pairs], attributes=sizes).result


class Workgroup:
    """Emits what threads do with vectors.

    Args:
        k: The kernel.
        width: Numbers of a vector.
        alone: Of one subgroup, which meets no other: its threads are their numbers in it.
    """

    def __init__(self, k: Kernel, width: int, *, alone: bool = False) -> None:
        self.k, self.width, self.threads = k, width, k.group.subgroup if alone else k.group.threads
        self.is_one = self.threads == 1
        self.thread = Scalar.constant(0, "index") if self.is_one else k.thread()
        if alone:
            self.thread = self.thread & (self.threads - 1)
        elif not self.is_one:
            slots = self.threads // k.group.subgroup if k.group.subgroup else self.threads + _PARTS
            self._memory = k.shared(slots * _MOST_VALUES)
            self._slots = slots

    # ---- vectors ---------------------------------------------------------------------------------------------------
    def all(self, value: ir.Value | float) -> ir.Value:
        """A number in all elements of a vector."""
        value = self.k.constant(value) if isinstance(value, float | int) else value
        return value if str(value.type).startswith("vector") else self.k.splat(value, self.width)

    def compare(self, a: ir.Value, predicate: str, b: ir.Value) -> ir.Value:
        """A mask: ``OGT``, ``OGE``, ``OLT``, ``OEQ``; false where there is a NaN."""
        if str(a.type) != str(b.type):
            a, b = self.all(a), self.all(b)
        return arith.CmpFOp(getattr(arith.CmpFPredicate, predicate), a, b).result

    def where(self, mask: ir.Value, a: ir.Value | float, b: ir.Value | float) -> ir.Value:
        """``a`` where the mask is set, else ``b``."""
        is_vector = str(mask.type).startswith("vector")
        values = [self.k.constant(v) if isinstance(v, float | int) else v for v in (a, b)]
        return arith.SelectOp(mask, *(self.all(v) if is_vector else v for v in values)).result

    def is_nan(self, a: ir.Value) -> ir.Value:
        """A mask, by the bits: a driver may take it that there are no such numbers."""
        kind = self.k.type(self.width if str(a.type).startswith("vector") else 1, "i32")
        bits = arith.BitcastOp(kind, a).result
        magnitude, infinity = (Scalar.constant(value, "i32").value for value in (0x7FFFFFFF, 0x7F800000))
        if str(kind).startswith("vector"):
            magnitude, infinity = self.all(magnitude), self.all(infinity)
        return arith.CmpIOp(arith.CmpIPredicate.sgt, arith.AndIOp(bits, magnitude).result, infinity).result

    def both(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Both masks."""
        return arith.AndIOp(a, b).result

    def either(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """One of two masks."""
        return arith.OrIOp(a, b).result

    def join(self, kind: Kind, a: ir.Value, b: ir.Value) -> ir.Value:
        """Two values, or two vectors of them, as one."""
        if kind == "add":
            return self.k.add(a, b)
        return self.where(self.compare(a, "OGT" if kind == "max" else "OLT", b), a, b)

    def exp(self, a: ir.Value) -> ir.Value:
        """The exponential, 0 where f32 has no normal number for it."""
        small, least = self.compare(a, "OLT", self.k.constant(_LEAST_EXPONENT)), self.k.constant(_LEAST_EXPONENT)
        return self.where(small, 0.0, self.k.exp(self.where(small, least, a)))

    def across(self, kind: Kind, vector: ir.Value) -> ir.Value:
        """The elements of a vector as one."""
        found = self.k.elements(vector)
        while len(found) > 1:
            found = [self.join(kind, found[i], found[i + 1]) for i in range(0, len(found), 2)]
        return found[0]

    def ids(self, strip: Scalar) -> ir.Value:
        """The places of the elements of a strip."""
        first = self.number(strip * self.width)
        if self.width == 1:
            return first
        return self.k.add(self.all(first), self.k.join([self.k.constant(float(i)) for i in range(self.width)]))

    def number(self, index: Scalar) -> ir.Value:
        """An index as f32."""
        return index.to("i32", unsigned=True).to("f32").value

    # ---- all threads -----------------------------------------------------------------------------------------------
    def together(self, kinds: Sequence[Kind], vectors: Sequence[ir.Value]) -> list[ir.Value]:
        """Each value over the elements of all threads' vectors, or over their numbers."""
        pairs = list(zip(kinds, vectors, strict=True))
        values = [self.across(kind, v) if str(v.type).startswith("vector") else v for kind, v in pairs]
        if self.is_one:
            return values
        assert len(values) <= _MOST_VALUES
        return self._by_subgroups(kinds, values) if self.k.group.subgroup else self._by_memory(kinds, values)

    def _shuffled(self, kinds: Sequence[Kind], values: Sequence[ir.Value], lanes: int) -> list[ir.Value]:
        found, offset = list(values), 1
        while offset < lanes:
            found = [self.join(kind, v, self.k.shuffle_xor(v, offset)) for kind, v in zip(kinds, found, strict=True)]
            offset *= 2
        return found

    def _by_subgroups(self, kinds: Sequence[Kind], values: Sequence[ir.Value]) -> list[ir.Value]:
        k, subgroup = self.k, self.k.group.subgroup
        values = self._shuffled(kinds, values, subgroup)
        count = self.threads // subgroup
        if count == 1:
            return values
        place, lane = self.thread.divide_unsigned(subgroup)
        k.barrier()  # for whoever still reads what was there

        def write() -> None:
            for i, value in enumerate(values):
                k.store(value, self._memory, place + i * self._slots)

        k.when(lane.equals(0), write)
        k.barrier()
        lanes = min(count, subgroup)
        own = lane & (lanes - 1)
        found: list[ir.Value] = []
        for i, kind in enumerate(kinds):
            value = k.load(self._memory, own + i * self._slots)
            for start in range(lanes, count, lanes):
                value = self.join(kind, value, k.load(self._memory, own + (i * self._slots + start)))
            found.append(value)
        return self._shuffled(kinds, found, lanes)

    def _by_memory(self, kinds: Sequence[Kind], values: Sequence[ir.Value]) -> list[ir.Value]:
        """By way of the workgroup's memory alone: a few threads join shares, all of them the few."""
        k, thread, index = self.k, self.thread, Scalar.constant
        k.barrier()
        for i, value in enumerate(values):
            k.store(value, self._memory, thread + i * self._slots)
        k.barrier()
        part = thread & (_PARTS - 1)
        shares = self._from_memory(kinds, part, index(self.threads, "index"), _PARTS)

        def write() -> None:
            for i, value in enumerate(shares):
                k.store(value, self._memory, thread + (i * self._slots + self.threads))

        k.when(thread < _PARTS, write)
        k.barrier()
        return self._from_memory(kinds, index(self.threads, "index"), index(self.threads + _PARTS, "index"), 1)

    def _from_memory(self, kinds: Sequence[Kind], start: Scalar, stop: Scalar, step: int) -> list[ir.Value]:
        """Values joined over places of the workgroup's memory; a loop, since this is done in a dozen places."""

        def body(at: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            found = [self.k.load(self._memory, at + i * self._slots) for i in range(len(kinds))]
            return [self.join(kind, old, new) for kind, old, new in zip(kinds, carried, found, strict=True)]

        return self.k.loop(start, stop, step, [self.k.constant(NEUTRAL[kind]) for kind in kinds], body)

    def over(
        self, kinds: Sequence[Kind], start: Scalar, stop: Scalar, body: Callable[[Scalar], Sequence[ir.Value]]
    ) -> list[ir.Value]:
        """Values joined over strips from ``start`` to before ``stop``, of which each thread takes every so many.

        Args:
            kinds: How values are joined, one for each.
            start: The first strip.
            stop: Where strips end.
            body: Given a strip, a vector for each value.
        """

        def look(strip: Scalar, count: ir.Value) -> tuple[Sequence[ir.Value], ir.Value]:
            return body(strip), count

        return self.over_own(kinds, start + self.thread, stop, self.threads, look)[0]

    def over_own(
        self,
        kinds: Sequence[Kind],
        start: Scalar,
        stop: Scalar,
        step: int,
        body: Callable[[Scalar, ir.Value], tuple[Sequence[ir.Value], ir.Value]],
    ) -> tuple[list[ir.Value], ir.Value]:
        """Values joined over what each thread goes through, and a number that each counts from 0.

        Args:
            kinds: How values are joined, one for each.
            start: The first that this thread goes through.
            stop: Where it ends.
            step: From one to the next.
            body: Given one and the number, a vector for each value and the next number.
        """
        values, count = self.of_own(kinds, start, stop, step, body)
        return self.together(kinds, values), count

    def of_own(
        self,
        kinds: Sequence[Kind],
        start: Scalar,
        stop: Scalar,
        step: int,
        body: Callable[[Scalar, ir.Value], tuple[Sequence[ir.Value], ir.Value]],
    ) -> tuple[list[ir.Value], ir.Value]:
        """What `over_own` joins, before it is joined over threads and the elements of vectors."""
        sums = [i for i, kind in enumerate(kinds) if kind == "add" and self.is_one]

        def look(at: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            count, *rest = carried
            found, count = body(at, count)
            values = [self.join(kind, new, old) for kind, new, old in zip(kinds, found, rest, strict=False)]
            for i, lost in zip(sums, rest[len(kinds) :], strict=True):
                values[i], left = self._exactly(rest[i], found[i], lost)
                values.append(left)
            return [count, *values]

        initial = [self.all(NEUTRAL[kind]) for kind in kinds] + [self.all(0.0)] * len(sums)
        count, *values = self.k.loop(start, stop, step, [Scalar.constant(0, "index").value, *initial], look)
        return values[: len(kinds)], count

    def _exactly(self, total: ir.Value, value: ir.Value, lost: ir.Value) -> tuple[ir.Value, ir.Value]:
        """A sum and what its rounding has lost (Kahan 1965): one thread adds up thousands of probabilities."""
        k = self.k
        value = k.sub(value, lost)
        following = k.add(total, value)
        return following, k.sub(k.sub(following, total), value)

    # ---- control flow ----------------------------------------------------------------------------------------------
    def repeat(
        self,
        initial: Sequence[ir.Value],
        condition: Callable[[list[ir.Value]], ir.Value],
        body: Callable[[list[ir.Value]], Sequence[ir.Value]],
    ) -> list[ir.Value]:
        """``scf.while``: the values at which the condition does not hold any more."""
        types = [value.type for value in initial]
        op = ir.Operation.create("scf.while", results=types, operands=list(initial), regions=2)
        places = [ir.Location.current] * len(types)
        before, after = (ir.Block.create_at_start(region, types, places) for region in op.regions)
        with ir.InsertionPoint(before):
            arguments = list(before.arguments)
            ir.Operation.create("scf.condition", operands=[condition(arguments), *arguments])
        with ir.InsertionPoint(after):
            scf.YieldOp(list(body(list(after.arguments))))
        return list(op.results)
