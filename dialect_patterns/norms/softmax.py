"""Softmax (ai.onnx 13) of 16-bit types along an open axis, computed in f32 and rounded once.

IREE's own keeps a row in f32 beside the rounded one, in a CPU's stack or a workgroup's memory, and does not compile
where the length of a row is open: attention that is spelled out, over a cache that grows.
Source: ONNX operator schema Softmax-13.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..checks import only_attributes
from ..emit.builder import LETTERS, spec_of
from ..node import FLOATS, Node, TensorSpec
from ..op import IMPORTED, Choice, LoweringContext, LoweringOptions, Op
from ..target import Target

_LOWEST = -3.4028234663852886e38


@dataclass(frozen=True)
class Softmax:
    """Contract.

    Attributes:
        x: Of any shape, f32, f16, bf16 or f64.
        axis: Along which the results have the sum 1, not negative.
    """

    x: TensorSpec
    axis: int


def parse(node: Node) -> Softmax:
    """Check the node; see the contract."""
    only_attributes(node, "axis")
    x = node.required(0, "input")
    if x.dtype not in (*FLOATS, "f64"):
        raise node.error("input 'input' has an unsupported type", got=x.dtype, expected="f32, f16, bf16 or f64")
    axis = node.attr("axis", -1)
    if not -x.rank <= axis < max(x.rank, 1):
        raise node.error("attribute 'axis'", got=axis, expected=f"{-x.rank} to {x.rank - 1}")
    return Softmax(x, axis % max(x.rank, 1))


def output_types(contract: Softmax) -> Sequence[TensorSpec]:
    """The output's type."""
    return [contract.x]


def choose(contract: Softmax, target: Target, options: LoweringOptions) -> Choice:
    """IREE's own wherever that compiles."""
    del target, options
    x = contract.x
    if x.dtype in ("f16", "bf16") and x.shape[contract.axis] is None:
        return Choice("linalg", f"IREE's own takes no {x.dtype} along an open axis")
    return Choice(IMPORTED, "IREE's own")


def lower(context: LoweringContext, contract: Softmax, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Two reductions and two elementwise loops."""
    b = context.builder
    (x,) = operands
    assert x is not None
    letters = LETTERS[: spec_of(x).rank]
    rows = letters[: contract.axis] + letters[contract.axis + 1 :]
    highest = b.reduce(f"{letters}->{rows}", lambda acc, s: acc.maximum(s.to("f32")), x, initial=_LOWEST)
    weights = b.map(f"{letters},{rows}->{letters}", lambda s, m: (s.to("f32") - m).exp(), x, highest, dtype="f32")
    sums = b.sum(f"{letters}->{rows}", weights)
    return [b.map(f"{letters},{rows}->{letters}", lambda w, n: w / n, weights, sums, dtype=contract.x.dtype)]


OPS = (Op("", "Softmax", 13, parse, output_types, lower, choose),)
