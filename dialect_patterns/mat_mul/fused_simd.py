"""Strategy ``fused_simd``: rows times a matrix of weights as one hand-made CPU kernel, weights packed at compile time.

    y[m, n] = sum_k a[m, k] b[k, n]                 sums in f32

    %packed = util.global.load @weight.panels16 : tensor<N/16 x K x 16>      once for all entry points
    %y = flow.dispatch @mat_mul_fused_simd_...(%a, %packed)                  few rows (decode)

    %tiles = flow.dispatch @mat_mul_rows_...(%a)                             many rows (prefill): f32, in tiles
    %y = flow.dispatch @mat_mul_fused_simd_...(%tiles, %packed)

One row reads each weight once, in the order of memory. IREE's own product of one row reaches less than half of the
memory's rate, and its data tiling packs weights when loading, or in the compiler's memory, for each entry point. Many
rows reach 85 to 88 % of the rate of multiply-adds (2 cores of Zen 2), whatever the type of the weights: 16-bit ones are
widened once for about 130 rows. See ``simd_direct``, ``simd_tiled``.

Legal: on CPUs, for weights of the model. Cost: b once, or once for each chunk of rows where they are many.
Source: ONNX schema MatMul-13.
"""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir

from ..emit.builder import spec_of
from ..emit.dispatch import Kernel, dispatch
from ..emit.kernel_text import Index, KernelText
from ..machines import for_machines
from ..node import Dim, TensorSpec
from ..op import LoweringContext, weight_symbol
from ..select import Legality, No, OtherMachine, Yes, rows_text
from ..target import Target
from .contract import MatMul
from .simd_direct import write_direct
from .simd_plan import Plan, plan, weight_layout
from .simd_rows import write_rows
from .simd_squares import SquareBody
from .simd_tiled import TiledBody

_BYTES = {"f32": 4, "f16": 2, "bf16": 2}


def is_legal(contract: MatMul, target: Target) -> Legality:
    """On CPUs, for weights of the model."""
    if target.is_gpu or not target.vector_bits:
        return (OtherMachine if target.is_gpu else No)("the target is not a CPU with vectors")
    if not contract.is_plain:
        return No(f"{contract.a} by {contract.b} is not rows times one matrix")
    if not contract.constant:
        return No("the matrix is not a weight of the model")
    if not contract.depth or not contract.columns or contract.rows == 0:
        return No("a size is zero")
    return Yes()


def describe(contract: MatMul, target: Target) -> str:
    """What the report says about it."""
    p = plan_for(contract, target.machines[0])
    pairs = ", pairs of bf16 in f32" if p.widened else ", bf16 in pairs" if p.pairs else ""
    squares = ", bf16 in 2 x 2 pairs" if p.squares else pairs
    kind = ", on the matrix unit" if p.unit else squares
    return f"{rows_text(contract.rows)} by packed weights in one kernel{kind}"


def plan_for(contract: MatMul, target: Target) -> Plan:
    """The sizes of the kernel."""
    dtype = contract.a.dtype
    packed = weight_layout(target, dtype)
    return plan(contract.rows, contract.depth, contract.columns, target, packed, _BYTES[dtype])


def emit_mat_mul_fused_simd(context: LoweringContext, contract: MatMul, a: ir.Value, b: ir.Value) -> ir.Value:
    """Emit the product of ``a`` [..., K] and the weight ``b`` [K, N]."""
    build, target, symbol = context.builder, context.target, weight_symbol(b)
    plans = [plan_for(contract, machine) for machine in target.machines]
    p, direct = plans[0], [plan.direct for plan in plans]
    assert symbol is not None
    assert context.weights is not None
    packed = context.weights.repacked(symbol, p.layout.name, p.layout.pack, "i32" if p.pairs else None)
    leading = build.shape(a)[:-1]
    a = build.refine(a, TensorSpec((*spec_of(a).shape[:-1], contract.depth), contract.a.dtype))
    rows = [build.collapse(a, 0, len(leading) - 1)]
    count = build.dim(rows[0], 0)
    tiles = build.floordiv(build.add(count, p.tile - 1), p.tile)
    if not all(direct):
        kernel = for_machines(target, lambda machine: rows_kernel(contract, plan_for(contract, machine)))
        arranged = dispatch(build, kernel, rows, count, count, tiles)
        rows = [*rows, *arranged] if any(direct) else arranged
    both = len(rows) > 1
    kernel = for_machines(target, lambda machine: product_kernel(contract, plan_for(contract, machine), both=both))
    (y,) = dispatch(build, kernel, [*rows, packed], count, count, tiles)
    return build.expand(y, 0, leading) if len(leading) > 1 else y


def rows_kernel(contract: MatMul, p: Plan) -> Kernel:
    """The kernel that arranges many rows; it does nothing on a machine that takes them as they are."""
    dtype = contract.a.dtype

    def write(k: KernelText, batch: Index, rows: Index, memrefs: Sequence[str]) -> None:
        del batch
        if not p.direct:
            write_rows(k, p, rows, *memrefs)

    return Kernel(
        name=f"mat_mul_rows_{dtype}_{_dim(p.rows)}x{contract.depth}_t{0 if p.direct else p.tile}{suffix(p)}",
        inputs=(TensorSpec((p.rows, contract.depth), dtype),),
        outputs=(_arranged(p),),
        axes=("T_", "R_"),
        workgroups=(1, 1),
        write=write,
        share=p.tile,
    )


def product_kernel(contract: MatMul, p: Plan, *, both: bool = False) -> Kernel:
    """The kernel of the product; ``both``: it is given the rows as they are and, after those, arranged."""
    dtype = contract.a.dtype
    rows = [(TensorSpec((p.rows, contract.depth), dtype), "T_")] if both or p.direct else []
    rows += [(_arranged(p), "R_")] if both or not p.direct else []

    def write(k: KernelText, batch: Index, count: Index, memrefs: Sequence[str]) -> None:
        del batch
        if p.direct:
            write_direct(k, p, [memrefs[0], *memrefs[-2:]])
        else:
            (SquareBody if p.squares else TiledBody)(k, p, count, memrefs[-3:]).write()

    return Kernel(
        name=f"mat_mul_fused_simd_{dtype}_{_dim(p.rows)}x{p.columns}x{contract.depth}_v{32 * p.lanes}{suffix(p)}",
        inputs=(
            *(spec for spec, _ in rows),
            TensorSpec((p.layout.panels(p.columns), p.depth, p.layout.width), "i32" if p.pairs else dtype),
        ),
        outputs=(TensorSpec((p.rows, p.columns), dtype),),
        axes=(*(axes for _, axes in rows), "___", "T_"),
        workgroups=(-(-p.panels // p.group), 1),
        write=write,
        share=p.tile * max(p.chunk, 1),
    )


def _arranged(p: Plan) -> TensorSpec:
    """What ``simd_rows`` makes of the rows."""
    return TensorSpec((p.tiles, p.tile * p.filled * p.parts), "i32" if p.pairs and not p.widened else "f32")


def suffix(p: Plan) -> str:
    """How it multiplies, in a kernel's name."""
    if p.unit or p.widened:
        return "_amx" if p.unit else "_widened"
    return "_squares" if p.squares else "_pairs" if p.pairs else ""


def _dim(size: Dim) -> str:
    return "x" if size is None else str(size)
