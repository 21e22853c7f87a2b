"""Strategy ``fused_simd``: the product as a hand-made CPU kernel that reads packed weights.

Few rows (decode), one dispatch; each byte of the weights is read once and multiplied in registers:

    %y = flow.dispatch @mat_mul_n_bits_fused_simd_...(%a, %words, %scales)

Many rows (prefill); weights are unpacked tile by tile on the stack, never as a whole:

    %q:3 = flow.dispatch @mat_mul_n_bits_rows_...(%a)                   A in bytes, one step a block
    %y   = flow.dispatch @mat_mul_n_bits_fused_simd_...(%q#0, %q#1, %q#2, %words, %scales)

With ``accuracy_level`` 4, A is rounded to int8 as ONNX Runtime does, and where the machine multiplies bytes
(``simd_dot``) products are of bytes, exact within a block; else they are in f32. See ``simd_direct``, ``simd_tiled``.

Legal: on CPUs with vectors, N at least one vector. Cost, bytes on AVX2: about 45 instructions for 256 weights of one
row, 20 for each 256 multiply-adds of many rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir

from ..emit.dispatch import Kernel, dispatch
from ..emit.kernel_text import Index, KernelText
from ..machines import for_machines
from ..node import TensorSpec
from ..op import LoweringContext
from ..select import Legality, No, OtherMachine, Yes
from ..target import Target
from .contract import MatMulNBits
from .operands import Operands
from .simd_direct import DirectBody
from .simd_plan import Plan, plan
from .simd_rows import RowWriter, arranged_specs, is_arranged
from .simd_tiled import TiledBody

_ARRANGED_ROWS = 8  # of a workgroup that arranges A


def is_legal(contract: MatMulNBits, target: Target) -> Legality:
    """On CPUs, where a tile fits."""
    if target.is_gpu or not target.vector_bits:
        return (OtherMachine if target.is_gpu else No)("the target is not a CPU with vectors")
    for found in (plan(contract, machine) for machine in target.machines):
        if isinstance(found, str):
            return No(found)
    return Yes()


def describe(contract: MatMulNBits, target: Target) -> str:
    """What the report says about it."""
    p = _plan(contract, target.machines[0])
    kind = f"bytes by {', '.join(sorted(p.instruction.features))}" if p.instruction else "f32"
    form = "as weights are unpacked" if p.direct else f"of {p.row_block} rows with unpacked tiles"
    return f"products of {kind} {form}, {p.tile} columns a tile"


def _plan(contract: MatMulNBits, target: Target) -> Plan:
    found = plan(contract, target)
    assert isinstance(found, Plan)
    return found


def emit_mat_mul_n_bits_fused_simd(context: LoweringContext, contract: MatMulNBits, x: Operands) -> ir.Value:
    """Emit the product [M, N]."""
    b, c = context.builder, contract
    p = _plan(c, context.target.machines[0])
    rows = b.dim(x.a, 0)
    product = for_machines(context.target, lambda machine: product_kernel(c, _plan(c, machine)))
    weights = [value for value in (x.words, x.scales, x.zeros, x.bias) if value is not None]
    a = [x.a]
    if p.direct:
        return dispatch(b, product, [*a, *weights], 1, rows)[0]
    if is_arranged(c, p):
        kernel = for_machines(context.target, lambda machine: rows_kernel(c, _plan(c, machine)))
        a = dispatch(b, kernel, a, rows, rows)
    return dispatch(b, product, [*a, *weights], rows, rows)[0]


def rows_kernel(contract: MatMulNBits, p: Plan, writer: type[RowWriter] = RowWriter) -> Kernel:
    """The kernel that arranges A, as ``writer`` does a row."""
    c = contract

    def write(k: KernelText, groups: Index, rows: Index, memrefs: Sequence[str]) -> None:
        del groups
        group = k.op("hal.interface.workgroup.id[1] : index", "index")
        first = k.mul(group, _ARRANGED_ROWS)
        stop = k.minimum(k.add(first, _ARRANGED_ROWS), rows)
        rows_to = writer(k, c, p, memrefs[0], memrefs[1:])

        def row(at: str, _: list[str]) -> list[str]:
            rows_to.write(at, at)
            return []

        k.loop(stop, [], row, start=first)

    outputs = tuple(arranged_specs(c, p, c.rows))
    kind = "rounded" if c.rounds_a else "copied"
    to = f"{'i8' if p.instruction else 'f32'}_{kind}_{c.bits}bit_z{c.zero_points}"
    return Kernel(
        name=f"mat_mul_n_bits_rows_{c.a.dtype}_to_{to}_{_shape(c)}_v{p.lanes * 32}",
        inputs=(TensorSpec((c.rows, c.depth), c.a.dtype),),
        outputs=outputs,
        axes=("T_", *("T_" for _ in outputs)),
        workgroups=(1, 1),
        write=write,
        share=_ARRANGED_ROWS,
    )


def product_kernel(contract: MatMulNBits, p: Plan) -> Kernel:
    """The kernel of the product."""
    c, dtype = contract, contract.a.dtype
    a = [TensorSpec((c.rows, c.depth), dtype)]
    if not p.direct and is_arranged(c, p):
        a = arranged_specs(c, p, c.rows)
    weights = [TensorSpec((c.columns, c.row_words), "i32"), TensorSpec((c.columns, c.blocks), dtype)]
    if c.zero_points == "packed":
        weights.append(TensorSpec((c.columns, -(-c.blocks * c.bits // 8)), "i8"))
    elif c.zero_points == "float":
        weights.append(TensorSpec((c.columns, c.blocks), dtype))
    if c.with_bias:
        weights.append(TensorSpec((c.columns,), dtype))

    def write(k: KernelText, groups: Index, rows: Index, memrefs: Sequence[str]) -> None:
        del groups
        if p.direct:
            DirectBody(k, c, p, memrefs).write()
        else:
            TiledBody(k, c, p, rows, memrefs).write()

    kind = "_".join(sorted(p.instruction.features)) if p.instruction else "f32"
    rounded = "_rounded" if c.rounds_a and not p.instruction else ""
    ends = f"_z{c.zero_points}{'_bias' if c.with_bias else ''}_{_shape(c)}n{c.columns}"
    return Kernel(
        name=f"mat_mul_n_bits_fused_simd{rounded}_{dtype}_{c.bits}bit{ends}_{kind}_v{p.lanes * 32}",
        inputs=(*a, *weights),
        outputs=(TensorSpec((c.rows, c.columns), dtype),),
        axes=(*("T_" for _ in a), *("_" * w.rank for w in weights), "T_"),
        workgroups=(-(-c.columns // p.workgroup_columns), 1),
        write=write,
        share=max(p.row_block, 1),
    )


def _shape(c: MatMulNBits) -> str:
    return f"m{'x' if c.rows is None else c.rows}k{c.depth}b{c.block_size}"
