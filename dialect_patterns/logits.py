"""Logits that a token is chosen from: what NextToken and DrawToken both ask of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .node import FLOATS, Node, TensorSpec

MOST_IDS = 1 << 24
"""Ids are counted in f32."""


@dataclass(frozen=True)
class Logits:
    """Rows of them.

    Attributes:
        logits: [..., V], floats, static.
    """

    logits: TensorSpec

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.logits.shape[-1] or 0

    @property
    def rows(self) -> int:
        """B."""
        return math.prod(size or 0 for size in self.logits.shape[:-1])


def check_logits(node: Node) -> TensorSpec:
    """The first input of a node, which a token can be chosen from.

    Raises:
        UnsupportedModelError: if none can.
    """
    logits = node.required(0, "logits")
    if logits.dtype not in FLOATS or logits.rank < 2 or None in logits.shape or 0 in logits.shape:
        raise node.error("input 'logits' cannot be chosen from", got=str(logits), expected="[..., V] of floats, static")
    if (logits.shape[-1] or 0) > MOST_IDS:
        raise node.error("too many logits", got=logits.shape[-1], expected=f"at most {MOST_IDS}")
    return logits


def token_types(contract: Logits) -> Sequence[TensorSpec]:
    """A token for each row."""
    return [TensorSpec(contract.logits.shape[:-1], "i64")]
