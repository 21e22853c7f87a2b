"""GatedColumns (of our own): a value times an activation of a gate, whose columns may lie in a wider value, for CPUs.

    linattn.GatedColumns(x [B, T, H * D], gate [B, T, W]) -> [B, T, H * D]
        y[h * D + d] = x[h * D + d] * act(gate[start + h * stride + d])          act: sigmoid, or silu(z) = z sigmoid(z)

    %y = flow.dispatch @gated_columns_...[%rows](%rows, %x, %gate)

The frontend makes it of Sigmoid and Mul where they stand behind products (``frontend.graph.gate_columns``). In f32 and
rounded once, where the operators round each step. IREE 3.13 copies the columns of a gate that a Split takes out of a
product, and takes 5 us a row of 2,048 for the rest, where the memory takes one.

Legal: on CPUs, for rows of many tokens whose sizes are known and that vectors divide. Cost: both inputs and the output
once. Source: ONNX operator schemas Sigmoid-13, Mul-14.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from .checks import float_input
from .emit.dispatch import Kernel, dispatch
from .emit.kernel_text import Index, KernelText
from .machines import for_machines
from .node import Node, TensorSpec
from .op import INTERNAL, Choice, LoweringContext, LoweringOptions, Op
from .target import Target

GATED_COLUMNS = "GatedColumns"
_MIN_LANES = 4
_ELEMENTS = 16_384  # of a workgroup


@dataclass(frozen=True)
class GatedColumns:
    """Contract.

    Attributes:
        x: [B, T, heads * size].
        gate: [B, T, W].
        size: Columns that lie side by side in both.
        start: First column of the gate.
        stride: Columns from one such run of the gate to the next.
        multiplies: Whether the activation is silu, else it is sigmoid.
    """

    x: TensorSpec
    gate: TensorSpec
    size: int
    start: int
    stride: int
    multiplies: bool


def can_gate(x: TensorSpec, size: int, target: Target) -> bool:
    """Whether there is a kernel for a value whose columns lie in runs of a size in the gate."""
    if target.is_gpu or not target.vector_bits or x.rank != 3 or None in x.shape or x.shape[1] == 1 or not size:
        return False
    return all(_lanes(size, machine) >= _MIN_LANES for machine in target.machines)


def _lanes(size: int, target: Target) -> int:
    return min(size & -size, max(target.vector_bits // 32, _MIN_LANES))


def parse(node: Node) -> GatedColumns:
    """View the node; what it was made of has been checked."""
    x, gate = float_input(node, 0, "x"), float_input(node, 1, "gate")
    size, start, stride = (node.attr(name, 0) for name in ("size", "start", "stride"))
    return GatedColumns(x, gate, size, start, stride, bool(node.attr("multiplies", 0)))


def output_types(contract: GatedColumns) -> Sequence[TensorSpec | None]:
    """The outputs' types."""
    return [contract.x]


def choose(contract: GatedColumns, target: Target, options: LoweringOptions) -> Choice:
    """There is one way."""
    del target, options
    return Choice("fused_simd", f"times {'silu' if contract.multiplies else 'sigmoid'} of a gate in one kernel")


def lower(context: LoweringContext, contract: GatedColumns, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Emit the kernel."""
    b = context.builder
    x, gate = operands
    assert x is not None
    assert gate is not None
    kernel = for_machines(context.target, lambda machine: _kernel(contract, machine))
    rows = b.collapse(x, 0, 1)
    (y,) = dispatch(b, kernel, [rows, b.collapse(gate, 0, 1)], b.dim(rows, 0), 1)
    return [b.expand(y, 0, b.shape(x)[:2])]


def _kernel(c: GatedColumns, target: Target) -> Kernel:
    lanes, width = _lanes(c.size, target), c.x.shape[-1] or 0
    share = max(1, _ELEMENTS // width)
    rows = TensorSpec((None, width), c.x.dtype)

    def write(k: KernelText, batch: Index, tokens: Index, memrefs: Sequence[str]) -> None:
        del tokens
        x, gate, y = memrefs
        one = k.constant(1.0, f"vector<{lanes}xf32>")

        def run(row: Index, head: Index) -> list[str]:
            def vector(d: str, _: list[str]) -> list[str]:
                place = [row, k.add(k.mul(head, c.size), d)]
                z = k.load(gate, [row, k.add(k.add(c.start, k.mul(head, c.stride)), d)], lanes)
                factor = k.divf(z if c.multiplies else one, k.addf(one, k.exp(k.negate(z))))
                k.store(k.mulf(k.load(x, place, lanes), factor), y, place)
                return []

            k.loop(c.size, [], vector, step=lanes)
            return []

        def each(row: str, _: list[str]) -> list[str]:
            k.loop(width // c.size, [], lambda head, _: run(row, head))
            return []

        first = k.mul(k.op("hal.interface.workgroup.id[1] : index", "index"), share)
        k.loop(k.minimum(batch, k.add(first, share)), [], each, start=first)

    kind = "silu" if c.multiplies else "sigmoid"
    place = f"{c.size}at{c.start}by{c.stride}of{c.gate.shape[-1]}"
    return Kernel(
        name=f"gated_columns_{c.x.dtype}_{kind}_{width}_{place}_v{target.vector_bits}",
        inputs=(rows, TensorSpec((None, c.gate.shape[-1]), c.x.dtype)),
        outputs=(rows,),
        axes=("B_", "B_", "B_"),
        workgroups=(1, 1),
        write=write,
        share=share,
    )


OPS = (Op(INTERNAL, GATED_COLUMNS, 1, parse, output_types, lower, choose),)
