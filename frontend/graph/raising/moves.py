"""Where a value's elements come from: followed back through transposes, reshapes and repetitions, and the way there."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from ..names import Names
from ..schema import domain_of
from .algebra import Algebra, Index, NotProvenError
from .interpret import MOVES, Interpreter
from .values import Values


@dataclass(frozen=True)
class Source:
    """What a value is: a number times elements of another one.

    Attributes:
        root: The other value.
        index: Index of each of the root's axes.
        axes: Index of each of the value's own axes.
        scale: The number.
    """

    root: str
    index: tuple[Index, ...]
    axes: tuple[Index, ...]
    scale: float


def trace(algebra: Algebra, values: Values, name: str, *, scales: bool = False) -> Source:
    """Follow a value back as far as can be proven.

    Args:
        algebra: Where variables come from.
        values: The graph.
        name: The value.
        scales: Also through products with constant numbers.

    Raises:
        NotProvenError: if not even its own shape is known.
    """
    way: list[onnx.NodeProto] = []
    root = name
    while (before := values.producers.get(root)) is not None and (
        operand := _moved(values, before, scales)
    ) is not None:
        way.append(before)
        root = operand
    while True:
        shape = values.shape(root)
        if shape is None:
            raise NotProvenError(f"reads '{root}', whose shape is not known")
        tensor = algebra.input(root, shape)
        known = {root: tensor}
        run = Interpreter(algebra, values, {})
        for i in reversed(range(len(way))):
            try:
                tensor = known[way[i].output[0]] = run.run(way[i], known)
            except NotProvenError:  # what it makes is where the value comes from
                root, way = way[i].output[0], way[:i]
                break
        else:
            (term,) = tensor.terms
            return Source(root, term.factors[0].index, tensor.axes, term.number)


def _moved(values: Values, node: onnx.NodeProto, scales: bool) -> str | None:
    """The operand that a node moves."""
    if domain_of(node) != "" or not node.input:
        return None
    if node.op_type in MOVES:
        return node.input[0]
    if scales and node.op_type in ("Mul", "Div") and values.number(node.input[1]) is not None:
        return node.input[0]
    if scales and node.op_type == "Mul" and values.number(node.input[0]) is not None:
        return node.input[1]
    return None


@dataclass(frozen=True)
class Raised:
    """What takes the place of a piece of a graph: nodes that make the values that it made.

    Attributes:
        what: What became what, for the report.
        nodes: The new nodes.
        initializers: Their constants.
    """

    what: str
    nodes: list[onnx.NodeProto]
    initializers: list[onnx.TensorProto]


class Writer:
    """Collects the nodes and initializers that take the place of others.

    Attributes:
        nodes: The new nodes, in order.
        initializers: Their constants.
    """

    def __init__(self, algebra: Algebra, prefix: str, names: Names) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._algebra = algebra
        self._prefix = prefix
        self._names = names

    def node(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: Sequence[str] | None = None,
        *,
        domain: str = "",
        name: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node; returns its first output."""
        label = f"{self._prefix}.{op_type}_{len(self.nodes)}"
        outputs = outputs or [self._names.new(f"{label}.out")]
        made = onnx.helper.make_node(op_type, list(inputs), list(outputs), name or label, domain=domain, **attributes)
        self.nodes.append(made)
        return outputs[0]

    def rearrange(self, name: str, have: Sequence[Index], want: Sequence[Index], output: str | None = None) -> str:
        """Nodes that bring a value from one layout into another; returns the value in the other.

        Args:
            name: The value.
            have: Index of each of its axes.
            want: Index of each axis of the other layout, of the same variables.
            output: Name of the result.

        Raises:
            NotProvenError: if a Reshape would have to name two open sizes.
        """
        have, want = tuple(have), tuple(want)
        flat = tuple((v,) for v in itertools.chain.from_iterable(have))
        order = tuple((v,) for v in itertools.chain.from_iterable(want))
        if sorted(flat) != sorted(order):
            raise NotProvenError("is read in a layout that its elements cannot be brought into")
        steps: list[tuple[str, tuple[Index, ...]]] = []
        if have != want:
            if flat == order:
                steps = [("Reshape", want)]
            else:
                steps += [("Reshape", flat)] if flat != have else []
                steps += [("Transpose", order)]
                steps += [("Reshape", want)] if order != want else []
        elif output is not None:
            steps = [("Identity", want)]
        for i, (op_type, layout) in enumerate(steps):
            outputs = [output] if output is not None and i == len(steps) - 1 else None
            if op_type == "Reshape":
                shape = self.constant(f"shape_{len(self.initializers)}", np.array(self._shape(have, layout), np.int64))
                name = self.node("Reshape", [name, shape], outputs)
            elif op_type == "Transpose":
                name = self.node("Transpose", [name], outputs, perm=[have.index(index) for index in layout])
            else:
                name = self.node("Identity", [name], outputs)
            have = layout
        return name

    def constant(self, label: str, value: np.ndarray[Any, Any]) -> str:
        """Add an initializer; returns its name."""
        name = self._names.new(f"{self._prefix}.{label}")
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def _shape(self, have: Sequence[Index], want: Sequence[Index]) -> list[int]:
        sizes = [self._algebra.size(index) for index in want]
        same = [i < len(have) and have[i] == index for i, index in enumerate(want)]
        shape = [
            size.value if size.value is not None else 0 if keeps else -1
            for size, keeps in zip(sizes, same, strict=True)
        ]
        if shape.count(-1) > 1:
            raise NotProvenError("has a layout with several open sizes")
        return shape
