"""Names for values that passes add, which no model can have by chance or on purpose."""

from __future__ import annotations

import onnx


class Names:
    """The names of a graph's values.

    Args:
        graph: The graph.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._taken = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        self._taken |= {name for node in graph.node for name in node.output}

    def new(self, name: str) -> str:
        """This name, or one like it where there is a value of the name already."""
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name
