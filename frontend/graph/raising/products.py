"""A graph's values as products of other values, and exponentials of such products, whatever moves them in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx

from ..schema import domain_of
from .algebra import Algebra, Factor, Index, NotProvenError, Tensor, Term
from .interpret import MOVES, Interpreter
from .sizes import Size
from .values import Values

_MAX_DEPTH = 32
_MAX_FACTORS = 16
_FOLLOWED = frozenset({*MOVES, "Mul", "Exp"})


class ProductAlgebra(Algebra):
    """Algebra in which the exponential of a product is an input of its own, and tokens may lose their axis.

    Attributes:
        token: Index of the tokens: where an axis of them is squeezed, what is left belongs to one token.

    Args:
        tokens: Size of the axis of tokens.
    """

    def __init__(self, tokens: Size) -> None:
        super().__init__()
        self.token: Index = () if tokens.value == 1 else (self.new(tokens),)
        self.fixed = set(self.token)
        self._exponents: dict[str, tuple[list[int], Term]] = {}

    def exp(self, tensor: Tensor) -> Tensor:
        """The exponential of a product."""
        if tensor.rounded or len(tensor.terms) != 1 or tensor.terms[0].bound:
            raise NotProvenError("is the exponential of a sum")
        (term,) = tensor.terms
        name = f"exp {len(self._exponents)}"
        variables = sorted({v for factor in term.factors for v in factor.variables})
        self._exponents[name] = variables, term
        return replace(tensor, terms=(Term(1.0, (Factor(name, tuple((v,) for v in variables), is_exp=True),)),))

    def exponent(self, factor: Factor) -> Term:
        """What a factor is the exponential of."""
        variables, term = self._exponents[factor.name]
        names = dict(zip(variables, factor.index, strict=True))
        return self.rename(Tensor((), (term,)), names).terms[0]

    def squeeze(self, tensor: Tensor, axes: Sequence[int] | None) -> Tensor:
        """Without these axes of size 1, or of tokens."""
        if not axes:
            return super().squeeze(tensor, axes)
        places = {axis % len(tensor.axes) for axis in axes}
        if not self.token or all(tensor.axes[i] != self.token for i in places):
            return super().squeeze(tensor, axes)
        one = tuple(() if i in places and axis == self.token else axis for i, axis in enumerate(tensor.axes))
        return super().squeeze(replace(tensor, axes=one), axes)


class Products:
    """Values of a graph as products of those where products begin.

    Args:
        algebra: Where variables come from.
        values: The graph.
        tokens: Size of the axes that are the algebra's tokens; None where no size tells.
    """

    def __init__(self, algebra: ProductAlgebra, values: Values, tokens: Size | None = None) -> None:
        self.known: dict[str, Tensor] = {}
        self.algebra, self.values = algebra, values
        self._tokens = tokens
        self.run = Interpreter(algebra, values, {})
        self._constants: dict[str, bool] = {}

    def of(self, name: str, depth: int = 0) -> Tensor:
        """A value as a product.

        Raises:
            NotProvenError: if not even its shape is known.
        """
        if name not in self.known:
            node = self.values.producers.get(name)
            tensor = None if node is None or depth > _MAX_DEPTH else self._product(node, depth)
            self.known[name] = self.input(name) if tensor is None else tensor
        return self.known[name]

    def operands(self, node: onnx.NodeProto, depth: int = 0) -> None:
        """Know what a node reads, but for constants that stand for numbers, axes and shapes."""
        count = 1 if node.op_type in MOVES or node.op_type in ("Exp", "ReduceSum", "Cast", "CastLike") else None
        for name in node.input[:count]:
            if name and name not in self.known and self.values.number(name) is None:
                self.of(name, depth + 1)

    def _product(self, node: onnx.NodeProto, depth: int) -> Tensor | None:
        """What a node makes of products; None where it is no move and no product, or a product of constants."""
        if domain_of(node) != "" or node.op_type not in _FOLLOWED:
            return None
        if node.op_type not in MOVES and self._is_constant(node.output[0]):
            return None
        try:
            self.operands(node, depth)
            tensor = self.run.run(node, self.known)
        except NotProvenError:
            return None
        return tensor if len(tensor.terms) == 1 and len(tensor.terms[0].factors) <= _MAX_FACTORS else None

    def input(self, name: str) -> Tensor:
        """A value of which nothing more is asked.

        Raises:
            NotProvenError: if its shape is not known.
        """
        shape = self.values.shape(name)
        if shape is None:
            raise NotProvenError(f"reads '{name}', whose shape is not known")
        tensor = self.algebra.input(name, shape)
        if self._tokens is None or not self.algebra.token:
            return tensor
        names = {
            axis[0]: self.algebra.token for axis, size in zip(tensor.axes, shape, strict=True) if size == self._tokens
        }
        return self.algebra.rename(tensor, names)

    def _is_constant(self, name: str, depth: int = 0) -> bool:
        """Whether a value is computed from weights alone."""
        if name not in self._constants:
            node = self.values.producers.get(name)
            inputs = [n for n in node.input if n] if node is not None else []
            self._constants[name] = depth < _MAX_DEPTH and (
                self.values.is_initializer(name)
                if node is None
                else bool(inputs or node.op_type == "Constant") and all(self._is_constant(n, depth + 1) for n in inputs)
            )
        return self._constants[name]
