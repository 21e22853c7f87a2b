"""What a MatMul node computes: y [..., M, N] = a [..., M, K] b [..., K, N]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..node import Dim, Node, TensorSpec


@dataclass(frozen=True)
class MatMul:
    """Contract.

    Attributes:
        where: The node, as errors name it.
        a: Left operand.
        b: Right operand.
    """

    where: str
    a: TensorSpec
    b: TensorSpec

    @property
    def is_plain(self) -> bool:
        """Whether it is rows times one static matrix: [..., K] of at least two dimensions by [K, N], of one float type."""
        return (
            self.a.rank >= 2
            and self.b.rank == 2
            and self.a.dtype == self.b.dtype
            and self.a.dtype in ("f32", "f16", "bf16")
            and None not in self.b.shape
            and self.a.shape[-1] == self.b.shape[0]
        )

    @property
    def rows(self) -> Dim:
        """M of the plain product: the product of all dimensions of ``a`` but the last; None where one is open."""
        lead = self.a.shape[:-1]
        return None if None in lead else math.prod(size or 0 for size in lead)

    @property
    def depth(self) -> int:
        """K of the plain product."""
        return self.b.shape[0] or 0

    @property
    def columns(self) -> int:
        """N of the plain product."""
        return self.b.shape[1] or 0


def parse(node: Node) -> MatMul:
    """View the node; whatever ONNX allows is allowed."""
    return MatMul(node.where, node.required(0, "A"), node.required(1, "B"))


def output_types(contract: MatMul) -> Sequence[TensorSpec | None]:
    """The output's type."""
    a, b = contract.a.shape, contract.b.shape
    left, right = a[-2:-1], b[-1:] if len(b) > 1 else ()
    longer, shorter = sorted((a[:-2], b[:-2]), key=len, reverse=True)
    start = len(longer) - len(shorter)
    lead = [*longer[:start], *(x if y == 1 else y for x, y in zip(longer[start:], shorter, strict=True))]
    return [TensorSpec((*lead, *left, *right), contract.a.dtype)]
