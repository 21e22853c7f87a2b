"""DrawToken as one kernel: a workgroup a row, which looks through the row as often as the settings ask for.

    %token, %scratch = flow.dispatch @draw_token_...[%rows](%logits, %settings)

Top-k and top-p are a least logit each: the largest one such that at least k logits, or as much of the probability as is
wanted, are not below it. It is found by bisection; each round ends at a logit that is there, so that a few rounds are
enough, and drops what is below the bound that it has. What is looked through again is therefore soon a small part of
the row; and where a GPU is asked for top-k, a look at the threads' shares of the row tells what may be among the k
(``shares.py``). Of the logits that equal the bound of top-p those with the smallest ids are kept, as many as needed.

The token is found by bisection over the ids. Nothing is sorted. Where few strips are left, one subgroup goes on alone
(``listed.py``), else no memory is shared but for sums.

Cost: greedy two passes over the row; temperature alone four; top-k and top-p about one more each.
"""

from __future__ import annotations

from iree.compiler import ir

from ..emit.builder import Builder, tensor_type
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Kernel, dispatch
from ..emit.workgroup import Kind, RowShape, Workgroup, load_i64, row_shape, store_i64
from ..target import Target
from .contract import FURTHEST, SETTINGS, DrawToken
from .listed import MOST_STRIPS, List, Listed
from .search import BEYOND, Row, Search
from .shares import low_enough

_NAN, _NONE = -1, -2


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


def _number(value: int) -> list[ir.Value]:
    return [Scalar.constant(value, "i32").value]


class _Draw(Search):
    """Emits the kernel."""

    def __init__(self, k: Kernel, c: DrawToken, shape: RowShape) -> None:
        w, rows, kept = Workgroup(k, shape.width), c.rows, _kept(shape)

        def count(elements: int) -> Scalar:
            return Scalar.constant(elements, "index")

        number = k.item().minimum(rows - 1)
        logits = k.buffer(0, c.logits.dtype, count(rows * shape.strips), shape.width)
        settings = k.buffer(1, "f32", count(rows * SETTINGS))
        self.chosen = k.buffer(2, "i32", count(2 * rows))
        own = k.buffer(3, "f32", count(rows * kept), shape.width)
        temperature, top_k, top_p, min_p, reach, random = (k.load(settings, number * SETTINGS + i) for i in range(6))
        self.shares = k.constant(0.0)
        row = Row(k, shape, logits, number, temperature, top_k, top_p, min_p, reach, random, self.shares)
        super().__init__(row, w, own, number * kept + w.thread)
        self.list = List.of(w) if 0 < shape.subgroup < shape.threads else None

    def emit(self) -> None:
        """Emit everything."""
        k, w, i32 = self.k, self.w, [ir.IntegerType.get_signless(32)]

        def look(strip: Scalar, count: ir.Value) -> tuple[list[ir.Value], ir.Value]:
            x = self.load(strip)
            return [x, w.where(w.is_nan(x), 1.0, 0.0)], count

        kinds: list[Kind] = ["max", "max"]
        found, _ = w.of_own(kinds, w.thread, self.stop, w.threads, look)
        self.shares = found[0]
        self.row.most, nan = w.together(kinds, found)
        finite = w.both(w.compare(self.row.most, "OLT", k.constant(float("inf"))),
                        w.compare(self.row.most, "OGT", k.constant(float("-inf"))))  # fmt: skip

        def drawn() -> list[ir.Value]:
            return k.choose(Scalar(finite), lambda: [self.drawn()], lambda: _number(_NONE), i32)

        def chosen() -> list[ir.Value]:
            greedy = Scalar(w.compare(self.row.temperature, "OEQ", k.constant(0.0)))
            return k.choose(greedy, lambda: [self.greedy()], drawn, i32)

        is_nan = Scalar(w.compare(nan, "OGT", k.constant(0.0)))
        token = Scalar(k.choose(is_nan, lambda: _number(_NAN), chosen, i32)[0])

        k.when(w.thread.equals(0), lambda: store_i64(k, token, self.chosen, self.row.number))

    def greedy(self) -> ir.Value:
        """The first place of the largest logit."""
        w = self.w

        def look(strip: Scalar) -> list[ir.Value]:
            return [w.where(w.compare(self.load(strip), "OEQ", self.row.most), w.ids(strip), BEYOND)]

        (place,) = w.over(["min"], self.first, self.stop, look)
        return Scalar(place).to("i32").value

    def drawn(self) -> ir.Value:
        """The token that the random number points at."""
        k, w, given = self.k, self.w, self.list
        total, least, count = self.gather()
        if given is None:
            return self.token(total, least, count)
        strips = w.together(["add"], [w.number(Scalar(count))])[0]
        i32 = [ir.IntegerType.get_signless(32)]

        def listed() -> list[ir.Value]:
            few = Listed(self, given, least, Scalar(count), Scalar(strips).to("i32").to("index"))
            is_first = w.thread < k.group.subgroup
            return k.choose(is_first, lambda: [few.token(total, least, few.own.value)], lambda: _number(0), i32)

        is_few = Scalar(w.compare(strips, "OLE", k.constant(float(MOST_STRIPS))))
        return k.choose(is_few, listed, lambda: [self.token(total, least, count)], i32)[0]

    # ---- what may be drawn -----------------------------------------------------------------------------------------
    def gather(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        """What all logits weigh, the least one within reach, and how many strips this thread keeps for having some.

        Where fewer than the wanted k are within reach, it is all of them.
        """
        k, w = self.k, self.w
        if w.is_one:
            total, least, count = self.by_reach()
            return total, least, count
        low, is_enough = low_enough(w, self.shares, self.row.most, self.row.temperature, self.row.top_k)
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
        enough = w.join("max", self.row.top_k, k.constant(1.0))

        def is_short(carried: list[ir.Value]) -> ir.Value:
            return w.both(w.compare(carried[3], "OLT", enough), w.compare(carried[0], "OGE", zero))

        def look(carried: list[ir.Value]) -> list[ir.Value]:
            reach = carried[0]
            further = w.where(w.compare(reach, "OLT", furthest), furthest, -1.0)
            return [further, *self.within(k.sub(self.row.most, k.mul(reach, self.row.temperature)))]

        initial = [self.row.reach, zero, zero, zero, self.first.value]
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
