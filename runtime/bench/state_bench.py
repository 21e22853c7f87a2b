"""What is done with states, measured: snapshots, forks, files, guards, and the steps of sessions side by side."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from linattn.runtime.device import HostArray
from linattn.runtime.errors import InputError
from linattn.runtime.generation.feeding import token_input
from linattn.runtime.program import Program
from linattn.runtime.session import Session

_TURNS = 30
_ROUNDS = 4
_SECONDS = 3.0


def measure_states(module: Path, device: str | None, prompt: int, forks: int, steps: int) -> list[dict[str, Any]]:
    """Measures a module.

    Args:
        module: A `.vmfb` or a bundle of a model of token ids with one row.
        device: Where; None: where it was compiled for.
        prompt: Tokens that are committed first.
        forks: How many sessions go on from there.
        steps: Tokens that each of them appends.

    Returns:
        Rows of `what`, `median_us` (wall) or `per_s`, `cpu_us` (of all threads of the process) and `bytes`.

    Raises:
        InputError: The model has no room for that, or takes no token ids.
    """
    program = Program.load(module, device)
    session = program.session(window=2)
    name = token_input(session)
    limit = program.manifest.token_limit
    if limit is not None and prompt + max(steps, _TURNS) > limit:
        raise InputError("no room", got=f"{prompt} + {max(steps, _TURNS)} tokens", expected=f"at most {limit}")
    ids: HostArray = np.random.default_rng(0).integers(1, 100, (1, prompt))

    def read(one: Session, tokens: HostArray) -> None:
        one.run({name: tokens}, "last")

    one, rows = ids[:, :1], list[dict[str, Any]]()
    read(session, ids)
    start = session.snapshot()
    use = program.memory()

    def add(
        what: str, call: Callable[[], Any], before: Callable[[], Any] | None = None, nbytes: int | None = None
    ) -> None:
        rows.append({"what": what, **_time(call, before), "bytes": nbytes})

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state")
        add("snapshot", session.snapshot, nbytes=0)
        add("fork", session.fork, nbytes=0)
        add("restore", lambda: session.restore(start), nbytes=0)
        add("rollback of a token", lambda: session.rollback(1), lambda: read(session, one))
        add("rows of one row", lambda: session.rows([0]), nbytes=use.session)
        session.restore(start)
        session.save(path)
        add("save", lambda: session.save(path), nbytes=path.stat().st_size)
        add("load", lambda: Session.load(program, path), nbytes=path.stat().st_size)
    plain, guarded = (program.session(start, guard=guard) for guard in (None, "nan"))
    add("step", lambda: read(plain, one))
    add("step with guard='nan'", lambda: read(guarded, one))
    held: list[Session] = []
    program.trim()
    for what in ("first step of a fork, in new memory", "first step of a fork"):  # then in what those left
        add(what, lambda: read(held[-1], one), lambda: held.append(program.session(start)))
        held.clear()
    rows += _forks(program, lambda s, n: read(s, ids[:, :n] if n > 1 else one), prompt, forks, steps)
    for count in (1, 8):
        rows.append(
            _side_by_side([program.session(start) for _ in range(count)], lambda s: read(s, one), limit, prompt)
        )
    return rows


def _time(call: Callable[[], Any], before: Callable[[], Any] | None) -> dict[str, float]:
    walls, cpu = list[float](), list[float]()
    for _ in range(_TURNS):
        if before is not None:
            before()
        wall, used = time.perf_counter(), time.process_time()
        call()
        cpu.append(time.process_time() - used)
        walls.append(time.perf_counter() - wall)
    return {"median_us": statistics.median(walls) * 1e6, "cpu_us": statistics.median(cpu) * 1e6}


def _forks(
    program: Program, read: Callable[[Session, int], None], prompt: int, forks: int, steps: int
) -> list[dict[str, Any]]:
    """A prompt and its forks' steps, against a prompt and as many steps there of sessions that own all that they hold.

    The first forks get memory that is new to the process, those of later turns what the forks of the turn before had.
    """
    nothing = program.memory().held

    def begun() -> Session:
        session = program.session()
        read(session, prompt)
        return session

    def owners() -> list[Session]:
        base = begun()
        found = [base.fork() for _ in range(forks)]
        for session in found:
            read(session, 1)  # from here on it shares nothing
            read(session, 1)
        return found

    def spent(sessions: Callable[[], list[Session]]) -> float:
        start = time.process_time()
        for session in sessions():
            for _ in range(steps):
                read(session, 1)
        return time.process_time() - start

    def forked() -> list[Session]:
        base = begun()
        kept.extend(base.fork() for _ in range(forks))
        return kept

    def separate() -> list[Session]:
        begun()
        return own

    kept: list[Session] = []
    own = owners()
    before = program.memory().held
    alone, together = list[float](), list[float]()
    held = before
    for _ in range(_ROUNDS):  # in turns, since machines are not the same from second to second
        own.clear()
        own.extend(owners())
        alone.append(spent(separate))
        kept.clear()
        together.append(spent(forked))
        held = program.memory().held
    what = f"{forks} forks of {prompt} tokens, {steps} steps each: against sessions of their own"
    bytes_ratio = (held - before) / max(before - nothing, 1)
    ratio, first = statistics.median(together[1:]) / statistics.median(alone[1:]), together[0] / alone[0]
    return [
        {"what": what, "cpu_ratio": ratio, "bytes_ratio": bytes_ratio},
        {"what": "the same in memory new to the process", "cpu_ratio": first, "bytes_ratio": bytes_ratio},
    ]


def _side_by_side(
    sessions: list[Session], step: Callable[[Session], None], limit: int | None, prompt: int
) -> dict[str, Any]:
    """Steps a second of all sessions together, each in a thread."""
    room = min(10_000, (limit or 1 << 20) - prompt)
    stop = time.perf_counter() + _SECONDS

    def go(session: Session) -> int:
        done, base = 0, session.snapshot()
        while time.perf_counter() < stop:
            if done and done % room == 0:
                session.restore(base)
            step(session)
            done += 1
        return done

    start, used = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(len(sessions)) as pool:
        done = sum(pool.map(go, sessions))
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    return {"what": f"steps of {len(sessions)} sessions", "per_s": done / seconds, "cpu_us": cpu / done * 1e6}


def states_text(rows: list[dict[str, Any]]) -> str:
    """The rows for people."""
    lines = [f"{'what':72} {'median us':>10} {'cpu us':>10} {'bytes':>10}"]
    for row in rows:
        if "cpu_ratio" in row:
            cells = "", f"x {row['cpu_ratio']:.2f}", f"x {row['bytes_ratio']:.2f}"
        elif "per_s" in row:
            cells = f"{row['per_s']:.0f}/s", f"{row['cpu_us']:.0f}", ""
        else:
            cells = f"{row['median_us']:.1f}", f"{row['cpu_us']:.1f}", "" if row["bytes"] is None else str(row["bytes"])
        lines.append(f"{row['what']:72} {cells[0]:>10} {cells[1]:>10} {cells[2]:>10}")
    return "\n".join(lines)
