"""Portable CPU modules on this machine as they run on lesser ones."""

from __future__ import annotations

import struct

import pytest
from linattn.frontend.targets.cpu_levels import LEVELS, Level
from linattn.runtime.cpu import machine_features
from linattn.runtime.integrity import SEAL_BYTES, sealed

NAMES = [level.name for level in LEVELS]


def level_named(name: str) -> Level:
    """A level, or the test is skipped where this machine lacks it."""
    level = next(level for level in LEVELS if level.name == name)
    lacking = set(level.added) - machine_features()
    if lacking:
        pytest.skip(f"compiled, not run: this CPU has no {', '.join(sorted(lacking))}")
    return level


def without(module: bytes, features: set[str]) -> bytes:
    """The module with questions about other things in the place of those about some features: the answers are no."""
    for feature in features:
        key = struct.pack("<I", len(feature)) + feature.encode()
        assert module.count(key) == 1, feature
        module = module.replace(key, key[:4] + b"?" * len(feature))
    return sealed(module[:-SEAL_BYTES])


def forced(module: bytes, level: Level) -> bytes:
    """The module as a machine of this level loads it."""
    better = LEVELS[: LEVELS.index(level)]
    return without(module, {feature for other in better for feature in other.added} - set(level.added))
