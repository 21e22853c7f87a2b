"""Choose (of our own): one of two values, by a condition that is known before anything is lowered.

    linattn.Choose(condition, then, else) -> then where the condition holds, else the other one

The frontend makes it of ONNX's If, so that both branches are part of the graph, and replaces it when the sizes of an
entry point are bound (``frontend.graph.branches``). It is here for its type alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from .node import Node, TensorSpec
from .op import INTERNAL, LoweringContext, Op

CHOOSE = "Choose"


@dataclass(frozen=True)
class Choose:
    """Contract.

    Attributes:
        values: The two values.
    """

    values: tuple[TensorSpec, TensorSpec]


def parse(node: Node) -> Choose:
    """View the node."""
    return Choose((node.required(1, "then"), node.required(2, "else")))


def output_types(contract: Choose) -> Sequence[TensorSpec | None]:
    """What the two values have in common; None where that is not even a rank."""
    one, other = contract.values
    if one.rank != other.rank or one.dtype != other.dtype:
        return [None]
    return [TensorSpec(tuple(a if a == b else None for a, b in zip(one.shape, other.shape, strict=True)), one.dtype)]


def lower(context: LoweringContext, contract: Choose, operands: Sequence[ir.Value | None]) -> None:
    """Leave it alone: there is none left."""
    del context, contract, operands


OPS = (Op(INTERNAL, CHOOSE, 1, parse, output_types, lower),)
