"""What DrawToken takes and gives.

    linattn.DrawToken(logits [..., V], settings [B, 8] f32) -> [...] i64        B rows of logits

The settings of a row, in this order: temperature (0: the first of the largest logits), top_k (0: all), top_p, min_p
(as ``linattn.runtime.Sampling`` has them), reach, a random number in [0, 1), and two that mean nothing. Logits that are
more than ``reach`` times the temperature below the largest one are not drawn, but where fewer than top_k are nearer.
Whoever calls knows how far top-p and min-p can go; else it is 87, where f32 has no probabilities any more.

Tokens that remain stand in the order of their ids, each as long as it is likely; the one that the random number points
at is the answer: the same that ``linattn.runtime`` finds on the host with f64. -1 where there is a NaN, -2 where no
logit is finite.
"""

from __future__ import annotations

from ..logits import Logits, check_logits
from ..node import Node, TensorSpec

DRAW_TOKEN = "DrawToken"
SETTINGS = 8
"""Numbers a row."""

FURTHEST = 87.0
"""The reach of f32."""


class DrawToken(Logits):
    """Contract."""


def parse(node: Node) -> DrawToken:
    """Check the node; see the contract."""
    contract, settings = DrawToken(check_logits(node)), node.required(1, "settings")
    wanted = TensorSpec((contract.rows, SETTINGS), "f32")
    if settings != wanted:
        raise node.error("input 'settings' is another one", got=str(settings), expected=str(wanted))
    return contract
