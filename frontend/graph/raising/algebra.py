"""Tensors as sums of products over named axes, so that two ways of writing one computation become the same value.

``Add(Mul(state, g), MatMul(k, v))`` becomes ``state[b,h,i,j] g[b,h] + k[b,h,i] v[b,h,j]``, whether the graph says
MatMul, Einsum or Mul and ReduceSum, and however it transposes and reshapes in between. An axis is an index of several
variables where it was merged of several; an axis of size 1 is the empty index, which stretches to any other one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .sizes import Size, product

MAX_TERMS = 32
"""Of a tensor; a recurrence has three at most."""

Index = tuple[int, ...]
"""Variables of an axis, the slowest first; empty for an axis of size 1."""


class NotProvenError(Exception):
    """What stands in the way of a proof, in words that follow a node's name."""


@dataclass(frozen=True)
class Factor:
    """One input of a product: a value, or the exponential of one, at an index an axis."""

    name: str
    index: tuple[Index, ...]
    is_exp: bool = False

    @property
    def variables(self) -> set[int]:
        """All variables that it depends on."""
        return set(itertools.chain.from_iterable(self.index))


@dataclass(frozen=True)
class Term:
    """A number times a product, summed over the bound variables."""

    number: float
    factors: tuple[Factor, ...]
    bound: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tensor:
    """Element at ``axes`` = sum of ``terms``. A rounded one has lost bits to a smaller type."""

    axes: tuple[Index, ...]
    terms: tuple[Term, ...]
    rounded: bool = False


