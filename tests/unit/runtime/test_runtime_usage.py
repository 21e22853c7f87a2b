"""What users are told: memory in bytes, the log, how things are printed, and finite numbers by dtype."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from linattn.runtime import InputError, MemoryUse, Program
from linattn.runtime.finite import _all_finite
from tiny_hybrid import Hybrid, open_form

Load = Callable[..., Program]
STATE = 4 * (4 + 4 + 2 * 24 * 4)
"""Bytes of the tiny hybrid's states, 24 rows of its cache among them."""
MOVING = 4 * (4 + 4)


def test_memory(load: Load) -> None:
    program = load()
    use = program.memory()
    assert isinstance(use, MemoryUse)
    assert (use.device, use.batch, use.held) == (program.device.uri, 1, 0)
    assert use.session == STATE + MOVING
    assert use.files > 1000
    session = program.session()
    assert program.memory().held == STATE
    session.run({"input_ids": [1, 2, 3]})
    after = program.memory()
    assert STATE <= after.held <= STATE + 2 * MOVING
    assert after.workspace > use.workspace
    fork, snapshot = session.fork(), session.snapshot()
    assert program.memory().held == after.held
    fork.run({"input_ids": [1]})
    assert after.held < program.memory().held <= after.held + STATE + MOVING
    del fork, snapshot, session
    use = program.memory()
    assert (use.held, use.kept) == (0, 0)  # the module brings its results, which may be what it was given


def test_loads_are_told(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    path = tmp_path / "tiny.vmfb"
    path.write_bytes(Hybrid().compile())
    with caplog.at_level(logging.INFO, "linattn"):
        Program.load(path, "local-sync")
    assert [record.name for record in caplog.records] == ["linattn.runtime"]
    assert f"{path}: loaded on local-sync in 0." in caplog.text


def test_how_they_are_printed(cpu: Program) -> None:
    session = cpu.session()
    session.run({"input_ids": [1, 2]})
    assert repr(session) == "<Session of tiny-hybrid on local-sync: position 2, batch 1>"
    program = Program.load(open_form(Hybrid()).compile(), "local-sync")
    assert repr(program.session()) == "<Session of tiny-hybrid on local-sync: position 0, batch open>"


def test_what_is_public(cpu: Program) -> None:
    """Only what users may call."""
    session = cpu.session()
    public = [{name for name in dir(thing) if name[0] != "_"} for thing in (cpu, session, session.snapshot())]
    assert public[0] == {
        *("batch", "choice", "close", "cpu_level", "device", "file", "inputs", "load", "manifest", "memory", "outputs"),
        *("run", "session", "states", "trim"),
    }
    assert public[1] == {
        *("batch", "cancel", "fork", "load", "position", "program", "reset", "reset_rows", "reset_state", "restore"),
        *("rollback", "rows", "run", "save", "set_state", "snapshot", "states", "submit"),
    }
    assert public[2] == {"batch", "nbytes", "position"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_finite(dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(dtype)
    values[:4] = np.finfo(np.float16).max  # sums may overflow, values do not
    if dtype == "float32":
        values[:4] = np.finfo(np.float32).max
    assert _all_finite(values, dtype)
    assert _all_finite(values[:0], dtype)
    for bad in (np.nan, np.inf, -np.inf):
        for place in (0, 500, 999):
            wrong = values.copy()
            wrong[place] = bad
            assert not _all_finite(wrong, dtype)


def test_guards_there_are(cpu: Program) -> None:
    with pytest.raises(InputError, match="guard: unknown choice, got 'inf'"):
        cpu.session(guard="inf")  # type: ignore[arg-type]
