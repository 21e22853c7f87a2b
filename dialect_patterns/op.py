"""What an operator module provides: how to check, type and lower one ONNX operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from iree.compiler import ir

from .emit.builder import Builder
from .node import Node, TensorSpec
from .target import Target

MICROSOFT = "com.microsoft"
INTERNAL = "linattn"
"""Domain of nodes that the frontend makes; models cannot contain them."""

IMPORTED = "imported"
"""The strategy that leaves a node to IREE's importer; not an operator's own to emit."""


@dataclass(frozen=True)
class Choice:
    """Which strategy lowers a node, and why the others do not.

    Attributes:
        strategy: The strategy's word, the same in file, function, option and report.
        reason: Why it was chosen.
        rejected: Strategy -> reason, for each better one that was not taken.
        rule: What the report shows as the node's rule (the update rule, the activation), or "".
        heads: What the report shows as the node's heads, such as ``2/2/4 x 128x128``, or "".
    """

    strategy: str
    reason: str = ""
    rejected: dict[str, str] = field(default_factory=dict[str, str])
    rule: str = ""
    heads: str = ""


@dataclass(frozen=True)
class LoweringOptions:
    """What the user asked of the lowering.

    Attributes:
        strategy: Forced strategy for the two state operators, or None to choose.
        chunk_size: Tokens a chunk in chunk-parallel forms, or None for the default of target and head size.
    """

    strategy: str | None = None
    chunk_size: int | None = None


class WeightStore(Protocol):
    """The model's weights, for strategies that want them in an order of their own."""

    def repacked(
        self,
        symbol: str,
        layout: str,
        repack: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]],
        dtype: str | None = None,
    ) -> ir.Value:
        """A weight in another layout, read at the current insertion point; stored once, whoever asks.

        Args:
            symbol: The weight's global, see :func:`weight_symbol`.
            layout: Word for the layout, unique with the symbol.
            repack: Makes the new array.
            dtype: MLIR's element type of the new array; None where it is the same.
        """
        ...


def weight_symbol(value: ir.Value) -> str | None:
    """The global that a torch or builtin tensor is loaded from, through casts; None for anything computed."""
    owner = value.owner
    while not isinstance(owner, ir.Block):
        op = owner.operation
        if op.name == "util.global.load":
            return ir.FlatSymbolRefAttr(op.attributes["global"]).value
        if not op.name.startswith("torch_c."):
            return None
        owner = op.operands[0].owner
    return None


@dataclass(frozen=True)
class LoweringContext:
    """What a lowering may look at besides its contract.

    Attributes:
        builder: Emits ops at the place of the node.
        target: Capabilities of the machine to compile for.
        options: What the user asked for.
        position: In an entry point whose KV caches have a fixed capacity: how many tokens are committed, an index
            value; None elsewhere.
        weights: The model's weights; None where there are none.
    """

    builder: Builder
    target: Target
    options: LoweringOptions = LoweringOptions()
    position: ir.Value | None = None
    weights: WeightStore | None = None


@dataclass(frozen=True)
class Op:
    """One operator in one domain.

    Attributes:
        domain: ``""`` for ai.onnx, else the domain.
        op_type: The operator's name.
        since: The first opset version of the domain that this entry covers.
        parse: Checks a node and turns it into the module's contract (a frozen dataclass). Raises
            UnsupportedModelError. Open dimensions (None) are accepted as whatever they may be.
        output_types: The outputs' types, from the contract; None for an output that the node leaves out.
        lower: Emits the operator. Operands are builtin tensors, None where left out; returns one builtin tensor an
            output, None where not wanted; or None to leave the node to IREE's importer. May not fail on user input.
        choose: For operators with several strategies: the choice. Raises LoweringError if a forced one is not legal.
    """

    domain: str
    op_type: str
    since: int
    parse: Callable[[Node], Any]
    output_types: Callable[[Any], Sequence[TensorSpec | None]]
    lower: Callable[[LoweringContext, Any, Sequence[ir.Value | None]], Sequence[ir.Value | None] | None]
    choose: Callable[[Any, Target, LoweringOptions], Choice] | None = None
