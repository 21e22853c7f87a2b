"""SelectiveScan in the place of what spells it out, between the moves that its operands need."""

from __future__ import annotations

import numpy as np
import onnx
from linattn.dialect_patterns.op import INTERNAL
from linattn.dialect_patterns.selective_scan.op import SELECTIVE_SCAN

from .algebra import Index, NotProvenError
from .moves import Writer
from .products import ProductAlgebra
from .selective import Part, Selective
from .values import Values

_FLOATS = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT)


def require_f32(values: Values, state: str) -> None:
    """Refuse a state of another type.

    Raises:
        NotProvenError: if it is one.
    """
    if values.element_type(state) != onnx.TensorProto.FLOAT:
        raise NotProvenError("keeps its state in another type than f32")


class SelectiveWriter:
    """Writes the node and what stands around it.

    Args:
        algebra: Where the indices are from.
        values: The graph.
        name: Of what is replaced, and of the operator.
        found: What it computes.
        token: Index of the tokens.
    """

    def __init__(self, algebra: ProductAlgebra, values: Values, name: str, found: Selective, token: Index) -> None:
        self.writer = Writer(algebra, name, values.names)
        self._values, self._name, self._found, self._token = values, name, found, token
        self.layout = (found.batch, token, found.channel)

    def write(self, past: str, present: str) -> str:
        """The node.

        Args:
            past: The state before the first token, empty for zeros; its axes are in the order of what was found.
            present: Name for the state after the last one, in the same order; empty where nobody wants it.

        Returns:
            The output, [B, T, D].

        Raises:
            NotProvenError: if the operator cannot be given its operands.
        """
        found, writer = self._found, self.writer
        keys = (found.batch, self._token, found.element)
        layouts = {
            "value": self.layout, "step": self.layout, "rate": (found.channel, found.element), "key": keys,
            "query": keys,
        }  # fmt: skip
        ports = [self._part(role, found.parts[role], layout) for role, layout in layouts.items()]
        direct = found.order == (0, 1, 2)
        if past:
            ports.append(past if direct else writer.node("Transpose", [past], perm=list(found.order)))
        last = "" if not present else present if direct else self._values.names.new(f"{self._name}.state")
        output = self._values.names.new(f"{self._name}.raised")
        writer.node(SELECTIVE_SCAN, ports, [output, last], domain=INTERNAL, name=self._name)
        if present and not direct:
            writer.node("Transpose", [last], [present], perm=[found.order.index(i) for i in range(3)])
        for i, part in enumerate(found.rest):
            more = self._part(f"rest {i}", part, self.layout, whole=False)
            output = writer.node("Add", [output, more])
        return output

    def _part(self, role: str, part: Part, layout: tuple[Index, ...], *, whole: bool = True) -> str:
        """A product as one value of a layout; if not ``whole``, of one that stretches to it."""
        missing = {v for axis in layout for v in axis}
        product = ""
        for factor in part.factors:
            own = factor.variables
            if factor.is_exp or own - {v for axis in layout for v in axis}:
                raise NotProvenError(f"has a {role} of other axes than the operator's")
            missing -= own
            value, kind = factor.name, self._values.element_type(factor.name)
            if kind not in _FLOATS:
                raise NotProvenError(f"computes its {role} from '{value}', which is no float")
            if kind != onnx.TensorProto.FLOAT:
                value = self.writer.node("Cast", [value], to=onnx.TensorProto.FLOAT)
            want = tuple(axis if set(axis) <= own else () for axis in layout)
            value = self.writer.rearrange(value, factor.index, want)
            product = self.writer.node("Mul", [product, value]) if product else value
        if not product or (whole and missing):
            raise NotProvenError(f"has a {role} that is the same along an axis")
        if part.number != 1.0:
            number = self.writer.constant(f"{role}_number", np.array(part.number, np.float32))
            product = self.writer.node("Mul", [product, number])
        return product
