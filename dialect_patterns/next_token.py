"""NextToken (of our own): the token with the largest logit, so that a step hands back a number and not a vocabulary.

    linattn.NextToken(logits [..., V]) -> [...] i64     the first of equal ones; -1 where there is a NaN

The frontend puts it behind the logits of one more entry point (``frontend.graph.next_token``).

    %token = flow.dispatch @next_token_...[%rows](%logits)                     a workgroup a row
    %most, %places = flow.dispatch @next_token_part_...[%rows](%logits)        or one for each part of a long row,
    %token = flow.dispatch @next_token_join_...[%rows](%most, %places)         and one for what they have found

IREE 3.13 makes five kernels of the same reductions; on CUDA two of them go through a row with the threads of a single
warp, each of which reads a thousand logits one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir

from .emit.builder import Builder, tensor_type
from .emit.scalar import Scalar
from .emit.simt_kernel import Kernel, dispatch
from .emit.workgroup import RowShape, Workgroup, load_i64, row_shape, store_i64
from .logits import Logits, check_logits, token_types
from .node import Node
from .op import INTERNAL, LoweringContext, Op
from .target import Target

NEXT_TOKEN = "NextToken"
_NAN = -1
_BEYOND = 3e38
"""More than any id."""

_STRIPS = 8
"""Strips of a thread; where a row has more of them for each, it is worth a second kernel to have several workgroups."""

_STRIPS_OF_PART = 2


class NextToken(Logits):
    """Contract."""


def parse(node: Node) -> NextToken:
    """Check the node; see the contract."""
    return NextToken(check_logits(node))


def lower(context: LoweringContext, contract: NextToken, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Emit one kernel, or two."""
    b, (logits,) = context.builder, operands
    assert logits is not None
    lead = b.shape(logits)[:-1]
    rows = b.collapse(logits, 0, len(lead) - 1) if len(lead) > 1 else logits
    token = load_i64(_emit(b, context.target, contract, rows), contract.rows)
    return [b.expand(token, 0, lead) if len(lead) > 1 else token]


def _emit(b: Builder, target: Target, c: NextToken, logits: ir.Value) -> ir.Value:
    """The tokens as pairs of i32, [B, 2]."""
    shape, rows = row_shape(c.vocabulary, target), c.rows
    token = (tensor_type((rows, 2), "i32"), list[ir.Value]())
    name = f"{c.logits.dtype}_{rows}x{c.vocabulary}_w{shape.width}_t{shape.threads}_g{shape.subgroup}"
    inputs = [shape.filled(b, logits)]
    if shape.threads == 1 or shape.strips <= _STRIPS * shape.threads:

        def whole(k: Kernel) -> None:
            _Search(k, shape, rows, c.logits.dtype, 1, places=False).emit()

        return dispatch(f"next_token_{name}", shape.group, 1, b.index(rows), [], inputs, [token], whole)[0]
    parts = -(-shape.strips // (_STRIPS_OF_PART * shape.threads))
    found = (tensor_type((rows, parts), "f32"), list[ir.Value]())
    joined = row_shape(parts * shape.width, target)
    joined = RowShape(1, parts, joined.threads, joined.subgroup)

    def part(k: Kernel) -> None:
        _Search(k, shape, rows, c.logits.dtype, parts, places=False).emit()

    def join(k: Kernel) -> None:
        _Search(k, joined, rows, "f32", 1, places=True).emit()

    outputs = [found, found]
    inputs = dispatch(f"next_token_part_{name}", shape.group, parts, b.index(rows), [], inputs, outputs, part)
    name = f"next_token_join_{rows}x{parts}_t{joined.threads}_g{joined.subgroup}"
    return dispatch(name, joined.group, 1, b.index(rows), [], inputs, [token], join)[0]


class _Search:
    """Emits the search of a row, or of one of its parts.

    Args:
        k: The kernel.
        shape: How a row is gone through.
        rows: Rows.
        dtype: Type of the numbers.
        parts: Into how many a row is cut; what is found in each is written, instead of the token.
        places: Whether the numbers have ids of their own, in a second input; else they stand in the order of the ids.
    """

    def __init__(self, k: Kernel, shape: RowShape, rows: int, dtype: str, parts: int, *, places: bool) -> None:
        self.k, self.w, self.shape, self.parts = k, Workgroup(k, shape.width), shape, parts
        size = Scalar.constant(rows * shape.strips, "index")
        self.row = k.item().minimum(rows - 1)
        self.numbers = k.buffer(0, dtype, size, shape.width)
        self.places = k.buffer(1, "f32", size, shape.width) if places else None
        first = 2 if places else 1
        if parts == 1:
            self.token = k.buffer(first, "i32", Scalar.constant(2 * rows, "index"))
        else:
            found = Scalar.constant(rows * parts, "index")
            self.found = [k.buffer(first + i, "f32", found) for i in range(2)]

    def emit(self) -> None:
        """Emit everything."""
        k, w, strips = self.k, self.w, self.shape.strips
        each = -(-strips // self.parts)
        start = k.tile() * each if self.parts > 1 else Scalar.constant(0, "index")
        stop = (start + each).minimum(strips) if self.parts > 1 else Scalar.constant(strips, "index")

        def look(strip: Scalar) -> list[ir.Value]:
            x = self._number(strip)
            return [x, w.where(w.is_nan(x), 1.0, 0.0)]

        most, nan = w.over(["max", "max"], start, stop, look)

        def place(strip: Scalar) -> list[ir.Value]:
            places = w.ids(strip) if self.places is None else k.load(self.places, self._at(strip))
            return [w.where(w.compare(self._number(strip), "OEQ", most), places, _BEYOND)]

        (first,) = w.over(["min"], start, stop, place)
        is_nan = w.compare(nan, "OGT", k.constant(0.0))

        def write() -> None:
            if self.parts == 1:
                token = Scalar(w.where(is_nan, float(_NAN), first)).to("i32")
                store_i64(k, token, self.token, self.row)
                return
            at = self.row * self.parts + k.tile()
            k.store(w.where(is_nan, float("nan"), most), self.found[0], at)
            k.store(first, self.found[1], at)

        k.when(w.thread.equals(0), write)

    def _at(self, strip: Scalar) -> Scalar:
        return self.row * self.shape.strips + strip

    def _number(self, strip: Scalar) -> ir.Value:
        return self.k.widen(self.numbers, self.k.load(self.numbers, self._at(strip)))


OPS = (Op(INTERNAL, NEXT_TOKEN, 1, parse, token_types, lower),)
