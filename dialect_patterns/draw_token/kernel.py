"""DrawToken as one kernel: a workgroup a row, which looks through the row as often as the settings ask for.

    %token, %scratch = flow.dispatch @draw_token_...[%rows](%logits, %settings)

Top-k and top-p are a least logit each: the largest one such that at least k logits, or as much of the probability as is
wanted, are not below it. It is found by bisection; each round ends at a logit that is there, so that a few rounds are
enough, and drops what is below the bound that it has. What is looked through again is therefore soon a small part of
the row; and where a GPU is asked for top-k, a look at the threads' shares of the row tells what may be among the k
(``shares.py``). Of the logits that equal the bound of top-p those with the smallest ids are kept, as many as needed.

The token is found by bisection over the ids. Nothing is sorted, and no memory is shared but for sums.

Cost: greedy two passes over the row; temperature alone four; top-k and top-p about one more each.
"""

from __future__ import annotations

from collections.abc import Callable

from iree.compiler import ir

from ..emit.builder import Builder, tensor_type
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Kernel, dispatch
from ..emit.workgroup import Kind, RowShape, Workgroup, load_i64, row_shape, store_i64
from ..target import Target
from .contract import FURTHEST, SETTINGS, DrawToken
from .shares import low_enough

_NAN, _NONE = -1, -2
_BEYOND = 3e38
"""More than any id."""

_LEAST_MASS = 1e-30
"""top_p 0 keeps one token."""


def emit_draw(b: Builder, target: Target, c: DrawToken, logits: ir.Value, settings: ir.Value) -> ir.Value:
    """The tokens, [B] i64."""
    shape, rows = row_shape(c.vocabulary, target), c.rows

    def body(k: Kernel) -> None:
        _Draw(k, c, shape).emit()

    name = f"draw_token_{c.logits.dtype}_{rows}x{c.vocabulary}_w{shape.width}_t{shape.threads}_g{shape.subgroup}"
    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [
        (tensor_type((rows, 2), "i32"), []),
        (tensor_type((rows, _kept(shape) * shape.width), "f32"), []),
    ]
    inputs = [shape.filled(b, logits), settings]
    return load_i64(dispatch(name, shape.group, 1, b.index(rows), [], inputs, outputs, body)[0], rows)


