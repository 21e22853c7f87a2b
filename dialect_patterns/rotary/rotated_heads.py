"""RotatedHeads (of our own): the heads of some columns normalised and rotated, as one CPU kernel for many tokens.

    linattn.RotatedHeads(x [B, T, W], ..., gamma?) -> [B, T, H * D]         ...: positions, cosines and sines
        head h of a token: columns start + h * stride on, D of them; x' = x / sqrt(mean(x^2) + epsilon) * gamma
        y[c] = x'[c] cos[c] - x'[c + R/2] sin[c],  y[c + R/2] = x'[c + R/2] cos[c] + x'[c] sin[c],  y = x' behind R

The frontend makes it of RotaryEmbedding or MRotaryEmbedding with the RMS norm and the casts around it, and of the
columns of a product that a Split would copy (``frontend.graph.rotate_heads``). ``operator`` and ``operator_domain`` say
which of the two, whose other inputs and attributes the node has. All is in f32 and rounded once. IREE 3.13 looks each
element's partner and angles up by themselves: 1.3 ms for 1 M elements on two cores, where the memory takes 0.2.

    %cos, %sin = two small tables [B, T, R/2], which all heads and layers share
    %y = flow.dispatch @rotated_heads_...[%rows](%rows, %x, %cos, %sin, %gamma?)

Legal: on CPUs, for pairs that lie half the rotated elements apart, where vectors divide the halves and the heads.
Cost: x once in and once out. Source: as ``rotary_embedding``, ``m_rotary_embedding`` and ``rms_normalization``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from iree.compiler import ir

from ..emit.dispatch import Kernel, dispatch
from ..emit.kernel_text import Index, KernelText
from ..emit.scalar import Scalar
from ..machines import for_machines
from ..node import Node, TensorSpec
from ..op import INTERNAL, Choice, LoweringContext, LoweringOptions, Op
from ..target import Target
from . import m_rotary_embedding, rotary_embedding
from .m_rotary_embedding import MRotaryEmbedding
from .rotary_embedding import RotaryEmbedding, Rotation

ROTATED_HEADS = "RotatedHeads"
_OWN = ("operator", "operator_domain", "start", "stride", "size", "epsilon")
_MIN_LANES = 4
_ELEMENTS = 16_384  # of a workgroup
_AT_ONCE = 4  # vectors of squares


@dataclass(frozen=True)
class RotatedHeads:
    """Contract.

    Attributes:
        x: [B, T, W].
        start: First column of the first head.
        stride: Columns from one head to the next.
        turning: What is done to the heads, as if they were apart, in f32.
        epsilon: Of the norm; None: there is none.
    """

    x: TensorSpec
    start: int
    stride: int
    turning: RotaryEmbedding | MRotaryEmbedding
    epsilon: float | None

    @property
    def rotation(self) -> Rotation:
        """What is rotated."""
        return self.turning.rotation

    @property
    def y(self) -> TensorSpec:
        """The result's type."""
        return TensorSpec(self.rotation.x.shape, self.x.dtype)


def parse(node: Node) -> RotatedHeads:
    """View the node; what it was made of has been checked."""
    normed, operator, domain = "epsilon" in node.attributes, node.attr("operator", ""), node.attr("operator_domain", "")
    x, heads, size = node.required(0, "x"), node.attr("num_heads", 0), node.attr("size", 0)
    inputs = [node.input(index) for index in range(len(node.inputs))]
    cos = inputs[2 if domain else 1]
    assert cos is not None
    inputs[0] = TensorSpec((*x.shape[:2], heads * size), cos.dtype)
    attributes = {name: value for name, value in node.attributes.items() if name not in _OWN}
    own = tuple(inputs[:-1] if normed else inputs)
    inner = replace(node, domain=domain, op_type=operator, inputs=own, attributes=attributes)
    if operator == "MRotaryEmbedding":
        turning = m_rotary_embedding.parse(inner)
    else:
        turning = (rotary_embedding.parse_microsoft if domain else rotary_embedding.parse_onnx)(inner)
    epsilon = node.attr("epsilon", 0.0) if normed else None
    return RotatedHeads(x, node.attr("start", 0), node.attr("stride", 0), turning, epsilon)


def output_types(contract: RotatedHeads) -> Sequence[TensorSpec | None]:
    """The outputs' types."""
    return [contract.y]


def can_rotate(rotation: Rotation, target: Target) -> bool:
    """Whether there is a kernel: for many tokens, whose sizes are known."""
    size, half = rotation.head_size, rotation.rotated // 2
    if target.is_gpu or not target.vector_bits or rotation.interleaved or rotation.x.rank != 3:
        return False
    if None in rotation.x.shape or not size or rotation.x.shape[1] == 1:
        return False
    return all(_lanes(rotation, machine) >= _MIN_LANES for machine in target.machines) and half > 0


