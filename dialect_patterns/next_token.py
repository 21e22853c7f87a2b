"""NextToken (of our own): the token with the largest logit, so that a step hands back a number and not a vocabulary.

    linattn.NextToken(logits [..., V]) -> [...] i64     the first of equal ones; -1 where there is a NaN

The frontend puts it behind the logits of one more entry point (``frontend.graph.next_token``).

Logits are compared as unsigned integers of the same order; a NaN is the largest of all. A vocabulary is reduced in
blocks first, each by a workgroup of its own, then the blocks; then the least token is looked for that is equal to the
largest. Unsigned: on CUDA, IREE 3.13 begins the sums of a warp with 0 for the largest signed integer, and -1 for the
smallest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from iree.compiler import ir
from iree.compiler.dialects import arith

from .emit.scalar import Scalar, element_type
from .node import FLOATS, Node, TensorSpec
from .op import INTERNAL, LoweringContext, Op

NEXT_TOKEN = "NextToken"

_MAGNITUDE, _SIGN, _ALL = (1 << 31) - 1, -(1 << 31), -1
_INFINITY = 0x7F800000
"""The bits of an infinity; a NaN has larger ones."""

_BLOCKS = range(1024, 63, -1)
"""Sizes of blocks, the best first: enough for a workgroup, and not so many that the second reduction is a long one."""


@dataclass(frozen=True)
class NextToken:
    """Contract.

    Attributes:
        logits: [..., V], floats, V static.
    """

    logits: TensorSpec

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.logits.shape[-1] or 0


def parse(node: Node) -> NextToken:
    """Check the node; see the contract."""
    logits = node.required(0, "logits")
    if logits.dtype not in FLOATS or logits.rank < 2 or not logits.shape[-1]:
        raise node.error("input 'logits' cannot be chosen from", got=str(logits), expected="[..., V] of floats")
    return NextToken(logits)


def output_types(contract: NextToken) -> Sequence[TensorSpec]:
    """A number for each row."""
    return [TensorSpec(contract.logits.shape[:-1], "i64")]


def lower(context: LoweringContext, contract: NextToken, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Emit reductions over blocks and over their results."""
    b, (logits,) = context.builder, operands
    assert logits is not None
    lead = b.shape(logits)[:-1]
    rows = b.collapse(logits, 0, len(lead) - 1) if len(lead) > 1 else logits
    size = next((size for size in _BLOCKS if contract.vocabulary % size == 0 and size < contract.vocabulary), 1)
    blocks = b.expand(rows, 1, [contract.vocabulary // size, size])
    highest = b.reduce("rnc->rn", lambda acc, x: acc.maximum_unsigned(_key(x)), blocks, initial=0, dtype="i32")
    best = b.reduce("rn->r", lambda acc, x: acc.maximum_unsigned(x), highest, initial=0, dtype="i32")
    first = b.reduce(
        "rnc,r,c->rn", lambda acc, x, m, c: acc.minimum_unsigned(_key(x).equals(m).select(c, _number(_ALL))),
        blocks, best, _numbers(size, 1), initial=_ALL, dtype="i32",
    )  # fmt: skip
    place = b.reduce(
        "rn,n->r", lambda acc, c, start: acc.minimum_unsigned(c.equals(_ALL).select(c, start + c)),
        first, _numbers(contract.vocabulary // size, size), initial=_ALL, dtype="i32",
    )  # fmt: skip
    chosen = b.map("r,r->r", lambda p, m: m.equals(_ALL).select(_number(-1), p), place, best)
    token = b.cast(chosen, "i64")
    return [b.expand(token, 0, lead) if len(lead) > 1 else token]


def _number(value: int) -> Scalar:
    return Scalar.constant(value, "i32")


def _numbers(count: int, step: int) -> ir.Value:
    """0, step, 2 step, ... as a constant: IREE 3.13 puts the indices of a reduction over f16 where Vulkan has none."""
    values = np.arange(0, count * step, step, dtype=np.int32)
    return arith.ConstantOp(
        ir.RankedTensorType.get([count], element_type("i32")), ir.DenseElementsAttr.get(values)
    ).result


def _key(logit: Scalar) -> Scalar:
    """An unsigned integer for a logit: of the same order, zeros alike, a NaN above all."""
    bits = logit.to("f32").bits()
    magnitude = bits & _MAGNITUDE
    key = (bits < 0).select(bits ^ _ALL, bits ^ _SIGN)
    return (magnitude > _INFINITY).select(_number(_ALL), magnitude.equals(0).select(_number(_SIGN), key))


OPS = (Op(INTERNAL, NEXT_TOKEN, 1, parse, output_types, lower),)
