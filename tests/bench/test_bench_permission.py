"""The library that asks for the matrix unit in a program that does not."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
from linattn.runtime.bench import permission

UMASK = 95


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="Linux on x86-64 has the unit")
def test_the_call_is_made_before_the_program_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A call whose effect the program can see, in place of the one that this CPU may refuse."""
    seen = [sys.executable, "-c", "import os; print(oct(os.umask(0)))"]
    monkeypatch.setattr(permission, "permitted", lambda: True)
    monkeypatch.setattr(permission, "REQUEST", (UMASK, 0o123))
    environment = permission.environment(tmp_path)
    assert environment is not None
    done = subprocess.run(seen, capture_output=True, text=True, env=environment, check=True)
    assert (done.stdout.strip(), done.stderr) == ("0o123", "")
    monkeypatch.setenv("LD_PRELOAD", "/other.so")
    again = permission.environment(tmp_path)
    assert again is not None
    assert again["LD_PRELOAD"] == f"{tmp_path}/permission.so:/other.so"


def test_no_other_environment_without_the_unit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(permission, "permitted", lambda: False)
    assert permission.environment(tmp_path) is None
    assert not list(tmp_path.iterdir())
