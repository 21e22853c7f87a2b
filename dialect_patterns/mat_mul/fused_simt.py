"""Strategy ``fused_simt``: few rows times a matrix as one GPU kernel that reads each weight once.

    y[m, n] = sum_k a[m, k] b[k, n]                 M up to 8, or N up to 32; sums in f32

    hal.executable.source @mat_mul_fused_simt_... {
      a thread: 4 neighbouring columns, every R-th group of 4 rows of b; scf.for %group { 4 x 4 weights, M x 4 fma }
      gpu.shuffle sums over a subgroup, then over the subgroups through the workgroup's memory; store
    }

Neighbouring threads read neighbouring columns, so that a row of a tile is whole sectors of memory. Such a product is as
fast as memory is; the threads are as many as keep enough loads under way. Several products of one ``a`` are one kernel
too (``joined.py``): a workgroup looks which of them its tile belongs to, or computes a gated pair. With the norm of
``a`` inside (``normed.py``) each multiplies what is not divided yet, adds up the squares beside, and divides its sums;
one more workgroup writes the sum that was normalised.

Many rows are blocks of 8, each read by workgroups of its own: a matrix of few columns, of a prompt's gates, comes out
of a cache. On an H100 IREE's own products of 512 rows, K=1024 and N=16 in f32 take 130 to 250 us.

Legal: on GPUs, for 1 to 8 static rows, or any number where columns are few, if 4 divides K and N. Cost: b once a block
of rows, a once a tile of columns.
Source: ONNX schema MatMul-13.
"""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir

from ..emit.builder import tensor_type
from ..emit.simt_kernel import Group, Kernel, dispatch
from ..op import LoweringContext
from ..select import Legality, No, OtherMachine, Yes
from ..target import Target
from .contract import MatMul
from .head_norm import HeadNorm
from .simt_products import MAX_ROWS, WIDTH, Norm, Plan, ProductsKernel

_FEW_COLUMNS = 32
_ENOUGH_TILES = 128  # workgroups that keep a large GPU busy
_LEAST_GROUPS = 4  # of a thread


def is_legal(contract: MatMul, target: Target) -> Legality:
    """On a GPU, for a few rows."""
    if not target.is_gpu:
        return OtherMachine(f"{target.name} is not a GPU")
    if not contract.is_plain:
        return No(f"{contract.a} by {contract.b} is not rows times one matrix")
    if contract.rows is None or not contract.rows:
        return No(f"{'?' if contract.rows is None else contract.rows} rows")
    if contract.rows > MAX_ROWS and not is_narrow(contract):
        return No(f"{contract.rows} rows, not 1 to {MAX_ROWS}, of more than {_FEW_COLUMNS} columns")
    if contract.depth % WIDTH or contract.columns % WIDTH or not contract.depth:
        return No(f"K={contract.depth} or N={contract.columns} is not a multiple of {WIDTH}")
    return Yes()


def is_narrow(contract: MatMul) -> bool:
    """Whether columns are so few that many rows are no reason for another strategy."""
    return contract.columns <= _FEW_COLUMNS


def plan_for(contract: MatMul, target: Target, weights: int = 1) -> Plan:
    """The widest tiles of which there are enough, and threads for a few groups of rows each; by measurement (H100).

    Args:
        contract: The product.
        target: The machine.
        weights: Matrices that a thread multiplies with.
    """
    subgroup = target.subgroup_size
    vectors, groups = contract.columns // WIDTH, contract.depth // WIDTH
    lanes = 4
    while lanes < max(subgroup, 8) and vectors // (2 * lanes) >= _ENOUGH_TILES:
        lanes *= 2
    plan = Plan(lanes, 1, 0)
    while groups % (2 * plan.across) == 0 and groups // plan.across > _LEAST_GROUPS:
        across = 2 * plan.across
        wider = Plan(lanes, across, subgroup if subgroup and lanes * across % subgroup == 0 else 0)
        memory = wider.memory(weights * min(contract.rows or 1, MAX_ROWS))
        if wider.threads > target.max_threads or memory > target.workgroup_memory:
            break
        plan = wider
    return plan


def emit_mat_mul_fused_simt(context: LoweringContext, contract: MatMul, a: ir.Value, b: ir.Value) -> ir.Value:
    """Emit the product."""
    return emit_products(context, [contract], a, [b], False)[0]


def emit_products(
    context: LoweringContext,
    products: Sequence[MatMul],
    a: ir.Value,
    weights: Sequence[ir.Value],
    gated: bool,
    norm: Norm | HeadNorm | None = None,
) -> list[ir.Value]:
    """Emit products of one ``a`` as one kernel.

    Args:
        context: Where, and for what.
        products: What each computes; all legal.
        a: Their left operand.
        weights: The right operand of each.
        gated: Whether there are two, of equal columns, and the one result is silu(first) * second.
        norm: What is done with ``a`` first.
    """
    c = products[0]
    assert c.rows is not None
    columns = [product.columns for product in products]
    outputs = columns[:1] if gated else columns
    plan = plan_for(max(products, key=lambda product: product.columns), context.target, 2 if gated else 1)
    tiles = [-(-count // plan.tile) for count in outputs]
    kind = "_gated" if gated else "_of" + "_".join(map(str, columns)) if len(columns) > 1 else ""
    few = c.rows if c.rows <= MAX_ROWS else None  # sizes of prompts share a kernel
    name = f"mat_mul_fused_simt_{c.a.dtype}_{few or 'n'}x{c.depth}x{sum(columns)}{kind}"
    name += f"_l{plan.lanes}r{plan.across}g{plan.subgroup}{norm or ''}"

    def body(k: Kernel) -> None:
        ProductsKernel(k, c.a.dtype, few, c.depth, plan, norm).emit(columns, tiles, gated)

    blocks = context.builder.index(-(-c.rows // MAX_ROWS))
    lead = [size or 0 for size in c.a.shape[:-1]]
    results: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [
        (tensor_type([*lead, count], c.a.dtype), []) for count in outputs
    ]
    group, read = Group(plan.threads, plan.subgroup), [a, *weights, *(norm.operands if norm is not None else [])]
    count = sum(tiles)
    if norm is not None and norm.with_sum:
        results.append((tensor_type([*lead, c.depth], c.a.dtype), []))
        count += 1
    numbers = [context.builder.index(c.rows)] if few is None else []
    return dispatch(name, group, count, blocks, numbers, read, results, body)
