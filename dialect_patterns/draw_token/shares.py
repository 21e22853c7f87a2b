"""A bound that at least k logits of a row reach, and not many more, without reading the row again.

Each element of each thread's vectors has seen a share of the row and knows the largest logit of it: the largest ones
of k shares are k logits. How many shares reach a bound is counted in registers, so that a search for it costs nothing
but barriers; of most of the row nothing is kept to be looked at again.
"""

from __future__ import annotations

from iree.compiler import ir

from ..emit.scalar import Scalar
from ..emit.workgroup import Workgroup
from .contract import FURTHEST

_ENOUGH = 2.0
"""Shares that may reach the bound, for one of the k."""

_ROUNDS = 16.0
_LOWEST = -1e30


def low_enough(
    w: Workgroup, shares: ir.Value, most: ir.Value, temperature: ir.Value, top_k: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """The bound, and whether there is one: where top-k is asked for, and so many logits are near enough to be drawn.

    Args:
        w: The workgroup.
        shares: The largest logits that the elements of this thread's vectors have seen.
        most: The largest of all; finite.
        temperature: Not zero.
        top_k: How many; 0: all.
    """
    k = w.k
    lowest = k.sub(most, k.mul(k.constant(FURTHEST), temperature))
    few = k.mul(top_k, k.constant(_ENOUGH))

    def reaching(bound: ir.Value) -> ir.Value:
        (count,) = w.together(["add"], [w.where(w.compare(shares, "OGE", w.all(bound)), 1.0, 0.0)])
        return count

    def is_open(carried: list[ir.Value]) -> ir.Value:
        _, _, count, rounds = carried
        return w.both(w.compare(count, "OGT", few), w.compare(rounds, "OLT", k.constant(_ROUNDS)))

    def halve(carried: list[ir.Value]) -> list[ir.Value]:
        low, high, count, rounds = carried
        middle = k.add(low, k.mul(k.sub(high, low), k.constant(0.5)))
        there = reaching(middle)
        enough = w.compare(there, "OGE", top_k)
        ends = [w.where(enough, middle, low), w.where(enough, high, middle), w.where(enough, there, count)]
        return [*ends, k.add(rounds, k.constant(1.0))]

    def search() -> list[ir.Value]:
        low, _, count, _ = w.repeat([lowest, most, reaching(lowest), k.constant(0.0)], is_open, halve)
        return [low, w.compare(count, "OGE", top_k)]

    def none() -> list[ir.Value]:
        return [lowest, Scalar.constant(0, "i1").value]

    asked = w.compare(top_k, "OGT", k.constant(0.0))
    asked = w.both(asked, w.compare(lowest, "OGT", k.constant(_LOWEST)))
    low, is_enough = k.choose(Scalar(asked), search, none, [lowest.type, ir.IntegerType.get_signless(1)])
    return low, is_enough
