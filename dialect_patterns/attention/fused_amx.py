"""Strategy ``fused_amx`` of softmax attention: many query rows by the CPU's matrix unit, which multiplies bf16.

    %y, %sums = flow.dispatch @attention_fused_amx_...[B](%q, %keys, %values, %first?, %limit?, %sink?)

As ``fused_simd``, with both products on the unit: see ``amx_kernel``. Weights are rounded to bf16 as values are, or
are as many terms of it; scores, maxima and sums are in f32.

Legal: on CPUs with AMX, in bf16 and f16, and in f32 with --math fast (terms lose 2^-16), for 16 rows of a key head or
more, without a bias, where 32 divides the head sizes, over a known number of keys. Cost: 4 * B*Hq*T*S*d flops over the
visible keys, of which the unit does 512 multiply-adds a cycle, with two terms a third of that; keys and values once for
32 rows of a key head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..emit.amx_tiles import ROWS
from ..emit.dispatch import Kernel
from ..emit.kernel_text import Index, KernelText
from ..mat_mul.simd_plan import UNIT_FEATURES
from ..node import TensorSpec
from ..select import Legality, No, OtherMachine, Yes
from ..target import Target
from .amx_kernel import AmxBody
from .amx_operands import KEYS
from .core import AttentionShape
from .fused_simd import attention_kernel
from .simd_plan import Plan

UNIT_ROWS = 2 * ROWS
_WORD_ROWS = 32  # elements of a row that the unit takes at once
_MOST_HEAD = 256  # of keys, whose rows are on the stack


def is_legal(shape: AttentionShape, target: Target) -> Legality:
    """Where the machine has the unit, and the sizes fill it."""
    heads, length = shape.heads, shape.length
    if not target.features >= UNIT_FEATURES or target.vector_bits != 32 * ROWS:
        return OtherMachine("no matrix unit for bf16")
    if shape.dtype == "f32" and not target.fast_math:
        return No("its matrix unit rounds f32, which --math fast allows")
    if not length or length * heads.group < ROWS:
        return No("the number of tokens is open" if length is None else f"less than {ROWS} rows of a key head")
    if shape.masked:
        return No("a bias")
    if heads.dk % _WORD_ROWS or heads.dv % _WORD_ROWS or heads.dk > _MOST_HEAD:
        return No(f"heads of {heads.dk} and {heads.dv}, not multiples of {_WORD_ROWS} up to {_MOST_HEAD}")
    if shape.keys is None or shape.keys < KEYS:
        return No(f"{'an open number of' if shape.keys is None else shape.keys} keys, not {KEYS} or more")
    return Yes()


def kernel(p: Plan, specs: Sequence[TensorSpec], axes: Sequence[str], output: TensorSpec) -> Kernel:
    """The kernel of a plan and the types of its operands; its second result is scratch memory."""
    base = attention_kernel(p, specs, axes, output)
    keys = specs[1].shape[2]
    assert keys is not None
    terms = 1 if specs[1].dtype == "bf16" else 2

    def write(k: KernelText, batch: Index, count: Index, memrefs: Sequence[str]) -> None:
        del batch, count
        AmxBody(k, p, keys, terms, memrefs).write()

    sums = TensorSpec((output.shape[0], p.kv_heads * p.tiles, p.rows, p.dv), "f32")
    return replace(
        base,
        name=base.name.replace("_fused_simd_", "_fused_amx_"),
        outputs=(output, sums),
        axes=(*base.axes, "B___"),
        write=write,
    )
