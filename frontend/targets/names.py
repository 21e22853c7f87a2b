"""What files are called by the machine that they are for."""

from __future__ import annotations

import re

from .base import TargetOptions
from .cuda import DEFAULT
from .vulkan_device import BASELINE

_UNASKED = {"cuda": DEFAULT, "vulkan": BASELINE}


def machine_name(target: str, options: TargetOptions) -> str:
    """A part of a file's name: the target, with the GPU or, if one was named, the CPU, such as ``cuda-sm_89``."""
    asked = (options.target_triple, options.cpu_features, options.gpu_target or _UNASKED.get(target))
    told = (part.removesuffix(".json").rpartition("/")[2] for part in asked if part)
    return "-".join((target, *(re.sub(r"[^\w.]+", "-", part).strip("-") for part in told)))
