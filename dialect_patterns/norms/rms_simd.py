"""RMS norms of rows as one hand-made CPU kernel: the sum before it and the gate behind it included.

    total = x + skip (+ bias)                    where there is a skip; in f32, rounded where it is stored
    y = total / sqrt(mean(total^2) + epsilon) * gamma               (* gate * sigmoid(gate), or * sigmoid(gate))

    %y, %total = flow.dispatch @rms_fused_simd_...[%rows](%rows, %x, %skip, %gamma, ...)

A workgroup has some rows. A sum stays on the stack between the squares and the scaling, another row is read again from
the first-level cache. Rows of few elements are done four at once, of others four vectors. IREE 3.13 makes two kernels
of a norm with a skip, and goes through each row of a gated one with vectors of a few elements.

Legal: on CPUs, where vectors divide static rows that fit on the stack. Cost: inputs and outputs once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..emit.builder import Builder, Size, spec_of
from ..emit.dispatch import Kernel, dispatch
from ..emit.kernel_text import Index, KernelText
from ..machines import for_machines
from ..node import TensorSpec
from ..op import LoweringContext
from ..select import Legality, No, OtherMachine, Yes
from ..target import Target

_MIN_LANES = 4
_MAX_SIZE = 8192  # elements of a row; four times as many bytes of stack
_ELEMENTS = 16_384  # of a workgroup
_AT_ONCE = 4
_SHORT = 512  # elements of rows that are done together


@dataclass(frozen=True)
class Norm:
    """What is computed.

    Attributes:
        size: Elements of a row.
        dtype: Type of the rows and of the results.
        weight_dtype: Of gamma.
        epsilon: Added to the mean square.
        with_skip: Whether two parts are added first.
        with_bias: Whether a bias is added to these.
        with_sum: Whether the sum is a result.
        gate: "silu" or "sigmoid", what becomes of the gate; "": there is none.
    """

    size: int
    dtype: str
    weight_dtype: str
    epsilon: float
    with_skip: bool = False
    with_bias: bool = False
    with_sum: bool = False
    gate: str = ""


def is_legal(size: int | None, target: Target) -> Legality:
    """For rows that vectors divide."""
    if target.is_gpu or not target.vector_bits:
        return (OtherMachine if target.is_gpu else No)("the target is not a CPU with vectors")
    if not size or size > _MAX_SIZE or any(_lanes(size, machine) < _MIN_LANES for machine in target.machines):
        return No(f"rows of {size}")
    return Yes()


def _lanes(size: int, target: Target) -> int:
    return min(size & -size, max(target.vector_bits // 32, _MIN_LANES))


def emit_rms_fused_simd(context: LoweringContext, norm: Norm, operands: Sequence[ir.Value]) -> list[ir.Value]:
    """Emit the norm, and the sum if it is wanted.

    Args:
        context: Where.
        norm: What.
        operands: x, skip, bias, gate (those that are there; all but the bias of one shape, whose last dimension is a
            row or whole rows) and gamma.

    Returns:
        The results, of the shape of x.
    """
    b, x = context.builder, operands[0]
    rank = spec_of(x).rank
    sizes = b.shape(x)
    rows = [_rows(b, value, norm.size) if spec_of(value).rank == rank > 1 else value for value in operands]
    kernel = for_machines(context.target, lambda machine: _kernel(norm, machine))
    results = dispatch(b, kernel, rows, b.dim(rows[0], 0), 1)
    return [_back(b, value, sizes, norm.size) for value in results]


def _rows(b: Builder, value: ir.Value, size: int) -> ir.Value:
    """[..., n * size] as [rows, size]."""
    axis = spec_of(value).rank - 1
    if spec_of(value).shape[-1] != size:
        value = b.expand(value, axis, [b.floordiv(b.dim(value, axis), size), size])
        axis += 1
    return b.collapse(value, 0, axis - 1)


def _back(b: Builder, value: ir.Value, sizes: list[Size], size: int) -> ir.Value:
    """[rows, size] in the shape that the rows had."""
    if sizes[-1] == size:
        return b.expand(value, 0, sizes[:-1])
    return b.collapse(b.expand(value, 0, [*sizes[:-1], b.floordiv(sizes[-1], size)]), len(sizes) - 1, len(sizes))


def _kernel(c: Norm, target: Target) -> Kernel:
    lanes = _lanes(c.size, target)
    share = max(1, _ELEMENTS // c.size)
    rows, row = TensorSpec((None, c.size), c.dtype), TensorSpec((c.size,), c.weight_dtype)
    given = [(rows, "B_"), *([(rows, "B_")] if c.with_skip else [])]
    given += [(TensorSpec((c.size,), c.dtype), "_")] if c.with_bias else []
    given += [(rows, "B_")] if c.gate else []
    given.append((row, "_"))
    outputs = [rows] * (1 + c.with_sum)

    def write(k: KernelText, batch: Index, tokens: Index, memrefs: Sequence[str]) -> None:
        del tokens
        _Body(k, c, lanes, share, batch, memrefs).write()

    return Kernel(
        name=_symbol(c, target),
        inputs=tuple(spec for spec, _ in given),
        outputs=tuple(outputs),
        axes=(*(term for _, term in given), *(["B_"] * len(outputs))),
        workgroups=(1, 1),
        write=write,
        share=share,
    )


def _symbol(c: Norm, target: Target) -> str:
    epsilon = c.epsilon.hex().replace(".", "p").replace("-", "m").replace("+", "")
    flags = {"skip": c.with_skip, "bias": c.with_bias, "sum": c.with_sum, c.gate: bool(c.gate)}
    parts = "".join(f"_{name}" for name, there in flags.items() if there)
    return f"rms_fused_simd_{c.dtype}_{c.weight_dtype}_nx{c.size}_{epsilon}{parts}_v{target.vector_bits}"


class _Body:
    """Writes the body; rows [R, N], lists [N]."""

    def __init__(self, k: KernelText, c: Norm, lanes: int, share: int, rows: Index, memrefs: Sequence[str]) -> None:
        self.k, self.c, self.lanes = k, c, lanes
        given = iter(memrefs)
        self.x = next(given)
        self.skip = next(given) if c.with_skip else ""
        self.bias = next(given) if c.with_bias else ""
        self.gate = next(given) if c.gate else ""
        self.gamma, self.y = next(given), next(given)
        self.total = next(given) if c.with_sum else ""
        self.first = k.mul(k.op("hal.interface.workgroup.id[1] : index", "index"), share)
        self.stop = k.minimum(rows, k.add(self.first, share))
        short = c.size <= _SHORT
        self.rows = _AT_ONCE if short else 1
        self.vectors = 1 if short or c.size % (_AT_ONCE * lanes) else _AT_ONCE
        self.kept = k.alloca([self.rows, c.size]) if c.with_skip else ""

    def write(self) -> None:
        """The whole body."""
        k, rows = self.k, self.rows

        def some(count: int, row: str) -> list[str]:
            self._norm(row, count)
            return [k.index(k.add(row, count))]

        rest = k.index(self.first)
        if rows > 1:
            whole = k.add(self.first, k.mul(k.div(k.sub(self.stop, self.first), rows), rows))
            (rest,) = k.loop(whole, [rest], lambda row, _: some(rows, row), start=self.first, step=rows)
        k.loop(self.stop, [rest], lambda row, _: some(1, row), start=rest)

    def _norm(self, row: Index, rows: int) -> None:
        """Some rows."""
        k, c, step = self.k, self.c, self.lanes * self.vectors
        zero = k.constant(0.0, f"vector<{self.lanes}xf32>")

        def square(at: str, sums: list[str]) -> list[str]:
            values = [
                self._sum(k.add(row, i), i, k.add(at, n)) for i in range(rows) for n in range(0, step, self.lanes)
            ]
            return [k.fma(value, value, total) for value, total in zip(values, sums, strict=True)]

        found = k.loop(c.size, [zero] * (rows * self.vectors), square, step=step)
        parts = [found[i : i + self.vectors] for i in range(0, len(found), self.vectors)]
        one, size, epsilon = (k.constant(value, "f32") for value in (1.0, float(c.size), c.epsilon))
        factors: list[str] = []
        for total in k.sum_lanes([self._added(part) for part in parts]):
            mean = k.addf(k.divf(total, size), epsilon)
            factors.append(k.divf(one, k.op(f"math.sqrt {mean} : f32", "f32")))

        def scale(at: str, _: list[str]) -> list[str]:
            for n in range(0, step, self.lanes):
                place = k.add(at, n)
                weight = k.load(self.gamma, [place], self.lanes)
                for i, factor in enumerate(factors):
                    self._scale(k.add(row, i), i, place, factor, weight)
            return []

        k.loop(c.size, [], scale, step=step)

    def _added(self, values: list[str]) -> str:
        total = values[0]
        for value in values[1:]:
            total = self.k.addf(total, value)
        return total

    def _sum(self, row: Index, kept: int, at: Index) -> str:
        """What is normalised of a row; kept where it is not read again, and stored if it is a result."""
        k, lanes = self.k, self.lanes
        value = k.load(self.x, [row, at], lanes)
        for other, place in ((self.skip, [row, at]), (self.bias, [at])):
            value = k.addf(value, k.load(other, place, lanes)) if other else value
        if self.kept:
            k.store(value, self.kept, [kept, at])
        if self.total:
            k.store(value, self.total, [row, at])
        return value

    def _scale(self, row: Index, kept: int, at: Index, factor: str, weight: str) -> None:
        k, lanes = self.k, self.lanes
        value = k.load(self.kept, [kept, at], lanes) if self.kept else k.load(self.x, [row, at], lanes)
        value = k.mulf(k.mulf(value, factor), weight)
        if self.gate:
            gate, one = k.load(self.gate, [row, at], lanes), k.constant(1.0, f"vector<{lanes}xf32>")
            divisor = k.addf(one, k.exp(k.negate(gate)))
            value = k.mulf(value, k.divf(gate if self.c.gate == "silu" else one, divisor))
        k.store(value, self.y, [row, at])
