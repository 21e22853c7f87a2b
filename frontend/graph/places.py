"""Where the columns of a value lie that Splits and Reshapes made of another one's."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from linattn.dialect_patterns.node import TensorSpec

from .schema import domain_of, spec_of_type
from .split_columns import columns_of


class Places:
    """Looks what values of a graph are parts of.

    Args:
        graph: The graph.
        types: Types of its values.
    """

    def __init__(self, graph: onnx.GraphProto, types: Mapping[str, onnx.TypeProto]) -> None:
        self._types = types
        self._made_by = {name: node for node in graph.node for name in node.output if name}

    def spec(self, name: str) -> TensorSpec | None:
        """The type of a value."""
        return spec_of_type(self._types.get(name))

    def maker(self, name: str) -> onnx.NodeProto | None:
        """The node that makes a value."""
        return self._made_by.get(name)

    def reshaped(self, name: str) -> str:
        """What a value is another shape of."""
        node = self._made_by.get(name)
        return node.input[0] if node is not None and node.op_type == "Reshape" and domain_of(node) == "" else name

    def columns(self, name: str, like: str, heads: int, size: int) -> tuple[str, int, int] | None:
        """Where heads lie: in what value [B, T, W], from which column on, and how far they are apart; None: in none.

        Args:
            name: The heads, in whatever shape.
            like: Another value [B, T, heads * size].
            heads: How many.
            size: Of each.
        """
        whole = self.spec(like)
        assert whole is not None
        rows, start, stride, found = whole.shape[:2], 0, size, None
        while True:
            spec, node = self.spec(name), self._made_by.get(name)
            is_row = spec is not None and spec.rank == 3 and spec.shape[:2] == rows
            if is_row:
                found = name, start, stride
            if spec is None or node is None:
                return found
            if node.op_type != "Reshape" or domain_of(node) != "":
                sizes, source = columns_of(node, self._types), self.spec(node.input[0])
                by_head = spec.shape == (*rows, heads, size) and stride == size
                if not sizes or source is None or not (is_row or by_head):
                    return found
                start += sum(sizes[: list(node.output).index(name)])
                stride = stride if is_row else source.shape[-1] or 0
            name = node.input[0]
