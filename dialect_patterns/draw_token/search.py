"""The bounds of top-k and top-p, and the token that a random number points at, in what may be drawn of a row.

A bound is the largest logit such that at least k logits, or as much of the probability as is wanted, are not below it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from iree.compiler import ir

from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer, Kernel
from ..emit.workgroup import RowShape, Workgroup
from .contract import FURTHEST

BEYOND = 3e38
"""More than any id."""

_LEAST_MASS = 1e-30
"""top_p 0 keeps one token."""


@dataclass
class Row:
    """A row and how it is drawn from.

    Attributes:
        k: The kernel.
        shape: How the row is gone through.
        logits: Those of all rows.
        number: Of the row.
        temperature: And so on: what the settings say.
        top_k: 0 for all.
        top_p: 1 for all.
        min_p: 0 for all.
        reach: See `draw` in the runtime's README.md.
        random: From 0 to 1.
        most: The largest logit, once it is known.
    """

    k: Kernel
    shape: RowShape
    logits: Buffer
    number: Scalar
    temperature: ir.Value
    top_k: ir.Value
    top_p: ir.Value
    min_p: ir.Value
    reach: ir.Value
    random: ir.Value
    most: ir.Value


class Search:
    """Looks for them.

    Args:
        row: Where.
        w: The threads that do.
        kept: The strips of the row that may be drawn, those of a thread ``w.threads`` apart.
        start: Where this thread's begin.
    """

    def __init__(self, row: Row, w: Workgroup, kept: Buffer, start: Scalar) -> None:
        self.row, self.k, self.w, self.kept, self.kept_start = row, row.k, w, kept, start
        self.first, self.stop = Scalar.constant(0, "index"), Scalar.constant(row.shape.strips, "index")

    def load(self, strip: Scalar) -> ir.Value:
        """Logits of the row."""
        return self.k.widen(
            self.row.logits, self.k.load(self.row.logits, self.row.number * self.row.shape.strips + strip)
        )

    def weight(self, x: ir.Value) -> ir.Value:
        """How likely a logit is, the largest one 1."""
        k, w = self.k, self.w
        most, temperature = self.row.most, self.row.temperature
        if str(x.type).startswith("vector"):
            most, temperature = w.all(most), w.all(temperature)
        return w.exp(k.div(k.sub(x, most), temperature))

    def token(self, total: ir.Value, least: ir.Value, count: ir.Value) -> ir.Value:
        """The token that the random number points at.

        Args:
            total: What all logits weigh.
            least: The least logit that may be drawn.
            count: Strips that this thread keeps.
        """
        k, w, one = self.k, self.w, self.k.constant(1.0)
        bound, wanted, count = self.bound(total, least, count)
        above, likely, equal = self.weigh(count, bound)
        own = self.weight(bound)
        needed = k.div(k.sub(wanted, above), own)
        has_p = w.compare(self.row.top_p, "OLT", one)
        needed = w.where(has_p, w.join("min", w.join("max", self.rounded_up(needed), one), equal), equal)
        likely = k.add(likely, w.where(w.compare(own, "OGE", self.row.min_p), k.mul(needed, own), 0.0))

        def find(turn: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            """The id of the last that equals the bound and is kept; then the token."""
            second, last = turn.to("i32").to("f32").value, carried[0]
            first = k.sub(one, second)

            def measure(strip: Scalar, x: ir.Value) -> ir.Value:
                value, equals = self.weight(x), w.compare(x, "OEQ", bound)
                inside = w.either(w.compare(x, "OGT", bound), w.both(equals, w.compare(last, "OGE", w.ids(strip))))
                kept = w.where(w.both(inside, w.compare(value, "OGE", self.row.min_p)), value, 0.0)
                return k.add(k.mul(kept, w.all(second)), w.where(equals, first, 0.0))

            is_second = w.compare(second, "OEQ", one)
            wanted = w.where(is_second, k.mul(likely, self.row.random), k.sub(needed, k.constant(0.5)))
            return [self.locate(measure, wanted)]

        is_cut = Scalar(w.compare(needed, "OLT", equal))
        turns = [Scalar.constant(turn, "index") for turn in range(3)]
        (token,) = k.loop(is_cut.select(turns[0], turns[1]), turns[2], 1, [k.constant(BEYOND)], find)
        return Scalar(token).to("i32").value

    def rounded_up(self, value: ir.Value) -> ir.Value:
        """The next whole number; numbers are positive and not large, or beyond what matters."""
        return ir.Operation.create("math.ceil", results=[value.type], operands=[value]).result

    def keep(self, x: ir.Value, bound: ir.Value, count: ir.Value) -> ir.Value:
        """Keeps a strip if it has a logit that is not below a bound; how many there are then."""
        k, w = self.k, self.w
        wanted = Scalar(w.compare(w.across("max", x), "OGE", bound))
        place = Scalar(count) * w.threads + self.kept_start
        k.when(wanted, lambda: k.store(x, self.kept, place))
        return wanted.select(Scalar(count) + 1, Scalar(count)).value

    def scan(
        self, count: ir.Value, bound: ir.Value, middle: ir.Value, measure: Callable[[ir.Value], ir.Value]
    ) -> list[ir.Value]:
        """What is not below a middle, the least of it, the most of the rest; and how many strips reach the bound.

        Args:
            count: Strips that this thread keeps; it goes on with those that reach the bound.
            bound: What nobody will ask for is below it.
            middle: Where to cut.
            measure: What logits count.
        """
        k, w = self.k, self.w

        def look(at: Scalar, left: ir.Value) -> tuple[list[ir.Value], ir.Value]:
            x = k.load(self.kept, at * w.threads + self.kept_start)
            high = w.compare(x, "OGE", middle)
            found = [w.where(high, measure(x), 0.0), w.where(high, x, float("inf")), w.where(high, float("-inf"), x)]
            return found, self.keep(x, bound, left)

        sums, left = w.over_own(["add", "min", "max"], self.first, Scalar(count), 1, look)
        return [*sums, left]

    def bound(self, total: ir.Value, least: ir.Value, count: ir.Value) -> list[ir.Value]:
        """The least logit that is drawn, how much top-p wants, and the strips that are left: by top-k, then by top-p.

        Args:
            total: What all logits weigh.
            least: The least logit within reach.
            count: Strips that this thread keeps.
        """
        k, w, zero, one = self.k, self.w, self.k.constant(0.0), self.k.constant(1.0)
        has_k, has_p = w.compare(self.row.top_k, "OGT", zero), w.compare(self.row.top_p, "OLT", one)

        def turn(at: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            bound, _, left = carried
            second = at.to("i32").to("f32").value
            is_second = w.compare(second, "OEQ", one)

            def measure(x: ir.Value) -> ir.Value:  # 1, or the weight; nothing that is far away is asked for
                power = k.div(k.sub(x, w.all(self.row.most)), w.all(self.row.temperature))
                return w.exp(k.mul(w.join("max", power, w.all(-FURTHEST)), w.all(second)))

            found, _, _, left = self.scan(left, bound, bound, measure)
            share = k.mul(w.where(has_k, found, total), self.row.top_p)
            wanted = w.where(is_second, w.join("max", share, k.constant(_LEAST_MASS)), self.row.top_k)
            high = w.where(w.compare(found, "OGE", wanted), self.row.most, bound)
            bound, left = self.search(bound, high, left, wanted, measure)
            return [bound, wanted, left]

        turns = [Scalar.constant(turn, "index") for turn in range(3)]
        start = Scalar(has_k).select(turns[0], turns[1])
        stop = Scalar(has_p).select(turns[2], turns[1])
        return k.loop(start, stop, 1, [least, zero, count], turn)

    def search(
        self,
        low: ir.Value,
        high: ir.Value,
        count: ir.Value,
        wanted: ir.Value,
        measure: Callable[[ir.Value], ir.Value],
    ) -> list[ir.Value]:
        """The largest logit such that what is not below it is as much as is wanted, and the strips that are left.

        Args:
            low: A logit that is low enough.
            high: The largest that may be the answer.
            count: Strips that this thread keeps.
            wanted: How much.
            measure: What logits count.
        """
        k, w = self.k, self.w

        def is_open(carried: list[ir.Value]) -> ir.Value:
            return w.compare(carried[0], "OLT", carried[1])

        def halve(carried: list[ir.Value]) -> list[ir.Value]:
            low, high, strips = carried
            middle = k.add(low, k.mul(k.sub(high, low), k.constant(0.5)))
            middle = w.where(w.both(w.compare(middle, "OGT", low), w.compare(middle, "OLT", high)), middle, high)
            found, after, before, left = self.scan(strips, low, middle, measure)
            enough = w.compare(found, "OGE", wanted)
            return [w.where(enough, after, low), w.where(enough, high, before), left]

        bound, _, count = w.repeat([low, high, count], is_open, halve)
        return [bound, count]

    def weigh(self, count: ir.Value, bound: ir.Value) -> list[ir.Value]:
        """What is above a bound weighs, what of it min-p leaves, and how many logits equal the bound."""
        k, w = self.k, self.w

        def look(at: Scalar, left: ir.Value) -> tuple[list[ir.Value], ir.Value]:
            x = k.load(self.kept, at * w.threads + self.kept_start)
            above = w.where(w.compare(x, "OGT", bound), self.weight(x), 0.0)
            likely = w.where(w.compare(above, "OGE", self.row.min_p), above, 0.0)
            return [above, likely, w.where(w.compare(x, "OEQ", bound), 1.0, 0.0)], left

        return w.over_own(["add", "add", "add"], self.first, Scalar(count), 1, look)[0]

    def locate(self, measure: Callable[[Scalar, ir.Value], ir.Value], wanted: ir.Value) -> ir.Value:
        """The first id up to which there is more than is wanted; the last that counts where sums fall short of it.

        Args:
            measure: What the logits of a strip count.
            wanted: How much.
        """
        k, w = self.k, self.w

        def is_open(carried: list[ir.Value]) -> ir.Value:
            return (Scalar(carried[0]) + 1 < Scalar(carried[1])).value

        def halve(carried: list[ir.Value]) -> list[ir.Value]:
            low, high = Scalar(carried[0]), Scalar(carried[1])
            middle = (low + high).divide_unsigned(2)[0]
            until = k.add(carried[2], self.part(measure, low, middle))
            left = Scalar(w.compare(until, "OGT", wanted))
            ends = [left.select(low, middle).value, left.select(middle, high).value]
            return [*ends, w.where(left.value, carried[2], until)]

        strip, _, until = w.repeat([self.first.value, self.stop.value, k.constant(0.0)], is_open, halve)
        x = self.load(Scalar(strip))
        found = none = k.constant(-1.0)
        for value, place in zip(k.elements(measure(Scalar(strip), x)), k.elements(w.ids(Scalar(strip))), strict=True):
            until = k.add(until, value)
            here = w.both(w.compare(until, "OGT", wanted), w.compare(value, "OGT", k.constant(0.0)))
            found = w.where(w.both(here, w.compare(found, "OEQ", none)), place, found)

        is_none = Scalar(w.compare(found, "OEQ", none))
        return k.choose(is_none, lambda: self.last(measure), lambda: [found], [found.type])[0]

    def part(self, measure: Callable[[Scalar, ir.Value], ir.Value], low: Scalar, high: Scalar) -> ir.Value:
        """What the strips from ``low`` to before ``high`` count."""
        return self.w.over(["add"], low, high, lambda strip: [measure(strip, self.load(strip))])[0]

    def last(self, measure: Callable[[Scalar, ir.Value], ir.Value]) -> list[ir.Value]:
        """The last id that counts."""
        w = self.w

        def look(strip: Scalar) -> list[ir.Value]:
            counts = w.compare(measure(strip, self.load(strip)), "OGT", self.k.constant(0.0))
            return [w.where(counts, w.ids(strip), 0.0)]

        return w.over(["max"], self.first, self.stop, look)
