"""The machines we compile for: flags and capabilities as data, one file a target."""

from __future__ import annotations

from collections.abc import Callable

from linattn.runtime.errors import TargetError

from . import cpu, cuda, vulkan
from .base import CompileTarget, TargetOptions

TARGETS: dict[str, Callable[[TargetOptions], CompileTarget]] = {
    "cpu": cpu.resolve,
    "cuda": cuda.resolve,
    "vulkan": vulkan.resolve,
}


def resolve_target(name: str, options: TargetOptions) -> CompileTarget:
    """The flags and capabilities for a target.

    Raises:
        TargetError: if the name or an option is not known, or an option belongs to another target.
    """
    if name not in TARGETS:
        raise TargetError("unknown target", where="--target", got=repr(name), expected=" | ".join(TARGETS))
    return TARGETS[name](options)


__all__ = ["TARGETS", "CompileTarget", "TargetOptions", "resolve_target"]
