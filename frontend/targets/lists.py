"""Several targets on one command line, and which of them an option is for."""

from __future__ import annotations

import dataclasses
import re

from linattn.runtime.errors import InputError, TargetError

from . import TARGETS
from .base import TargetOptions

_GPUS = tuple(name for name in TARGETS if name != "cpu")


def read_machines(targets: str, options: TargetOptions) -> list[tuple[str, TargetOptions]]:
    """What to compile for: each target with the options that are its own.

    Args:
        targets: ``cpu`` or a list such as ``cpu,vulkan,cuda``.
        options: As given: ``gpu_target`` may name the target that it is for, ``cuda:sm_90,vulkan:ada``, and one target
            more than once: that makes several modules, the better one first. ``cuda:sm_80,sm_90`` makes one for both.

    Raises:
        TargetError: if a target is not known.
        InputError: if one is given twice, or an option is for none or not clearly for one.
    """
    names = [name.strip() for name in targets.split(",")]
    for name in names:
        if name not in TARGETS:
            raise TargetError("unknown target", where="--target", got=repr(name), expected=" | ".join(TARGETS))
        if names.count(name) > 1:
            raise InputError("given twice", where="--target", got=name)
    gpus = [name for name in names if name != "cpu"]
    asked = _gpu_targets(options.gpu_target, gpus) if gpus else {}
    machines: list[tuple[str, TargetOptions]] = []
    for name in names:
        if name == "cpu":
            machines.append((name, dataclasses.replace(options, gpu_target=None) if gpus else options))
        else:
            own = TargetOptions() if "cpu" in names else options
            machines += [(name, dataclasses.replace(own, gpu_target=one)) for one in asked.get(name, [None])]
    return machines


def _gpu_targets(text: str | None, gpus: list[str]) -> dict[str, list[str]]:
    """Target -> the GPUs to compile for."""
    if text is None:
        return {}
    parts = [part.partition(":") for part in re.split(r",(?!sm_)", text)]
    if not all(colon and name in _GPUS for name, colon, _ in parts):
        if len(gpus) > 1:
            expected = ",".join(f"{name}:NAME" for name in gpus)
            raise InputError("which target is it for", where="--gpu-target", got=repr(text), expected=expected)
        return {gpus[0]: [text]}  # one GPU; the path of a profile may have any characters
    found: dict[str, list[str]] = {}
    for name, _, gpu in parts:
        if name not in gpus:
            raise InputError("not among the targets", where="--gpu-target", got=name, expected=" | ".join(gpus))
        found.setdefault(name, []).append(gpu)
    return found
