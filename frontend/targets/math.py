"""``--math``: whether products may be less exact than their type, where a machine multiplies those faster."""

from __future__ import annotations

from dataclasses import replace

from linattn.dialect_patterns.mat_mul.fused_amx import FEATURES
from linattn.runtime.errors import InputError

from .base import CompileTarget

STRICT, FAST = "strict", "fast"


def with_math(target: CompileTarget, math: str) -> CompileTarget:
    """The target with what ``--math`` allows; a note where that changes nothing.

    Raises:
        InputError: if it is neither ``strict`` nor ``fast``.
    """
    if math not in (STRICT, FAST):
        raise InputError("not understood", where="--math", got=repr(math), expected=f"{STRICT} or {FAST}")
    if math == STRICT:
        return target
    has_amx = target.capabilities.features >= FEATURES and not target.levels
    if not has_amx and target.capabilities.matrix_stride is None:
        where = (
            "CPUs with AMX (such as --cpu-features sapphirerapids) and int4 or int8 weights on GPUs with matrix units"
        )
        note = f"--math fast changes nothing here: it is for {where}"
        return replace(target, notes=(*target.notes, note))
    return replace(target, capabilities=replace(target.capabilities, fast_math=True))
