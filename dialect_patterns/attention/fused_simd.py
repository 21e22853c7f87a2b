"""Strategy ``fused_simd`` of softmax attention (Attention, GroupQueryAttention): one hand-made CPU kernel.

    %y = flow.dispatch @attention_fused_simd_...[B](%q, %keys, %values, %first?, %limit?, %sink?, %bias?)

Scores never reach memory, only keys that a query can see are read (a cache of large capacity costs what is in it),
heads are neither split nor repeated. See ``simd_kernel.py`` for few query rows of a key head and ``simd_many.py`` for
32 and more; the portable form is ``core.py``.

Legal: on CPUs, for a static number of tokens and head sizes that are multiples of 4. Cost: 4 * B*Hq*T*S*d flops over
the visible keys, in bf16 half as many instructions where CPUs multiply pairs; keys and values once for 8 or for 32
query rows of a key head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from iree.compiler import ir

from ..emit.builder import Builder, Size, spec_of
from ..emit.dispatch import Kernel, dispatch
from ..emit.kernel_text import Index, KernelText
from ..emit.scalar import Scalar
from ..machines import for_machines
from ..mat_mul.simd_pairs import has_fast_dot, multiplies_pairs
from ..node import Dim, TensorSpec
from ..select import Legality, No, OtherMachine, Yes
from ..target import STACK_BYTES, Target
from . import core
from .core import AttentionShape, Heads, Visibility
from .simd_kernel import Body
from .simd_many import ManyBody
from .simd_many_operands import KEYS as MANY_KEYS
from .simd_many_operands import PAIR_LANES, Floats, Pairs
from .simd_plan import KEYS, Plan

_ROWS = 8
_STACK_FLOATS = 7 * 1024  # IREE refuses kernels with more than 32 KiB on the stack
_MIN_LANES = 4
_MANY_ROWS = 32
_MANY_FLOATS = (STACK_BYTES - 16 * 1024) // 4  # the rest: scores, bounds, what is widened


def _is_for_many(heads: Heads, length: int, keys: Dim, masked: bool) -> bool:
    """Whether a call has as many rows of a key head as the kernel for many takes at once, and it can do the rest."""
    floats = _MANY_ROWS * (heads.dk + heads.dv) + 12 * heads.dk
    enough = length * heads.group >= _MANY_ROWS and keys is not None and keys >= MANY_KEYS
    return enough and not masked and floats <= _MANY_FLOATS


def _rows(heads: Heads, length: int) -> int:
    """Query rows of a workgroup, 0 if not even one fits on the stack."""
    return min(_ROWS, length * heads.group, _STACK_FLOATS // (heads.dk + heads.dv + KEYS))


def is_legal(shape: AttentionShape, target: Target) -> Legality:
    """On CPUs, for a known number of tokens and head sizes that vectors divide."""
    heads, length = shape.heads, shape.length
    if target.is_gpu or not target.vector_bits:
        return (OtherMachine if target.is_gpu else No)("the target is not a CPU with vectors")
    if not length:
        return No("the number of tokens is open" if length is None else "no tokens")
    for name, size in (("dk", heads.dk), ("dv", heads.dv)):
        if size % _MIN_LANES:
            return No(f"{name}={size} is not a multiple of {_MIN_LANES}")
    if not _rows(heads, length):
        return No(f"a row of {heads.dk} + {heads.dv} floats does not fit on the stack")
    return Yes()


def emit_attention_fused_simd(
    b: Builder,
    target: Target,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    heads: Heads,
    *,
    scale: float,
    softcap: float,
    visibility: Visibility,
    mask: ir.Value | None = None,
    sink: ir.Value | None = None,
    rows: int | None = None,
    kernel_of: Callable[[Plan, Sequence[TensorSpec], Sequence[str], TensorSpec], Kernel] | None = None,
) -> ir.Value:
    """Attention of ``q`` over the visible rows of ``k`` and ``v``; a query that sees no key gives zeros.

    Args:
        b: The builder.
        target: The machine to compile for.
        q: [B, T, Hq * dk].
        k: [B, Hkv, S, dk].
        v: [B, Hkv, S, dv].
        heads: Counts and sizes.
        scale: Factor on q . k.
        softcap: c in c * tanh(s / c), 0 for none.
        visibility: Which keys are visible by position.
        mask: From :func:`~.core.align_mask`, or None.
        sink: What the softmax of each query head sees beside its keys [Hq], or None.
        rows: Query rows of a workgroup; None: as many as suit vectors.
        kernel_of: Makes the kernel; None: that of vectors.

    Returns:
        [B, T, Hq * dv] of the type of ``q``.
    """
    batch = b.dim(q, 0)
    length = spec_of(q).shape[1]
    assert length is not None
    bias = None if mask is None else core.as_bias(b, mask)
    first = visibility.first
    shared = Plan(
        tokens=length,
        group=heads.group,
        kv_heads=heads.kv,
        dk=heads.dk,
        dv=heads.dv,
        rows=rows or _rows(heads, length),
        lanes=_MIN_LANES,
        scale=scale,
        softcap=softcap,
        left=visibility.left,
        right=visibility.right,
        first=first if isinstance(first, int) else None,
        has_limit=visibility.limit is not None,
        has_sink=sink is not None,
        bias_dims=None if bias is None else core.bias_dims(bias),
    )
    operands, specs, axes = [q, k, v], [spec_of(x) for x in (q, k, v)], ["B__", "B_T_", "B_T_"]
    for bound, wanted in ((first, shared.needs_first), (visibility.limit, shared.has_limit)):
        if wanted:
            assert bound is not None
            operands.append(_as_rows(b, bound, batch))
            specs.append(spec_of(operands[-1]))
            axes.append("B")
    if sink is not None:
        operands.append(sink)
        specs.append(spec_of(sink))
        axes.append("_")
    if bias is not None and shared.bias_dims is not None:
        operands.append(bias)
        specs.append(spec_of(bias))
        axes.append(("B" if shared.bias_dims[0] else "_") + "__T")
    output = TensorSpec((spec_of(q).shape[0], length, heads.q * heads.dv), spec_of(q).dtype)

    many = kernel_of is None and _is_for_many(heads, length, spec_of(k).shape[2], mask is not None)

    def make(machine: Target) -> Kernel:
        own = replace(shared, lanes=_lanes(heads, machine))
        if many:
            return _many_kernel(replace(own, rows=_MANY_ROWS), machine, specs, axes, output)
        return (kernel_of or attention_kernel)(own, specs, axes, output)

    kernel = for_machines(target, make)
    return dispatch(b, kernel, operands, batch, b.dim(k, 2))[0]


def attention_kernel(p: Plan, specs: Sequence[TensorSpec], axes: Sequence[str], output: TensorSpec) -> Kernel:
    """The kernel of a plan and the types of its operands."""

    def write(k: KernelText, batch: Index, keys: Index, memrefs: Sequence[str]) -> None:
        del batch
        Body(k, p, keys, memrefs).write()

    return Kernel(
        name=_symbol(p, specs),
        inputs=tuple(specs),
        outputs=(output,),
        axes=(*axes, "B__"),
        workgroups=(p.tiles, p.kv_heads),
        write=write,
    )


def _many_kernel(
    p: Plan, machine: Target, specs: Sequence[TensorSpec], axes: Sequence[str], output: TensorSpec
) -> Kernel:
    """The kernel for many rows."""
    base, keys = attention_kernel(p, specs, axes, output), specs[1].shape[2]
    assert keys is not None
    types = {spec.dtype for spec in specs[:3]}
    pairs = p.lanes == PAIR_LANES and not p.dk % (2 * PAIR_LANES) and not p.dv % (2 * PAIR_LANES)
    pairs = pairs and types == {"bf16"} and multiplies_pairs("bf16", machine) and has_fast_dot(machine)
    registers = 32 if machine.vector_bits >= 512 else 16

    def write(k: KernelText, batch: Index, count: Index, memrefs: Sequence[str]) -> None:
        del batch, count
        ManyBody(k, p, keys, Pairs if pairs else Floats, registers, memrefs).write()

    kind = "_many_pairs_" if pairs else "_many_"
    return replace(base, name=base.name.replace("_fused_simd_", f"_fused_simd{kind}"), write=write)


def _lanes(heads: Heads, target: Target) -> int:
    lanes = max(target.vector_bits // 32, _MIN_LANES)
    while heads.dk % lanes or heads.dv % lanes:
        lanes //= 2
    return lanes


def _as_rows(b: Builder, bound: Size, batch: Size) -> ir.Value:
    """A bound as [B] of i32."""
    if isinstance(bound, ir.Value) and isinstance(bound.type, ir.RankedTensorType):
        return b.cast(bound, "i32")
    return b.full(Scalar(b.index(bound)).to("i32"), [batch], "i32")


def _symbol(p: Plan, specs: Sequence[TensorSpec]) -> str:
    def dim(size: Dim) -> str:
        return "x" if size is None else str(size)

    q, k, v = specs[:3]
    sink = "_sink" + specs[3 + p.needs_first + p.has_limit].dtype if p.has_sink else ""
    sees = f"l{dim(p.left)}r{dim(p.right)}_first{dim(p.first)}" + ("_limit" if p.has_limit else "")
    bias = "" if p.bias_dims is None else "_bias" + "".join(str(int(has)) for has in p.bias_dims)
    heads = f"q{p.kv_heads * p.group}kv{p.kv_heads}_{p.dk}x{p.dv}"
    lead = f"b{dim(q.shape[0])}t{p.tokens}s{dim(k.shape[2])}"
    types = q.dtype if v.dtype == q.dtype else f"{q.dtype}_{v.dtype}"
    numbers = f"{p.scale:.9g}_{p.softcap:.9g}".replace(".", "_").replace("-", "m").replace("+", "p")
    return f"attention_fused_simd_{types}_{heads}_{lead}_{sees}{sink}{bias}_{numbers}_v{32 * p.lanes}"
