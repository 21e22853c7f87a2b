"""Few logits that may be drawn, as a list that one subgroup goes through: it meets nobody at barriers.

Top-k leaves some dozens of strips of the row. Each round of the searches for the bounds and the token was two barriers
of all threads and a way to memory and back, one to two us on an H100, where one subgroup adds up the same by shuffles:
32,000 logits 57 us, then 32 by Vulkan and 55, then 39 by CUDA; 248,320 143, then 86 and 165, then 108.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from iree.compiler import ir

from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer
from ..emit.workgroup import Workgroup
from .search import Search

MOST_STRIPS = 256
"""Of a list; 5 KiB of the workgroup's memory."""


@dataclass(frozen=True)
class List:
    """Its memory, of the workgroup.

    Attributes:
        strips: Logits.
        numbers: Which strips of the row they are.
        sums: How many strips each subgroup lists.
    """

    strips: Buffer
    numbers: Buffer
    sums: Buffer

    @staticmethod
    def of(w: Workgroup) -> List:
        """Memory for a list of the threads of a workgroup with more than one subgroup."""
        k = w.k
        return List(k.shared_chunks(MOST_STRIPS), k.shared(MOST_STRIPS), k.shared(w.threads // k.group.subgroup))


class Listed(Search):
    """What is left of a row, searched by one subgroup.

    Args:
        whole: The search by all threads, all of which come here.
        given: Memory.
        least: The least logit that may be drawn; a strip without such a one is not listed.
        count: How many strips of this thread have one.
        strips: How many of all threads, at most ``MOST_STRIPS``.
    """

    def __init__(self, whole: Search, given: List, least: ir.Value, count: Scalar, strips: Scalar) -> None:
        w = Workgroup(whole.k, whole.w.width, alone=True)
        super().__init__(whole.row, w, given.strips, w.thread)
        self.numbers, lanes = given.numbers, w.threads
        self._fill(whole, least, _places_before(whole, given.sums, count))
        self.own = (strips + (lanes - 1) - w.thread).divide_unsigned(lanes)[0]
        """How many are this lane's."""

    def _fill(self, whole: Search, least: ir.Value, place: Scalar) -> None:
        """Every thread's strips, from its place on."""
        k, w = self.k, whole.w

        def look(strip: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            x, at = whole.load(strip), Scalar(carried[0])
            wanted = Scalar(w.compare(w.across("max", x), "OGE", least))

            def put() -> None:
                k.store_as_is(x, self.kept, at)
                k.store(w.number(strip), self.numbers, at)

            k.when(wanted, put)
            return [wanted.select(at + 1, at).value]

        k.loop(w.thread, whole.stop, w.threads, [place.value], look)
        k.barrier()

    def keep(self, x: ir.Value, bound: ir.Value, count: ir.Value) -> ir.Value:
        """Nothing leaves the list."""
        del x, bound
        return (Scalar(count) + 1).value

    def part(self, measure: Callable[[Scalar, ir.Value], ir.Value], low: Scalar, high: Scalar) -> ir.Value:
        """What the listed strips from ``low`` to before ``high`` count."""
        k, none = self.k, self.k.constant(0.0, self.w.width)

        def look(at: Scalar, left: ir.Value) -> tuple[list[ir.Value], ir.Value]:
            strip, x = self._listed(at)
            return [k.select((low <= strip) & (strip < high), measure(strip, x), none)], left

        return self.w.over_own(["add"], self.first, self.own, 1, look)[0][0]

    def last(self, measure: Callable[[Scalar, ir.Value], ir.Value]) -> list[ir.Value]:
        """The last id that counts."""
        k, w = self.k, self.w

        def look(at: Scalar, left: ir.Value) -> tuple[list[ir.Value], ir.Value]:
            strip, x = self._listed(at)
            return [w.where(w.compare(measure(strip, x), "OGT", k.constant(0.0)), w.ids(strip), 0.0)], left

        return w.over_own(["max"], self.first, self.own, 1, look)[0]

    def _listed(self, at: Scalar) -> tuple[Scalar, ir.Value]:
        """A strip of this lane, and its logits."""
        place = at * self.w.threads + self.kept_start
        return Scalar(self.k.load(self.numbers, place)).to("i32").to("index"), self.k.load(self.kept, place)


def _places_before(whole: Search, sums: Buffer, count: Scalar) -> Scalar:
    """How many strips the threads before this one have."""
    k, w = whole.k, whole.w
    subgroup = k.group.subgroup
    place, lane = w.thread.divide_unsigned(subgroup)
    total, before, offset = w.number(count), k.constant(0.0), 1
    while offset < subgroup:
        other = k.shuffle_xor(total, offset)
        before = k.select((lane & offset).equals(0), before, k.add(before, other))
        total = k.add(total, other)
        offset *= 2
    k.when(lane.equals(0), lambda: k.store(total, sums, place))
    k.barrier()
    start = Scalar.constant(0, "index")
    (others,) = k.loop(start, place, 1, [before], lambda at, found: [k.add(found[0], k.load(sums, at))])
    return Scalar(others).to("i32").to("index")