def _lanes(rotation: Rotation, target: Target) -> int:
    """Lanes of a vector, which divide half the rotated elements and a head."""
    both = math.gcd(rotation.rotated // 2, rotation.head_size or 0)
    return min(both & -both, max(target.vector_bits // 32, _MIN_LANES))


def choose(contract: RotatedHeads, target: Target, options: LoweringOptions) -> Choice:
    """There is one way."""
    del target, options
    normed = ", their norms included" if contract.epsilon is not None else ""
    return Choice("fused_simd", f"{contract.rotation.heads} heads in one kernel{normed}")


def lower(context: LoweringContext, contract: RotatedHeads, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Emit the tables and the kernel."""
    b, c = context.builder, contract
    own, gamma = (operands, None) if c.epsilon is None else (operands[:-1], operands[-1])
    x, turning = operands[0], c.turning
    if isinstance(turning, MRotaryEmbedding):
        cos, sin, find = m_rotary_embedding.lookup(b, turning, own)
    else:
        cos, sin, find = rotary_embedding.lookup(b, turning, own)
    assert x is not None
    sizes = {"b": b.dim(x, 0), "t": b.dim(x, 1), "d": c.rotation.rotated // 2}

    def table(cache: ir.Value) -> ir.Value:
        def element() -> Scalar:
            return find(cache, b.loop_index(0), b.loop_index(1), b.loop_index(2)).to("f32")

        return b.collapse(b.map("->btd", element, dtype="f32", sizes=sizes), 0, 1)

    kernel = for_machines(context.target, lambda machine: _kernel(c, machine))
    rows = b.collapse(x, 0, 1)
    given = [rows, table(cos), table(sin), *([gamma] if gamma is not None else [])]
    (y,) = dispatch(b, kernel, given, b.dim(rows, 0), 1)
    return [b.expand(y, 0, b.shape(x)[:2])]


def _kernel(c: RotatedHeads, target: Target) -> Kernel:
    lanes, rotation = _lanes(c.rotation, target), c.rotation
    heads, size, half = rotation.heads or 0, rotation.head_size or 0, rotation.rotated // 2
    share = max(1, _ELEMENTS // (heads * size))
    given = [TensorSpec((None, c.x.shape[-1]), c.x.dtype), *[TensorSpec((None, half), "f32")] * 2]
    given += [TensorSpec((size,), c.x.dtype)] if c.epsilon is not None else []

    def write(k: KernelText, batch: Index, tokens: Index, memrefs: Sequence[str]) -> None:
        del tokens
        first = k.mul(k.op("hal.interface.workgroup.id[1] : index", "index"), share)
        body = _Body(k, c, lanes, memrefs)
        k.loop(k.minimum(batch, k.add(first, share)), [], lambda row, _: body.row(row), start=first)

    epsilon = "" if c.epsilon is None else "_" + c.epsilon.hex().replace(".", "p").replace("-", "m").replace("+", "")
    place = f"{c.start}by{c.stride}of{c.x.shape[-1]}"
    return Kernel(
        name=f"rotated_heads_{c.x.dtype}_{heads}x{size}r{rotation.rotated}_{place}{epsilon}_v{target.vector_bits}",
        inputs=tuple(given),
        outputs=(TensorSpec((None, heads * size), c.x.dtype),),
        axes=("B_", "B_", "B_", *(["_"] if c.epsilon is not None else []), "B_"),
        workgroups=(1, 1),
        write=write,
        share=share,
    )


class _Body:
    """Writes what is done to a row; x [R, W], cos and sin [R, R/2], gamma [D] if there is a norm, y [R, H * D]."""

    def __init__(self, k: KernelText, c: RotatedHeads, lanes: int, memrefs: Sequence[str]) -> None:
        self.k, self.c, self.lanes = k, c, lanes
        self.x, self.cos, self.sin, *gamma, self.y = memrefs
        self.gamma = gamma[0] if gamma else ""
        self.size, self.half = c.rotation.head_size or 0, c.rotation.rotated // 2

    def row(self, row: Index) -> list[str]:
        """All heads of a token."""

        def head(index: str, _: list[str]) -> list[str]:
            k = self.k
            source = k.add(self.c.start, k.mul(index, self.c.stride))
            self._head(row, source, k.mul(index, self.size))
            return []

        self.k.loop(self.c.rotation.heads or 0, [], head)
        return []

    def _head(self, row: Index, source: Index, target: Index) -> None:
        k, lanes, half = self.k, self.lanes, self.half
        factor = self._factor(row, source) if self.gamma else ""

        def value(d: Index) -> str:
            found = k.load(self.x, [row, k.add(source, d)], lanes)
            return k.mulf(k.mulf(found, factor), k.load(self.gamma, [d], lanes)) if factor else found

        def rotate(d: str, _: list[str]) -> list[str]:
            cos, sin = (k.load(table, [row, d], lanes) for table in (self.cos, self.sin))
            first, second = value(d), value(k.add(d, half))
            k.store(k.fma(first, cos, k.negate(k.mulf(second, sin))), self.y, [row, k.add(target, d)])
            k.store(k.fma(second, cos, k.mulf(first, sin)), self.y, [row, k.add(target, k.add(d, half))])
            return []

        def rest(d: str, _: list[str]) -> list[str]:
            k.store(value(d), self.y, [row, k.add(target, d)])
            return []

        k.loop(half, [], rotate, step=lanes)
        k.loop(self.size, [], rest, start=2 * half, step=lanes)

    def _factor(self, row: Index, source: Index) -> str:
        """One over the root of the mean square."""
        k, lanes = self.k, self.lanes
        assert self.c.epsilon is not None
        vectors = _AT_ONCE if self.size % (_AT_ONCE * lanes) == 0 else 1
        zero = k.constant(0.0, f"vector<{lanes}xf32>")

        def square(d: str, sums: list[str]) -> list[str]:
            values = [k.load(self.x, [row, k.add(source, k.add(d, n * lanes))], lanes) for n in range(vectors)]
            return [k.fma(one, one, total) for one, total in zip(values, sums, strict=True)]

        first, *others = k.loop(self.size, [zero] * vectors, square, step=vectors * lanes)
        for other in others:
            first = k.addf(first, other)
        one, size, epsilon = (k.constant(value, "f32") for value in (1.0, float(self.size), self.c.epsilon))
        mean = k.addf(k.divf(k.sum_lanes([first])[0], size), epsilon)
        return k.divf(one, k.op(f"math.sqrt {mean} : f32", "f32"))


OPS = (Op(INTERNAL, ROTATED_HEADS, 1, parse, output_types, lower, choose),)
