"""The contract of GatherColumns, a node that the frontend makes of ``Gather(table, indices)``.

    linattn.GatherColumns(weight [K, N], indices) -> output [indices..., K]     output[i, :] = weight[:, indices[i]]

The table is the transpose of a weight that products read as [K, N]. Negative indices count from the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import require_dtype
from ..node import Node, TensorSpec


@dataclass(frozen=True)
class GatherColumns:
    """Contract.

    Attributes:
        where: The node, as errors name it.
        weight: [K, N], static.
        indices: Of any shape, i32 or i64.
        constant: Whether ``weight`` is one of the model's weights.
    """

    where: str
    weight: TensorSpec
    indices: TensorSpec
    constant: bool

    @property
    def depth(self) -> int:
        """K."""
        return self.weight.shape[0] or 0

    @property
    def columns(self) -> int:
        """N."""
        return self.weight.shape[1] or 0


def parse(node: Node) -> GatherColumns:
    """Check the node; see the contract."""
    weight, indices = node.required(0, "weight"), node.required(1, "indices")
    require_dtype(node, "indices", indices, "i64", "i32")
    return GatherColumns(node.where, weight, indices, 0 in node.weights)


def output_types(contract: GatherColumns) -> Sequence[TensorSpec]:
    """The output's type."""
    return [TensorSpec((*contract.indices.shape, contract.depth), contract.weight.dtype)]