class Algebra:
    """Operations on tensors.

    Attributes:
        sizes: Of every variable.
        fixed: Variables that mean the same in all tensors, whatever axis they are.
    """

    def __init__(self) -> None:
        self.sizes: dict[int, Size] = {}
        self.fixed: set[int] = set()

    def new(self, size: Size) -> int:
        """A variable."""
        self.sizes[len(self.sizes)] = size
        return len(self.sizes) - 1

    def size(self, index: Index) -> Size:
        """Size of an axis."""
        return product(self.sizes[v] for v in index)

    def shape(self, tensor: Tensor) -> tuple[Size, ...]:
        """Sizes of all axes."""
        return tuple(self.size(axis) for axis in tensor.axes)

    def input(self, name: str, shape: Sequence[Size]) -> Tensor:
        """A value of which nothing more is known."""
        axes = tuple(() if size.value == 1 else (self.new(size),) for size in shape)
        return Tensor(axes, (Term(1.0, (Factor(name, axes),)),))

    def number(self, value: float) -> Tensor:
        """A scalar."""
        return Tensor((), (Term(value, ()),))

    def transpose(self, tensor: Tensor, permutation: Sequence[int]) -> Tensor:
        """Axes in another order."""
        return replace(tensor, axes=tuple(tensor.axes[i] for i in permutation))

    def unsqueeze(self, tensor: Tensor, axes: Sequence[int]) -> Tensor:
        """Axes of size 1, at these places of the result."""
        rank = len(tensor.axes) + len(axes)
        places = {axis % rank for axis in axes}
        if len(places) < len(axes):
            raise NotProvenError("inserts an axis twice")
        old = iter(tensor.axes)
        return replace(tensor, axes=tuple(() if i in places else next(old) for i in range(rank)))

    def squeeze(self, tensor: Tensor, axes: Sequence[int] | None) -> Tensor:
        """Without these axes of size 1; without all of them if None."""
        rank = len(tensor.axes)
        if axes is None:
            if any(axis and self.size(axis).value is None for axis in tensor.axes):
                raise NotProvenError("squeezes an axis of open size")
            axes = [i for i, axis in enumerate(tensor.axes) if not axis]
        places = {axis % rank for axis in axes}
        if any(tensor.axes[i] for i in places):
            raise NotProvenError("squeezes an axis that is not known to have size 1")
        return replace(tensor, axes=tuple(axis for i, axis in enumerate(tensor.axes) if i not in places))

    def expand(self, tensor: Tensor, shape: Sequence[Size]) -> Tensor:
        """Axes of size 1 stretched to a shape."""
        rank = max(len(shape), len(tensor.axes))
        sizes = (Size.of(1),) * (rank - len(shape)) + tuple(shape)
        axes: list[Index] = []
        for axis, size in zip(((),) * (rank - len(tensor.axes)) + tensor.axes, sizes, strict=True):
            if axis and size != self.size(axis) and size.value != 1:
                raise NotProvenError(f"stretches an axis of {self.size(axis)} to {size}")
            axes.append(axis or (() if size.value == 1 else (self.new(size),)))
        return replace(tensor, axes=tuple(axes))

    def tile(self, tensor: Tensor, repeats: Sequence[Size]) -> Tensor:
        """Axes repeated; the count of repetitions is the slower part of the new axis."""
        if len(repeats) != len(tensor.axes):
            raise NotProvenError("repeats another number of axes")
        return replace(
            tensor,
            axes=tuple(
                axis if count.value == 1 else (self.new(count), *axis)
                for axis, count in zip(tensor.axes, repeats, strict=True)
            ),
        )

    def reshape(self, tensor: Tensor, shape: Sequence[Size | None]) -> Tensor:
        """The elements in order in another shape, in which one size may be left open (None)."""
        known = product(size for size in shape if size is not None)
        total = product(self.shape(tensor))
        rest = total.divided_by(known)
        if rest is None or list(shape).count(None) > 1 or (None not in shape and rest.value != 1):
            raise NotProvenError(f"reshapes {_join(self.shape(tensor))} to {_join(shape)}")
        flat = list(itertools.chain.from_iterable(tensor.axes))
        split: dict[int, Index] = {}
        axes: list[Index] = []
        for size in (rest if size is None else size for size in shape):
            axis: list[int] = []
            while self.size(tuple(axis)) != size:
                if not flat:
                    raise NotProvenError(f"reshapes {_join(self.shape(tensor))} to {_join(shape)}")
                left = size.divided_by(self.size(tuple(axis)))
                first = flat[0]
                if left is None or self.sizes[first] == left or left.divided_by(self.sizes[first]) is not None:
                    axis.append(flat.pop(0))
                    continue
                parts = self._split(first, left)
                if parts is None:
                    raise NotProvenError(f"reshapes {_join(self.shape(tensor))} to {_join(shape)}")
                split = {v: substitute(index, {first: parts}) for v, index in split.items()} | {first: parts}
                flat[:1] = parts
            axes.append(tuple(axis))
        if flat:
            raise NotProvenError(f"reshapes {_join(self.shape(tensor))} to {_join(shape)}")
        return self.rename(replace(tensor, axes=tuple(axes)), split, keep_axes=True)

    def multiply(self, one: Tensor, other: Tensor) -> Tensor:
        """The product, element by element."""
        one, other = self._aligned(one, self._copy(other))
        terms = tuple(
            Term(a.number * b.number, a.factors + b.factors, a.bound + b.bound) for a in one.terms for b in other.terms
        )
        return self._checked(Tensor(_broadcast(one.axes, other.axes), terms))

    def add(self, one: Tensor, other: Tensor) -> Tensor:
        """The sum, element by element."""
        one, other = self._aligned(one, self._copy(other))
        return self._checked(Tensor(_broadcast(one.axes, other.axes), one.terms + other.terms))

    def scale(self, tensor: Tensor, number: float) -> Tensor:
        """A number of times a tensor."""
        return replace(tensor, terms=tuple(replace(term, number=term.number * number) for term in tensor.terms))

    def contract(self, tensor: Tensor, axes: Sequence[int], *, keep: bool = False) -> Tensor:
        """The sum over axes, which go, or stay with size 1."""
        _exact(tensor)
        rank = len(tensor.axes)
        places = {axis % rank for axis in axes}
        terms: list[Term] = []
        for term in tensor.terms:
            used = set[int]().union(*(factor.variables for factor in term.factors))
            number, bound = term.number, term.bound
            for variable in itertools.chain.from_iterable(tensor.axes[i] for i in sorted(places)):
                if variable in used:
                    bound = (*bound, variable)
                    continue
                count = self.sizes[variable].value
                if count is None:
                    raise NotProvenError("sums what is the same along an open axis")
                number *= count
            terms.append(Term(number, term.factors, bound))
        kept = tuple(() if i in places else axis for i, axis in enumerate(tensor.axes) if keep or i not in places)
        return self._copy(Tensor(kept, tuple(terms)))

    def matmul(self, one: Tensor, other: Tensor) -> Tensor:
        """The matrix product of the last two axes, over all others."""
        if len(one.axes) < 2 or len(other.axes) < 2:
            raise NotProvenError("is a product of a vector")
        product = self.multiply(self.unsqueeze(one, [-1]), self.unsqueeze(other, [-3]))
        return self.contract(product, [-2])

    def exp(self, tensor: Tensor) -> Tensor:
        """The exponential of a single value."""
        _exact(tensor)
        if len(tensor.terms) != 1 or tensor.terms[0].bound or tensor.terms[0].number != 1.0:
            raise NotProvenError("is the exponential of more than one input")
        factors = tensor.terms[0].factors
        if len(factors) != 1 or factors[0].is_exp:
            raise NotProvenError("is the exponential of more than one input")
        return replace(tensor, terms=(Term(1.0, (replace(factors[0], is_exp=True),)),))

    def rename(self, tensor: Tensor, variables: Mapping[int, Index], *, keep_axes: bool = False) -> Tensor:
        """Other variables in place of some."""
        if not variables:
            return tensor
        axes = tensor.axes if keep_axes else tuple(substitute(axis, variables) for axis in tensor.axes)
        terms = tuple(
            Term(
                term.number,
                tuple(replace(f, index=tuple(substitute(index, variables) for index in f.index)) for f in term.factors),
                substitute(term.bound, variables),
            )
            for term in tensor.terms
        )
        return replace(tensor, axes=axes, terms=terms)

    def match(self, one: Index, other: Index) -> tuple[dict[int, Index], dict[int, Index]]:
        """What to put for the variables of two indices of one axis so that they become the same.

        Raises:
            NotProvenError: if their sizes are not the same.
        """
        first, second = list(one), list(other)
        for_one: dict[int, Index] = {}
        for_other: dict[int, Index] = {}
        while first and second:  # from the fastest on, which both count in ones
            a, b = first[-1], second[-1]
            x, y = self.sizes[a], self.sizes[b]
            if x == y or (len(first) == len(second) == 1 and x.value is None and y.value is None):
                for_other[b] = (a,)
                first.pop()
                second.pop()
            elif (parts := self._split(a, None, y)) is not None:
                for_one = {v: substitute(index, {a: parts}) for v, index in for_one.items()} | {a: parts}
                for_other = {v: substitute(index, {a: parts}) for v, index in for_other.items()}
                first[-1:] = parts
            elif (parts := self._split(b, None, x)) is not None:
                for_other = {v: substitute(index, {b: parts}) for v, index in for_other.items()} | {b: parts}
                second[-1:] = parts
            else:
                break
        if first or second:
            raise NotProvenError(f"sizes of {self.size(one)} and {self.size(other)} meet")
        return for_one, {v: substitute(index, for_other) for v, index in for_other.items()}

    def _split(self, variable: int, slow: Size | None, fast: Size | None = None) -> Index | None:
        """Two variables in place of one, of which one has a given size."""
        size = self.sizes[variable]
        given = slow or fast
        assert given is not None
        rest = size.divided_by(given)
        if rest is None or rest.value == 1 or given.value == 1:
            return None
        return (self.new(slow or rest), self.new(fast or rest))

    def _aligned(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Both tensors with the same variables along axes that both have."""
        _exact(one)
        _exact(other)
        for place in range(1, min(len(one.axes), len(other.axes)) + 1):
            if one.axes[-place] and other.axes[-place]:
                for_one, for_other = self.match(one.axes[-place], other.axes[-place])
                one, other = self.rename(one, for_one), self.rename(other, for_other)
        return one, other

    def _copy(self, tensor: Tensor) -> Tensor:
        """The same tensor with variables of its own."""
        own = {v for axis in tensor.axes for v in axis} - self.fixed
        fresh: dict[int, Index] = {v: (self.new(self.sizes[v]),) for v in sorted(own)}
        renamed = self.rename(tensor, fresh)
        return replace(renamed, terms=tuple(self._with_own_bound(term) for term in renamed.terms))

    def _with_own_bound(self, term: Term) -> Term:
        fresh: dict[int, Index] = {v: (self.new(self.sizes[v]),) for v in term.bound}
        return self.rename(Tensor((), (term,)), fresh).terms[0]

    def _checked(self, tensor: Tensor) -> Tensor:
        if len(tensor.terms) > MAX_TERMS:
            raise NotProvenError("is a sum of too many products")
        return tensor


def _exact(tensor: Tensor) -> None:
    if tensor.rounded:
        raise NotProvenError("computes with what was rounded to a smaller type within a step")


def substitute(index: Index, variables: Mapping[int, Index]) -> Index:
    """An index with other variables in place of some."""
    return tuple(itertools.chain.from_iterable(variables.get(v, (v,)) for v in index))


def _broadcast(one: tuple[Index, ...], other: tuple[Index, ...]) -> tuple[Index, ...]:
    rank = max(len(one), len(other))
    first, second = ((),) * (rank - len(one)) + one, ((),) * (rank - len(other)) + other
    return tuple(a or b for a, b in zip(first, second, strict=True))


def _join(sizes: Sequence[Size | None]) -> str:
    return f"[{', '.join('-1' if size is None else str(size) for size in sizes)}]"
