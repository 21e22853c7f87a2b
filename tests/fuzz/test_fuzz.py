"""Each fuzzer for a few seconds; by hand for as long as wanted: `pytest tests/fuzz --fuzz-seconds 600`."""

from __future__ import annotations

from pathlib import Path

import pytest
from campaign import run

FOLDER = Path(__file__).resolve().parents[2] / "build" / "fuzz"
EXPECTED = {
    "models": {"lowered", "UnsupportedModelError"},
    "nodes": {"compiled", "UnsupportedModelError"},
    "manifests": {"ran", "TargetError"},
    "flips": {"TargetError"},
    "sessions": {"sessions"},
}
"""What the first seconds must have seen at least, or the fuzzer does not reach what it is for."""


@pytest.mark.parametrize("kind", EXPECTED)
def test_no_findings(kind: str, pytestconfig: pytest.Config) -> None:
    outcome = run(kind, pytestconfig.getoption("--fuzz-seconds"), pytestconfig.getoption("--fuzz-seed"), FOLDER)
    print(f"{kind}: {outcome.cases} cases, {dict(outcome.words)}")
    assert not outcome.findings, "\n".join(outcome.findings)
    assert EXPECTED[kind] <= set(outcome.words)
