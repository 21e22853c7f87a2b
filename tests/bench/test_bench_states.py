"""`linattn-bench states`: every row that docs/state.md quotes is there, and rooms that are too small are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from linattn.frontend import CompileOptions
from linattn.frontend.compile import compile_model
from linattn.runtime.bench import cli as bench_cli
from linattn.runtime.bench import state_bench
from linattn.runtime.bench.cli import main

from samples.tiny_hybrid import build

ROWS = [
    *("snapshot", "fork", "restore", "rollback of a token", "rows of one row", "save", "load", "step"),
    *("step with guard='nan'", "first step of a fork, in new memory", "first step of a fork"),
    "2 forks of 8 tokens, 3 steps each: against sessions of their own",
    "the same in memory new to the process",
    *("steps of 1 sessions", "steps of 8 sessions"),
]


def test_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(state_bench, "_SECONDS", 0.05)
    path = tmp_path / "tiny.vmfb"
    options = CompileOptions(target="cpu", max_context=64, prefill_blocks=(8,))
    path.write_bytes(compile_model(build(), options).module)
    command = ["states", str(path), "--prompt", "8", "--forks", "2", "--steps", "3"]
    assert main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["what"] for row in rows] == ROWS
    assert all(row.get("median_us", row.get("cpu_ratio", row.get("per_s"))) > 0 for row in rows)
    assert rows[-4]["bytes_ratio"] < 1.2
    with monkeypatch.context() as patch:  # the same as a table, not measured again
        patch.setattr(bench_cli, "measure_states", lambda *_: rows)
        assert main(command) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(ROWS) + 1
    assert main(["states", str(path), "--prompt", "60"]) == 2
    assert "no room, got 60 + 30 tokens, expected at most 64" in capsys.readouterr().err
