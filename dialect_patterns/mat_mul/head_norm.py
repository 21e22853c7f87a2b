"""A gated norm by heads as the left operand of products of one row, inside of their kernels.

    n = rms_norm(x, by heads) * scale * activation(gate)                    as GatedRMSNorm (``norms.gated_rms_norm``)

The threads of a subgroup are inside of one head. Each thread adds up squares of its share of the head, which is there
for the whole of it to be read once more, and the subgroup's shuffles do the rest: nobody waits for other subgroups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer, Kernel

_WIDTH = 4


@dataclass(frozen=True)
class HeadNorm:
    """What is done with the left operand first.

    Attributes:
        scale: Weights, [size].
        gate: Of the shape of the left operand.
        size: Elements of a head, a power of two.
        epsilon: Added to the mean square.
        multiplies_gate: Whether the activation is z * sigmoid(z) rather than sigmoid(z).
    """

    scale: ir.Value
    gate: ir.Value
    size: int
    epsilon: float
    multiplies_gate: bool

    @property
    def operands(self) -> list[ir.Value]:
        """What the kernel reads beside the left operand and the matrices."""
        return [self.scale, self.gate]

    @property
    def with_sum(self) -> bool:
        """Whether the kernel has a further result."""
        return False

    def __str__(self) -> str:
        factor = self.epsilon.hex().replace(".", "p").replace("-", "m").replace("+", "")
        return f"_heads{self.size}_{'silu' if self.multiplies_gate else 'sigmoid'}{factor}"


def fits_subgroups(size: int, lanes: int, subgroup: int) -> bool:
    """Whether the threads of a subgroup, ``lanes`` for each vector of a row, stay inside of a head."""
    vectors = size // _WIDTH
    return size % _WIDTH == 0 and vectors & (vectors - 1) == 0 and vectors * lanes >= subgroup > 0


def load_left(
    k: Kernel, norm: HeadNorm, a: Buffer, lists: Sequence[Buffer], place: Scalar, subgroup: int
) -> Callable[[], ir.Value]:
    """Loads what a vector of the operand takes; returns what computes it.

    Args:
        k: Emits instructions.
        norm: What is computed.
        a: Rows in vectors.
        lists: Scale and gate in vectors.
        place: The vector; of one head for all threads of a subgroup.
        subgroup: Its threads.
    """
    vectors = norm.size // _WIDTH
    head, inside = place.divide_unsigned(vectors)
    lanes = min(subgroup, vectors)
    first = head * vectors + (k.thread() & (lanes - 1))
    stored = [k.load(a, place), k.load(lists[0], inside), k.load(lists[1], place)]
    shares = [k.load(a, first + start) for start in range(0, vectors, lanes)]

    def compute() -> ir.Value:
        squares = k.constant(0.0, _WIDTH)
        for share in shares:
            wide = k.widen(a, share)
            squares = k.fma(wide, wide, squares)
        inverse = inverse_of(k, norm, squares, lanes)
        x, scale, gate = (k.widen(one, value) for one, value in zip((a, *lists), stored, strict=True))
        return gated(k, norm, x, inverse, scale, gate)

    return compute


def inverse_of(k: Kernel, norm: HeadNorm, squares: ir.Value, lanes: int) -> ir.Value:
    """1 / sqrt(mean square + epsilon) of a head, of this thread's squares and those of its neighbours."""
    total, *rest = k.elements(squares)
    for element in rest:
        total = k.add(total, element)
    offset = 1
    while offset < lanes:
        total = k.add(total, k.shuffle_xor(total, offset))
        offset *= 2
    return k.rsqrt(k.add(k.mul(total, k.constant(1.0 / norm.size)), k.constant(norm.epsilon)))


def gated(k: Kernel, norm: HeadNorm, x: ir.Value, inverse: ir.Value, scale: ir.Value, gate: ir.Value) -> ir.Value:
    """A vector of the result."""
    one = k.constant(1.0, _WIDTH)
    opened = k.div(gate if norm.multiplies_gate else one, k.add(one, k.exp(k.neg(gate))))
    return k.mul(k.mul(k.mul(x, k.splat(inverse, _WIDTH)), scale), opened)
