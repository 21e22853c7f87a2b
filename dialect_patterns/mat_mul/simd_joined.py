"""Several products of one left operand with few rows as one CPU kernel; see ``joined``.

Each workgroup looks which product its panels belong to. A gated pair is computed panel by panel, both sides of it at
once, so that only silu(a b) * (a c) is written.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from iree.compiler import ir

from ..emit.builder import spec_of
from ..emit.dispatch import Kernel, dispatch
from ..emit.kernel_text import Index, KernelText, vector_type
from ..machines import for_machines
from ..node import TensorSpec
from ..op import LoweringContext, weight_symbol
from ..target import Target
from .contract import MatMul
from .fused_simd import plan_for, suffix
from .simd_direct import direct_products, write_group
from .simd_edges import store_rows
from .simd_plan import Plan
from .simd_unit import RowUnit


def is_direct(products: Sequence[MatMul], target: Target) -> bool:
    """Whether each has so few rows that its kernel reads them where they are, on every machine."""
    return all(plan_for(product, machine).direct for product in products for machine in target.machines)


def emit_products(
    context: LoweringContext, products: Sequence[MatMul], a: ir.Value, weights: Sequence[ir.Value], gated: bool
) -> list[ir.Value]:
    """Emit products of one ``a`` as one kernel.

    Args:
        context: Where, and for what.
        products: What each computes; all with few rows.
        a: Their left operand.
        weights: The right operand of each, weights of the model.
        gated: Whether there are two, of equal columns, and the one result is silu(first) * second.
    """
    build, target = context.builder, context.target
    packed: list[ir.Value] = []
    for product, weight in zip(products, weights, strict=True):
        p, symbol = plan_for(product, target.machines[0]), weight_symbol(weight)
        assert symbol is not None
        assert context.weights is not None
        packed.append(context.weights.repacked(symbol, p.layout.name, p.layout.pack, "i32" if p.pairs else None))
    leading = build.shape(a)[:-1]
    a = build.refine(a, TensorSpec((*spec_of(a).shape[:-1], products[0].depth), products[0].a.dtype))
    rows = build.collapse(a, 0, len(leading) - 1)
    count = build.dim(rows, 0)
    kernel = for_machines(target, lambda machine: joined_kernel(products, machine, gated))
    results = dispatch(build, kernel, [rows, *packed], count, count)
    return [build.expand(y, 0, leading) if len(leading) > 1 else y for y in results]


def joined_kernel(products: Sequence[MatMul], machine: Target, gated: bool) -> Kernel:
    """The kernel for one machine."""
    plans, dtype = [plan_for(product, machine) for product in products], products[0].a.dtype
    p, columns = plans[0], [product.columns for product in products]
    written = plans[:1] if gated else plans
    counts = [-(-plan.panels // plan.group) for plan in written]
    kind = "gated" if gated else "of" + "_".join(map(str, columns))
    name = f"mat_mul_fused_simd_{dtype}_{p.rows}x{sum(columns)}x{products[0].depth}_{kind}_v{32 * p.lanes}"

    def write(k: KernelText, batch: Index, count: Index, memrefs: Sequence[str]) -> None:
        del batch, count
        a, weights, results = memrefs[0], memrefs[1 : 1 + len(plans)], memrefs[1 + len(plans) :]
        group = k.op("hal.interface.workgroup.id[0] : index", "index")
        unit = RowUnit(k, p) if p.unit else None
        starts = [0, *itertools.accumulate(counts)]

        def product(i: int) -> list[str]:
            def own() -> list[str]:
                write_group(k, plans[i], [a, weights[i], results[i]], k.sub(group, starts[i]), unit)
                return []

            if i + 1 == len(plans):
                return own()
            return k.when(k.less(group, starts[i + 1]), [], own, lambda: product(i + 1))

        if gated:
            _write_gated(k, p, [a, *weights, results[0]], group, unit)
        else:
            product(0)
        if unit:
            unit.release()

    return Kernel(
        name=name + suffix(p),
        inputs=(
            TensorSpec((p.rows, products[0].depth), dtype),
            *(
                TensorSpec((q.layout.panels(q.columns), q.depth, q.layout.width), "i32" if q.pairs else dtype)
                for q in plans
            ),
        ),
        outputs=tuple(TensorSpec((q.rows, q.columns), dtype) for q in written),
        axes=("T_", *["___"] * len(plans), *["T_"] * len(written)),
        workgroups=(sum(counts), 1),
        write=write,
        share=p.tile,
    )


def _write_gated(k: KernelText, p: Plan, memrefs: Sequence[str], group: str, unit: RowUnit | None) -> None:
    a, *weights, y = memrefs
    first = k.mul(group, p.group)
    end = k.add(first, p.group)

    def panel(index: Index, _: list[str]) -> list[str]:
        gates, ups = (
            unit.products(p, a, weight, index) if unit else direct_products(k, p, a, weight, index)
            for weight in weights
        )
        store_rows(k, p, y, p.tile, 0, index, [_gate(k, p, gate, up) for gate, up in zip(gates, ups, strict=True)])
        return []

    k.loop(end if p.panels % p.group == 0 else k.minimum(end, p.panels), [], panel, start=first)


def _gate(k: KernelText, p: Plan, gate: str, up: str) -> str:
    """silu(gate) * up."""
    one = k.constant(1.0, vector_type(p.lanes))
    return k.mulf(k.divf(gate, k.addf(one, k.exp(k.negate(gate)))), up)