def _kept(shape: RowShape) -> int:
    """Strips that the threads may keep, each as many."""
    return -(-shape.strips // shape.threads) * shape.threads


class _Draw:
    """Emits the kernel."""

    def __init__(self, k: Kernel, c: DrawToken, shape: RowShape) -> None:
        self.k, self.c, self.shape = k, c, shape
        self.w = w = Workgroup(k, shape.width)
        index = Scalar.constant
        self.row = k.item().minimum(c.rows - 1)
        self.logits = k.buffer(0, c.logits.dtype, index(c.rows * shape.strips, "index"), shape.width)
        settings = k.buffer(1, "f32", index(c.rows * SETTINGS, "index"))
        self.token = k.buffer(2, "i32", index(2 * c.rows, "index"))
        kept = _kept(shape)
        self.kept = k.buffer(3, "f32", index(c.rows * kept, "index"), shape.width)
        self.kept_start = self.row * kept + w.thread
        self.first, self.stop = index(0, "index"), index(shape.strips, "index")
        values = [k.load(settings, self.row * SETTINGS + i) for i in range(6)]
        self.temperature, self.top_k, self.top_p, self.min_p, self.reach, self.random = values
        self.most = self.shares = k.constant(0.0)

    def emit(self) -> None:
        """Emit everything."""
        k, w, i32 = self.k, self.w, [ir.IntegerType.get_signless(32)]

        def look(strip: Scalar, count: ir.Value) -> tuple[list[ir.Value], ir.Value]:
            x = self.load(strip)
            return [x, w.where(w.is_nan(x), 1.0, 0.0)], count

        kinds: list[Kind] = ["max", "max"]
        found, _ = w.of_own(kinds, w.thread, self.stop, w.threads, look)
        self.shares = found[0]
        self.most, nan = w.together(kinds, found)
        finite = w.both(w.compare(self.most, "OLT", k.constant(float("inf"))),
                        w.compare(self.most, "OGT", k.constant(float("-inf"))))  # fmt: skip

        def number(value: int) -> list[ir.Value]:
            return [Scalar.constant(value, "i32").value]

        def drawn() -> list[ir.Value]:
            return k.choose(Scalar(finite), lambda: [self.drawn()], lambda: number(_NONE), i32)

        def chosen() -> list[ir.Value]:
            greedy = Scalar(w.compare(self.temperature, "OEQ", k.constant(0.0)))
            return k.choose(greedy, lambda: [self.greedy()], drawn, i32)

        is_nan = Scalar(w.compare(nan, "OGT", k.constant(0.0)))
        token = Scalar(k.choose(is_nan, lambda: number(_NAN), chosen, i32)[0])

        k.when(w.thread.equals(0), lambda: store_i64(k, token, self.token, self.row))

    def load(self, strip: Scalar) -> ir.Value:
        """Logits of the row."""
        return self.k.widen(self.logits, self.k.load(self.logits, self.row * self.shape.strips + strip))

    def weight(self, x: ir.Value) -> ir.Value:
        """How likely a logit is, the largest one 1."""
        k, w = self.k, self.w
        most, temperature = self.most, self.temperature
        if str(x.type).startswith("vector"):
            most, temperature = w.all(most), w.all(temperature)
        return w.exp(k.div(k.sub(x, most), temperature))

    def greedy(self) -> ir.Value:
        """The first place of the largest logit."""
        w = self.w

        def look(strip: Scalar) -> list[ir.Value]:
            return [w.where(w.compare(self.load(strip), "OEQ", self.most), w.ids(strip), _BEYOND)]

        (place,) = w.over(["min"], self.first, self.stop, look)
        return Scalar(place).to("i32").value

    def drawn(self) -> ir.Value:
        """The token that the random number points at."""
        k, w, one = self.k, self.w, self.k.constant(1.0)
        total, least, count = self.gather()
        bound, wanted, count = self.bound(total, least, count)
        above, likely, equal = self.weigh(count, bound)
        own = self.weight(bound)
        needed = k.div(k.sub(wanted, above), own)
        has_p = w.compare(self.top_p, "OLT", one)
        needed = w.where(has_p, w.join("min", w.join("max", self.rounded_up(needed), one), equal), equal)
        likely = k.add(likely, w.where(w.compare(own, "OGE", self.min_p), k.mul(needed, own), 0.0))

        def find(turn: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            """The id of the last that equals the bound and is kept; then the token."""
            second, last = turn.to("i32").to("f32").value, carried[0]
            first = k.sub(one, second)

            def measure(strip: Scalar, x: ir.Value) -> ir.Value:
                value, equals = self.weight(x), w.compare(x, "OEQ", bound)
                inside = w.either(w.compare(x, "OGT", bound), w.both(equals, w.compare(last, "OGE", w.ids(strip))))
                kept = w.where(w.both(inside, w.compare(value, "OGE", self.min_p)), value, 0.0)
                return k.add(k.mul(kept, w.all(second)), w.where(equals, first, 0.0))

            is_second = w.compare(second, "OEQ", one)
            wanted = w.where(is_second, k.mul(likely, self.random), k.sub(needed, k.constant(0.5)))
            return [self.locate(measure, wanted)]

        is_cut = Scalar(w.compare(needed, "OLT", equal))
        turns = [Scalar.constant(turn, "index") for turn in range(3)]
        (token,) = k.loop(is_cut.select(turns[0], turns[1]), turns[2], 1, [k.constant(_BEYOND)], find)
        return Scalar(token).to("i32").value

    def rounded_up(self, value: ir.Value) -> ir.Value:
        """The next whole number; numbers are positive and not large, or beyond what matters."""
        return ir.Operation.create("math.ceil", results=[value.type], operands=[value]).result

    # ---- what may be drawn -----------------------------------------------------------------------------------------
    def gather(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        """What all logits weigh, the least one within reach, and how many strips this thread keeps for having some.

        Where fewer than the wanted k are within reach, it is all of them.
        """
        k, w = self.k, self.w
        if w.is_one:
            total, least, count = self.by_reach()
            return total, least, count
        low, is_enough = low_enough(w, self.shares, self.most, self.temperature, self.top_k)
        types = [low.type, low.type, ir.IndexType.get()]

        def above() -> list[ir.Value]:
            total, least, _, count = self.within(low)
            return [total, least, count]

        total, least, count = k.choose(Scalar(is_enough), above, self.by_reach, types)
        return total, least, count

    def by_reach(self) -> list[ir.Value]:
        """The same by the setting alone."""
        k, w = self.k, self.w
        zero, furthest = k.constant(0.0), k.constant(FURTHEST)
        enough = w.join("max", self.top_k, k.constant(1.0))

        def is_short(carried: list[ir.Value]) -> ir.Value:
            return w.both(w.compare(carried[3], "OLT", enough), w.compare(carried[0], "OGE", zero))

        def look(carried: list[ir.Value]) -> list[ir.Value]:
            reach = carried[0]
            further = w.where(w.compare(reach, "OLT", furthest), furthest, -1.0)
            return [further, *self.within(k.sub(self.most, k.mul(reach, self.temperature)))]

        initial = [self.reach, zero, zero, zero, self.first.value]
        _, total, least, _, count = w.repeat(initial, is_short, look)
        return [total, least, count]

    def within(self, bound: ir.Value) -> list[ir.Value]:
        """What all logits weigh, and of those that are not below a bound the least, how many, strips that are kept."""
        w = self.w

        def look(strip: Scalar, count: ir.Value) -> tuple[list[ir.Value], ir.Value]:
            x = self.load(strip)
            near = w.compare(x, "OGE", bound)
            found = [self.weight(x), w.where(near, x, float("inf")), w.where(near, 1.0, 0.0)]
            return found, self.keep(x, bound, count)

        sums, count = w.over_own(["add", "min", "add"], w.thread, self.stop, w.threads, look)
        return [*sums, count]

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
        has_k, has_p = w.compare(self.top_k, "OGT", zero), w.compare(self.top_p, "OLT", one)

        def turn(at: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            bound, _, left = carried
            second = at.to("i32").to("f32").value
            is_second = w.compare(second, "OEQ", one)

            def measure(x: ir.Value) -> ir.Value:  # 1, or the weight; nothing that is far away is asked for
                power = k.div(k.sub(x, w.all(self.most)), w.all(self.temperature))
                return w.exp(k.mul(w.join("max", power, w.all(-FURTHEST)), w.all(second)))

            found, _, _, left = self.scan(left, bound, bound, measure)
            share = k.mul(w.where(has_k, found, total), self.top_p)
            wanted = w.where(is_second, w.join("max", share, k.constant(_LEAST_MASS)), self.top_k)
            high = w.where(w.compare(found, "OGE", wanted), self.most, bound)
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
            likely = w.where(w.compare(above, "OGE", self.min_p), above, 0.0)
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
            (part,) = w.over(["add"], low, middle, lambda strip: [measure(strip, self.load(strip))])
            until = k.add(carried[2], part)
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

        def last() -> list[ir.Value]:
            def look(strip: Scalar) -> list[ir.Value]:
                counts = w.compare(measure(strip, self.load(strip)), "OGT", k.constant(0.0))
                return [w.where(counts, w.ids(strip), 0.0)]

            return w.over(["max"], self.first, self.stop, look)

        is_none = Scalar(w.compare(found, "OEQ", none))
        return k.choose(is_none, last, lambda: [found], [found.type])[0]
