"""Strategy ``fused_simt``: few rows times packed weights as one GPU kernel that reads each byte of the weights once.

    y[m, n] = sum_blocks scale[n, block] sum_k a[m, k] (q[n, k] - zero[n, block])      M up to 8, sums in f32

    hal.executable.source @mat_mul_n_bits_fused_simt_... {
      a thread: some columns, every R-th word of each; scf.for %word { unpack in registers, M fma a weight }
      gpu.shuffle sums over a subgroup, then over the subgroups through the workgroup's memory; store
    }

Neighbouring threads read neighbouring words of a column, and with them neighbouring pieces of A, which a thread uses
for all its columns. With ``accuracy_level`` 4 the threads that share a block find its largest value by shuffles, and
multiply whole numbers; without subgroup operations A is rounded in a dispatch before. Several products of one A, and
the norm before them, are one kernel too (``joined.py``).

Legal: on GPUs, for 1 to 8 static rows. Cost: the weights once, A once a tile of columns; about 3 instructions a weight
of one row. On an H100 (CUDA, weights not in its caches) one row, 4 bits, K=1024 to N=3584 takes 3 us in f16, 3.4
in f32 with A rounded, N=32000 11 us where memory alone takes 6.2; the portable form 74 and 637 us.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from iree.compiler import ir

from ..emit.builder import spec_of, tensor_type
from ..emit.simt_kernel import Group, Kernel, dispatch
from ..mat_mul.head_norm import HeadNorm
from ..mat_mul.simt_products import Norm
from ..op import LoweringContext
from ..select import Legality, No, OtherMachine, rows_text
from ..target import Target
from .contract import MatMulNBits
from .operands import Operands
from .rounded_simt import emit_a
from .simt_products import Plan, ProductsKernel, rounds_itself
from .simt_weights import bound, readable

_MAX_ROWS = 8
_THREADS = 128
_WORDS = 2  # of a column, for a thread
_FEW_ROWS = 2  # up to which a thread waits for memory more than it computes
_LOADED = 32  # elements of A whose loads are under way
_LOADED_COLD = 8
"""Of those where a step finds a kernel's code cold; all of a step's kernels take 218 us for 224 (Vulkan, H100)."""


def is_legal(contract: MatMulNBits, target: Target) -> Legality:
    """On a GPU, for a few rows."""
    if not target.is_gpu:
        return OtherMachine(f"{target.name} is not a GPU")
    rows = contract.rows
    if rows is None or not 1 <= rows <= _MAX_ROWS:
        return No(f"{'?' if rows is None else rows} rows, not 1 to {_MAX_ROWS}")
    return readable(contract)


def describe(contract: MatMulNBits, target: Target) -> str:
    """What the report says about it."""
    rounded = ", A rounded on the way" if rounds_itself(contract, plan_for(contract, target)) else ""
    return f"{rows_text(contract.rows)} in one kernel that reads each weight once{rounded}"


def plan_for(contract: MatMulNBits, target: Target) -> Plan:
    """Two words of a column for a thread, and as many columns as leave enough workgroups; by measurement (H100)."""
    c, subgroup, rows = contract, target.subgroup_size, contract.rows or 1
    most, across = min(_THREADS, target.max_threads), 1
    while across < most and across * _WORDS < c.row_words:
        across *= 2
    loaded = _LOADED_COLD if target.cold_code else _LOADED
    steps, unroll = -(-c.row_words // across), max(1, loaded // (c.per_word * rows))
    while unroll > steps:
        unroll //= 2
    few = rows <= _FEW_ROWS
    columns, enough = (4, 264) if few or not c.rounds_a else (8, 128)  # rounding wants to be shared
    plan = Plan(across, max(1, most // across), columns, subgroup, unroll)
    if subgroup and plan.threads % subgroup:
        plan = replace(plan, subgroup=0)
    while plan.columns > 1 and (c.columns < plan.tile * enough or plan.memory(rows) > target.workgroup_memory):
        plan = replace(plan, columns=plan.columns // 2)
    while plan.memory(rows) > target.workgroup_memory:
        plan = replace(plan, groups=plan.groups // 2) if plan.groups > 1 else replace(plan, across=plan.across // 2)
    return plan


def emit_mat_mul_n_bits_fused_simt(context: LoweringContext, contract: MatMulNBits, x: Operands) -> ir.Value:
    """Emit the product [M, N]."""
    return emit_products(context, [contract], [x], gated=False)[0]


def emit_products(
    context: LoweringContext,
    products: Sequence[MatMulNBits],
    operands: Sequence[Operands],
    *,
    gated: bool,
    norm: Norm | HeadNorm | None = None,
) -> list[ir.Value]:
    """Emit products of one A as one kernel.

    Args:
        context: Where, and for what.
        products: What each computes: alike but for their columns.
        operands: Of each; A of the first counts.
        gated: Whether there are two, of equal columns, and the one result is silu(first) * second.
        norm: What is done with A first; of one row in whole blocks.

    Returns:
        The results [M, N], and the sum that was normalised where it is wanted.
    """
    c, b = products[0], context.builder
    largest = max(products, key=lambda product: product.columns)
    plan = plan_for(largest, context.target)
    if gated:
        plan = replace(plan, columns=max(1, plan.columns // 2))
    assert c.rows is not None
    if rounds_itself(c, plan) or norm is not None:
        a, kind = b.pad_end(operands[0].a, 1, c.padded_depth), "round" if c.rounds_a else ""
    else:
        a, kind = emit_a(b, c, operands[0].a, "f32"), ""
    dtype, columns = spec_of(a).dtype, [product.columns for product in products]
    outputs = columns[:1] if gated else columns

    def body(k: Kernel) -> None:
        ProductsKernel(k, products, dtype, plan, norm).emit(gated)

    joined = "" if len(columns) == 1 else "_gated" if gated else "_of" + "_".join(map(str, columns))
    name = (
        f"mat_mul_n_bits_fused_simt_{dtype}{kind}_{c.key}_{c.rows}x{c.depth}x{sum(columns)}{joined}_{plan}{norm or ''}"
    )
    results: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [
        (tensor_type((c.rows, count), c.a.dtype), []) for count in outputs
    ]
    inputs = [a, *(value for product, x in zip(products, operands, strict=True) for value in bound(product, x))]
    tiles = sum(-(-count // plan.tile) for count in outputs)
    if norm is not None:
        inputs += norm.operands
        if norm.with_sum:
            results.append((tensor_type((c.rows, c.depth), c.a.dtype), []))
            tiles += 1
    return dispatch(name, Group(plan.threads, plan.subgroup), tiles, b.index(1), [], inputs, results, body)
