"""What the CPU target makes of ``--cpu-features``."""

from __future__ import annotations

import pytest
from linattn.frontend.targets import TargetOptions, resolve_target


@pytest.mark.parametrize(
    ("features", "bits", "note"),
    [("+avx2,+fma", 256, "f16c"), ("+avx2,+fma,+f16c", 256, ""), ("x86-64-v3", 256, ""), ("generic", 128, "")],
)
def test_features(features: str, bits: int, note: str) -> None:
    """Width of the vectors; f16 without the instructions for it is said to be slow."""
    target = resolve_target("cpu", TargetOptions(cpu_features=features))
    assert target.capabilities.vector_bits == bits
    assert [note in text for text in target.notes] == ([True] if note else [])
