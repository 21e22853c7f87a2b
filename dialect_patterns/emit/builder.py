"""Builds linalg, tensor and scf ops under the current insertion point and location.

Dimensions are Python ints where static and index values where open. Loops over tensors are written with one letter a
dimension, as in einsum: ``b.map("btd,d->btd", fn, x, w)``; ``1`` stands for a dimension of size one that is broadcast.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any, cast

from iree.compiler import ir
from iree.compiler.dialects import arith, linalg, scf, tensor

from ..node import TensorSpec
from .scalar import Number, Scalar, element_type

Size = int | ir.Value
ElementFunction = (
    Callable[[], Scalar]
    | Callable[[Scalar], Scalar]
    | Callable[[Scalar, Scalar], Scalar]
    | Callable[[Scalar, Scalar, Scalar], Scalar]
    | Callable[[Scalar, Scalar, Scalar, Scalar], Scalar]
    | Callable[[Scalar, Scalar, Scalar, Scalar, Scalar], Scalar]
    | Callable[[Scalar, Scalar, Scalar, Scalar, Scalar, Scalar], Scalar]
)
"""The body of a loop over tensors: one scalar an operand in, one out."""

LETTERS = string.ascii_letters
"""Names for the dimensions of a tensor of any rank."""

_DYNAMIC = ir.ShapedType.get_dynamic_size()


def tensor_type(shape: Sequence[int | None], dtype: str) -> ir.RankedTensorType:
    """The builtin tensor type of a shape (None where open) and dtype name."""
    return ir.RankedTensorType.get([_DYNAMIC if d is None else d for d in shape], element_type(dtype))


def spec_of(value: ir.Value) -> TensorSpec:
    """Shape and dtype of a builtin tensor value."""
    ty = cast(ir.RankedTensorType, value.type)
    shape = tuple(None if size == _DYNAMIC else size for size in ty.shape)
    return TensorSpec(shape, str(ty.element_type))


class Builder:
    """Emits tensor ops; use inside ``with insertion_point, location:``."""

    # ---- sizes -----------------------------------------------------------------------------------------------------
    def index(self, size: Size) -> ir.Value:
        """``size`` as an index value."""
        if isinstance(size, int):
            return arith.ConstantOp(ir.IndexType.get(), ir.IntegerAttr.get(ir.IndexType.get(), size)).result
        return size

    def dim(self, value: ir.Value, axis: int) -> Size:
        """The size of one dimension: an int if static."""
        static = spec_of(value).shape[axis]
        return static if static is not None else tensor.DimOp(value, self.index(axis)).result

    def shape(self, value: ir.Value) -> list[Size]:
        """The sizes of all dimensions."""
        return [self.dim(value, axis) for axis in range(spec_of(value).rank)]

    def add(self, a: Size, b: Size) -> Size:
        """Sum of two sizes, folded when static."""
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if a == 0 or b == 0:
            return b if a == 0 else a
        return arith.AddIOp(self.index(a), self.index(b)).result

    def sub(self, a: Size, b: Size) -> Size:
        """Difference of two sizes, folded when static."""
        if isinstance(a, int) and isinstance(b, int):
            return a - b
        return a if isinstance(b, int) and b == 0 else arith.SubIOp(self.index(a), self.index(b)).result

    def ceil_div(self, a: Size, b: int) -> Size:
        """Quotient of a size and a positive number, rounded up, folded when static."""
        if isinstance(a, int):
            return -(-a // b)
        return arith.DivUIOp(self.index(self.add(a, b - 1)), self.index(b)).result

    def mul(self, a: Size, b: Size) -> Size:
        """Product of two sizes, folded when static."""
        if isinstance(a, int) and isinstance(b, int):
            return a * b
        if a == 1 or b == 1:
            return b if a == 1 else a
        return arith.MulIOp(self.index(a), self.index(b)).result

    def floordiv(self, a: Size, b: Size) -> Size:
        """Quotient of two non-negative sizes, folded when static."""
        if isinstance(a, int) and isinstance(b, int):
            return a // b
        return a if isinstance(b, int) and b == 1 else arith.DivUIOp(self.index(a), self.index(b)).result

    def minimum(self, a: Size, b: Size) -> Size:
        """The smaller of two non-negative sizes, folded when static."""
        if isinstance(a, int) and isinstance(b, int):
            return min(a, b)
        return arith.MinUIOp(self.index(a), self.index(b)).result

    def assume(self, value: ir.Value, low: int, high: int) -> ir.Value:
        """``value`` (index or integer) with IREE's promise that it lies in ``low`` to ``high``, both included."""
        bounds = ir.Attribute.parse(f"[[#util.int.assumption<umin={low}, umax={high}>]]")
        return ir.Operation.create(
            "util.assume.int", results=[value.type], operands=[value], attributes={"assumptions": bounds}
        ).result

    def maximum(self, a: Size, b: Size) -> Size:
        """The larger of two non-negative sizes, folded when static."""
        if isinstance(a, int) and isinstance(b, int):
            return max(a, b)
        return arith.MaxUIOp(self.index(a), self.index(b)).result

    def _split(self, sizes: Sequence[Size]) -> tuple[list[int], list[ir.Value]]:
        static = [s if isinstance(s, int) else _DYNAMIC for s in sizes]
        return static, [s for s in sizes if not isinstance(s, int)]

    def _type(self, shape: Sequence[Size], dtype: str) -> ir.RankedTensorType:
        return tensor_type([s if isinstance(s, int) else None for s in shape], dtype)

    # ---- creating --------------------------------------------------------------------------------------------------
    def constant(self, value: Number, dtype: str) -> Scalar:
        """A scalar constant."""
        return Scalar.constant(value, dtype)

    def empty(self, shape: Sequence[Size], dtype: str) -> ir.Value:
        """A tensor with undefined contents."""
        return tensor.EmptyOp(list(shape), element_type(dtype)).result

    def full(self, value: Number | Scalar, shape: Sequence[Size], dtype: str) -> ir.Value:
        """A tensor filled with one value."""
        scalar = value if isinstance(value, Scalar) else self.constant(value, dtype)
        return cast(Any, linalg.fill)(scalar.value, outs=[self.empty(shape, dtype)])

    # ---- loops -----------------------------------------------------------------------------------------------------
    def _letters(self, equation: str, inputs: Sequence[ir.Value]) -> tuple[list[str], str, dict[str, Size]]:
        lhs, out = equation.replace(" ", "").split("->")
        terms = lhs.split(",") if inputs else []
        if len(terms) != len(inputs):
            raise AssertionError(f"{equation}: {len(inputs)} operands")
        sizes: dict[str, Size] = {}
        for term, value in zip(terms, inputs, strict=True):
            if len(term) != spec_of(value).rank:
                raise AssertionError(f"{equation}: '{term}' for a {spec_of(value)}")
            for axis, letter in enumerate(term):
                if letter != "1" and not isinstance(sizes.get(letter), int):
                    static = spec_of(value).shape[axis]
                    if static is not None:
                        sizes[letter] = static
                    elif letter not in sizes:
                        sizes[letter] = self.dim(value, axis)
        return terms, out, sizes

    def _affine(self, term: str, order: str) -> ir.AffineMap:
        exprs = [
            ir.AffineConstantExpr.get(0) if letter == "1" else ir.AffineDimExpr.get(order.index(letter))
            for letter in term
        ]
        return ir.AffineMap.get(len(order), 0, exprs)

    def _generic(
        self, terms: Sequence[str], out: str, order: str, inputs: Sequence[ir.Value], *inits: ir.Value
    ) -> tuple[linalg.GenericOp, ir.Block]:
        maps = [self._affine(term, order) for term in (*terms, *(out for _ in inits))]
        kinds = ["parallel" if letter in out else "reduction" for letter in order]
        op = linalg.GenericOp(
            [init.type for init in inits],
            list(inputs),
            list(inits),
            ir.ArrayAttr.get([ir.AffineMapAttr.get(m) for m in maps]),
            ir.ArrayAttr.get([ir.Attribute.parse(f"#linalg.iterator_type<{kind}>") for kind in kinds]),
        )
        arguments = [ir.RankedTensorType(v.type).element_type for v in (*inputs, *inits)]
        location = ir.Location.current
        block = ir.Block.create_at_start(op.regions[0], arguments, [location] * len(arguments))
        return op, block

    def map(
        self,
        equation: str,
        fn: ElementFunction,
        *inputs: ir.Value,
        dtype: str | None = None,
        sizes: dict[str, Size] | None = None,
    ) -> ir.Value:
        """Elementwise: ``out[...] = fn(inputs[...])``, converted to ``dtype`` (default: the first input's).

        Args:
            equation: As in einsum, ``"btd,d->btd"``; every letter of the output must be in an input or in ``sizes``.
            fn: Takes one :class:`Scalar` an input and returns one. It may call :meth:`loop_index`.
            *inputs: Builtin tensors.
            dtype: Element type of the result.
            sizes: Sizes of letters that no input has.
        """
        found = self.map_several(
            equation, lambda *elements: [cast(Any, fn)(*elements)], *inputs, dtypes=[dtype or spec_of(inputs[0]).dtype],
            sizes=sizes,
        )  # fmt: skip
        return found[0]

    def map_several(
        self,
        equation: str,
        fn: Callable[..., Sequence[Scalar]],
        *inputs: ir.Value,
        dtypes: Sequence[str],
        sizes: dict[str, Size] | None = None,
    ) -> list[ir.Value]:
        """:meth:`map` with several results of one shape, in one loop: IREE makes a kernel of each loop."""
        terms, out, letters = self._letters(equation, inputs)
        letters.update(sizes or {})
        inits = [self.empty([letters[letter] for letter in out], dtype) for dtype in dtypes]
        op, block = self._generic(terms, out, out, inputs, *inits)
        with ir.InsertionPoint(block):
            found = fn(*[Scalar(block.arguments[i]) for i in range(len(inputs))])
            linalg.YieldOp([value.to(dtype).value for value, dtype in zip(found, dtypes, strict=True)])
        return list(op.results)

    def loop_index(self, axis: int) -> Scalar:
        """Inside a body of :meth:`map`: the index of output dimension ``axis``, an index scalar."""
        return Scalar(linalg.IndexOp(axis).result)

    def load(self, source: ir.Value, *indices: Scalar) -> Scalar:
        """Inside a body of :meth:`map`: the element of another tensor (a gather)."""
        return Scalar(tensor.ExtractOp(source, [i.to("index").value for i in indices]).result)

    def reduce(
        self,
        equation: str,
        fn: ElementFunction,
        *inputs: ir.Value,
        initial: Number,
        dtype: str = "f32",
        sizes: dict[str, Size] | None = None,
    ) -> ir.Value:
        """Reduction over the letters that the output lacks: ``acc = fn(acc, *elements)`` in ``dtype``."""
        terms, out, letters = self._letters(equation, inputs)
        letters.update(sizes or {})
        order = out + "".join(sorted({c for t in terms for c in t if c != "1"} - set(out)))
        init = self.full(initial, [letters[letter] for letter in out], dtype)
        op, block = self._generic(terms, out, order, inputs, init)
        with ir.InsertionPoint(block):
            elements = [Scalar(block.arguments[i]) for i in range(len(inputs))]
            result = cast(Any, fn)(Scalar(block.arguments[len(inputs)]), *elements)
            linalg.YieldOp([result.value])
        return op.results[0]

    def sum(self, equation: str, value: ir.Value, dtype: str = "f32") -> ir.Value:
        """Sum over the letters that the output lacks, accumulated in ``dtype``."""
        return self.reduce(equation, lambda acc, x: acc + x.to(dtype), value, initial=0.0, dtype=dtype)

    def contract(
        self,
        equation: str,
        lhs: ir.Value,
        rhs: ir.Value,
        *,
        dtype: str = "f32",
        accumulate: ir.Value | None = None,
    ) -> ir.Value:
        """Matrix product with at most one batch letter, accumulated in ``dtype``: ``"bmk,bkn->bmn"``.

        It becomes ``linalg.matmul`` or ``linalg.batch_matmul`` (their indexing maps carry transposes), which IREE
        compiles to much better code than a ``linalg.generic``. Operands of different types are converted to ``dtype``.

        Args:
            equation: Two terms and the result; the result is ``mn`` or ``bmn`` in that order.
            lhs: Left operand.
            rhs: Right operand.
            dtype: Element type of sums and result.
            accumulate: Added to the product, of the result's type.
        """
        if spec_of(lhs).dtype != spec_of(rhs).dtype:
            lhs, rhs = self.cast(lhs, dtype), self.cast(rhs, dtype)
        terms, out, letters = self._letters(equation, (lhs, rhs))
        (reduced,) = set(terms[0]) & set(terms[1]) - set(out)
        order = out + reduced
        init = accumulate if accumulate is not None else self.full(0.0, [letters[c] for c in out], dtype)
        maps = [ir.AffineMapAttr.get(self._affine(term, order)) for term in (*terms, out)]
        name = {2: "linalg.matmul", 3: "linalg.batch_matmul"}[len(out)]
        op = ir.Operation.create(
            name,
            results=[init.type],
            operands=[lhs, rhs, init],
            attributes={
                "indexing_maps": ir.ArrayAttr.get(maps),
                "operandSegmentSizes": ir.DenseI32ArrayAttr.get([2, 1]),
            },
            regions=1,
        )
        element_types = [ir.RankedTensorType(v.type).element_type for v in (lhs, rhs, init)]
        block = ir.Block.create_at_start(op.regions[0], element_types, [ir.Location.current] * 3)
        with ir.InsertionPoint(block):
            a, b, acc = (Scalar(block.arguments[i]) for i in range(3))
            linalg.YieldOp([(acc + a.to(dtype) * b.to(dtype)).value])
        return op.results[0]

    # ---- shapes ----------------------------------------------------------------------------------------------------
    def cast(self, value: ir.Value, dtype: str) -> ir.Value:
        """Convert the elements."""
        if spec_of(value).dtype == dtype:
            return value
        letters = LETTERS[: spec_of(value).rank]
        return self.map(f"{letters}->{letters}", lambda x: x, value, dtype=dtype)

    def expand(self, value: ir.Value, axis: int, sizes: Sequence[Size]) -> ir.Value:
        """Split one dimension into several; their product must be its size."""
        shape = self.shape(value)
        axis %= len(shape)
        new = [*shape[:axis], *sizes, *shape[axis + 1 :]]
        groups = [[i] for i in range(axis)] + [list(range(axis, axis + len(sizes)))]
        groups += [[i + len(sizes) - 1] for i in range(axis + 1, len(shape))]
        static, dynamic = self._split(new)
        result = self._type(new, spec_of(value).dtype)
        return tensor.ExpandShapeOp(result, value, groups, dynamic, static).result

    def collapse(self, value: ir.Value, first: int, last: int) -> ir.Value:
        """Join the dimensions ``first`` to ``last`` (inclusive) into one."""
        shape = self.shape(value)
        last %= len(shape)
        joined: Size = 1
        for size in shape[first : last + 1]:
            joined = self.mul(joined, size)
        new = [*shape[:first], joined, *shape[last + 1 :]]
        groups = [[i] for i in range(first)] + [list(range(first, last + 1))]
        groups += [[i] for i in range(last + 1, len(shape))]
        return tensor.CollapseShapeOp(self._type(new, spec_of(value).dtype), value, groups).result

    def unsqueeze(self, value: ir.Value, axis: int) -> ir.Value:
        """Insert a dimension of size one before ``axis`` (or at the end)."""
        rank = spec_of(value).rank
        return (
            self.expand(value, axis, [1, self.dim(value, axis)])
            if axis < rank
            else self.expand(value, rank - 1, [self.dim(value, rank - 1), 1])
        )

    def transpose(self, value: ir.Value, permutation: Sequence[int]) -> ir.Value:
        """Permute dimensions: result dimension i is source dimension ``permutation[i]``."""
        if list(permutation) == list(range(len(permutation))):
            return value
        sizes = self.shape(value)
        empty = self.empty([sizes[p] for p in permutation], spec_of(value).dtype)
        return cast(Any, linalg).transpose(value, outs=[empty], permutation=list(permutation)).result[0]

    def slice(self, value: ir.Value, offsets: Sequence[Size], sizes: Sequence[Size]) -> ir.Value:
        """A rectangular part."""
        static_offsets, dynamic_offsets = self._split(offsets)
        static_sizes, dynamic_sizes = self._split(sizes)
        return tensor.ExtractSliceOp(
            self._type(sizes, spec_of(value).dtype),
            value,
            dynamic_offsets,
            dynamic_sizes,
            [],
            static_offsets,
            static_sizes,
            [1] * len(sizes),
        ).result

    def insert(self, source: ir.Value, destination: ir.Value, offsets: Sequence[Size]) -> ir.Value:
        """``destination`` with ``source`` written at ``offsets``."""
        sizes = self.shape(source)
        static_offsets, dynamic_offsets = self._split(offsets)
        static_sizes, dynamic_sizes = self._split(sizes)
        return tensor.InsertSliceOp(
            source,
            destination,
            dynamic_offsets,
            dynamic_sizes,
            [],
            static_offsets,
            static_sizes,
            [1] * len(sizes),
        ).result

    def concat(self, values: Sequence[ir.Value], axis: int) -> ir.Value:
        """Join tensors along one dimension."""
        if len(values) == 1:
            return values[0]
        shape = self.shape(values[0])
        total: Size = 0
        for value in values:
            total = self.add(total, self.dim(value, axis))
        shape[axis] = total
        result = self.empty(shape, spec_of(values[0]).dtype)
        offset: Size = 0
        for value in values:
            result = self.insert(value, result, [offset if i == axis else 0 for i in range(len(shape))])
            offset = self.add(offset, self.dim(value, axis))
        return result

    def pad_end(self, value: ir.Value, axis: int, size: Size, fill: Number = 0.0) -> ir.Value:
        """Extend one dimension to ``size`` with a value."""
        shape = self.shape(value)
        if isinstance(size, int) and shape[axis] == size:
            return value
        shape[axis] = size
        destination = self.full(fill, shape, spec_of(value).dtype)
        return self.insert(value, destination, [0] * len(shape))

    def refine(self, value: ir.Value, spec: TensorSpec) -> ir.Value:
        """Change which dimensions are static in the type, without touching data."""
        want = tensor_type(spec.shape, spec.dtype)
        return value if value.type == want else tensor.CastOp(want, value).result

    # ---- control flow ----------------------------------------------------------------------------------------------
    def for_loop(
        self,
        stop: Size,
        initial: Sequence[ir.Value],
        body: Callable[[ir.Value, list[ir.Value]], Sequence[ir.Value]],
        *,
        start: Size = 0,
        step: Size = 1,
    ) -> list[ir.Value]:
        """``scf.for``: ``body(index, carried)`` returns the next carried values; returns the last ones."""
        loop = scf.ForOp(self.index(start), self.index(stop), self.index(step), list(initial))
        with ir.InsertionPoint(loop.body):
            carried = list(loop.inner_iter_args)
            results = body(loop.induction_variable, carried)
            scf.YieldOp(list(results))
        return list(loop.results)

    def repeat(
        self,
        count: Size,
        initial: Sequence[ir.Value],
        body: Callable[[Size, list[ir.Value]], Sequence[ir.Value]],
        *,
        first: int = 0,
        unroll: int,
    ) -> list[ir.Value]:
        """``body(index, carried)`` for index ``first``, ..., ``count - 1``, where ``count`` is at least 1.

        A static count of at most ``unroll`` is unrolled: IREE then records all iterations into one command buffer and
        updates in place the tensors that the body writes into, while it copies those of a loop as a whole in every
        iteration (3.13). The unrolled index is a run-time value, so that all iterations share their kernels.
        """
        if not isinstance(count, int) or count > unroll:
            return self.for_loop(count, initial, body, start=first)
        carried = list(initial)
        for index in range(first, count):
            carried = list(body(self._opaque(index) if count > 1 else index, carried))
        return carried

    def _opaque(self, index: int) -> ir.Value:
        """An index that IREE does not fold into kernels, though it is known here."""
        return self.barrier(self.index(index))

    def barrier(self, value: ir.Value) -> ir.Value:
        """The same value; IREE neither folds nor fuses across it. Sizes must be static: IREE loses open ones there."""
        return ir.Operation.create("util.optimization_barrier", results=[value.type], operands=[value]).result
