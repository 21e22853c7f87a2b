"""Steps whose arguments are packed once: what they give, whose memory it is, and what comes between them."""

from __future__ import annotations

import gc
import os
import random
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from linattn.runtime import Program, Sampling, Session, StateError, TargetError, generate
from linattn.runtime.device import Device
from linattn.runtime.engine import engine_of
from linattn.runtime.held import Lease
from linattn.runtime.holding import Holding
from linattn.runtime.lane import Lane, PackedStep, Side
from linattn.runtime.module import Module
from linattn.runtime.step import Step

from tests.stepped import CONTEXT, IDS, Counted, program

FEEDS: list[Callable[[int], Any]] = [
    lambda at: IDS[:, at : at + 1],
    lambda at: IDS[:, at : at + 1].tolist(),
    lambda at: IDS[0, at : at + 1],
    lambda at: IDS[:, at : at + 1].astype(np.int32),
]


def general(session: Session, at: int) -> np.ndarray:
    """A step that is not prepared: its position is given, as it is anyway."""
    return session.run({"input_ids": IDS[:, at : at + 1], "position_ids": np.array([[at]])})["logits"]


@cache
def expected() -> np.ndarray:
    """The logits of 48 tokens, in calls of one."""
    session = program("cpu").session()
    return np.concatenate([general(session, at) for at in range(48)], 1)


def step(session: Session) -> np.ndarray:
    at = session.position
    found = session.run({"input_ids": IDS[:, at : at + 1]})["logits"]
    np.testing.assert_array_equal(found, expected()[:, at : at + 1])
    return found


def started(at: int = 4) -> Session:
    """A session in a lane."""
    session = program("cpu").session()
    for _ in range(at):
        step(session)
    assert session._lane is not None
    assert session._lane.is_open
    return session


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> Counted:
    calls = Counted(Module.call_packed)
    monkeypatch.setattr(Module, "call_packed", calls)
    return calls


def test_steps_that_follow_one_another_are_packed_once(packed: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever integers the token is given as; two lists of arguments serve all of them, and no memory is taken."""
    session = started()
    before = packed.calls
    with monkeypatch.context() as patch:
        patch.setattr(Module, "pack", None)
        patch.setattr(Device, "_empty", None)
        for at in range(4, 40):
            found = session.run({"input_ids": FEEDS[at % 2](at)}, logits="last" if at % 3 else "all")["logits"]
            np.testing.assert_array_equal(found, expected()[:, at : at + 1])
            assert session.position == at + 1
    assert packed.calls - before == 36
    for at in range(40, 44):  # other forms of a token take the other ways
        found = session.run({"input_ids": FEEDS[2 + at % 2](at)})["logits"]
        np.testing.assert_array_equal(found, expected()[:, at : at + 1])
    step(session)


def test_how_little_a_step_does() -> None:
    """Counted, since what a step costs behind large weights is the code and the objects that it fetches."""
    session, feed = started(), {"input_ids": np.array([[3]])}
    counts, lines = list[int](), list[int]()
    for _ in range(8):
        calls = line_count = 0

        def profile(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal line_count
            line_count += event == "line"
            return trace

        sys.setprofile(profile)
        session.run(feed)
        sys.setprofile(None)
        sys.settrace(trace)
        session.run(feed)
        sys.settrace(None)
        counts.append(calls)
        lines.append(line_count)
    assert min(counts) <= 32, counts
    assert min(lines) <= 80, lines


def test_outputs_are_the_callers(packed: Counted) -> None:
    """Those that are kept are never written again, nor what is made of them; those that are not serve later steps."""
    session = started()
    kept = list[tuple[int, Any]]()
    shapes: list[Callable[[np.ndarray], Any]] = [
        lambda a: a,
        lambda a: a[0, -1],
        lambda a: a[0, 0, 3:].reshape(-1)[::2],
        lambda a: memoryview(a),
        lambda a: np.asarray(a).view(np.uint32),
        lambda a: np.from_dlpack(a),
        lambda a: np.frombuffer(a, np.float32),
    ]
    for at in range(4, 32):
        kept.append((at, shapes[at % len(shapes)](step(session))))
    for at, value in kept:
        want = shapes[at % len(shapes)](expected()[:, at : at + 1].copy())
        np.testing.assert_array_equal(np.asarray(value), np.asarray(want))
    kept.clear()
    owner = step(session)
    owner[...] = 0  # it may be written
    for _ in range(6):
        step(session)
    assert packed.calls > 30


def test_memory_goes_with_its_owner() -> None:
    """States are held no longer than a session holds them, outputs as long as a caller does, the program or not."""
    loaded = Program.load(program("cpu")._engine.module.file or module_bytes())
    device = loaded.device
    gc.collect()
    empty = device.allocated_bytes()
    session = loaded.session()
    for at in range(4):
        found = session.run({"input_ids": IDS[:, at : at + 1]})["logits"]
    snapshot = session.snapshot()
    for at in range(4, 8):
        found = session.run({"input_ids": IDS[:, at : at + 1]})["logits"]
    outputs = loaded.memory().workspace
    kept = [session.run({"input_ids": IDS[:, at : at + 1]})["logits"] for at in range(8, 16)]
    assert loaded.memory().workspace == outputs  # two are the caller's, and no more of the program's
    del kept
    session.restore(snapshot)
    assert session._lane is None
    del session, snapshot
    gc.collect()
    assert loaded.memory().held == 0
    del loaded
    gc.collect()
    assert device.allocated_bytes() - empty <= 3 * found.nbytes + (1 << 16)
    np.testing.assert_array_equal(found, expected()[:, 7:8])


def module_bytes() -> bytes:
    from linattn.frontend import CompileOptions
    from linattn.frontend.compile import compile_model

    from samples.tiny_hybrid import build

    return compile_model(build(), CompileOptions(target="cpu", max_context=64, prefill_blocks=())).module


def test_a_closed_program_takes_its_lanes() -> None:
    loaded = Program.load(module_bytes())
    session = loaded.session()
    for at in range(4):
        found = session.run({"input_ids": IDS[:, at : at + 1]})["logits"]
    assert session._lane is not None
    loaded.close()
    assert session._lane is None
    with pytest.raises(StateError, match="the program is closed"):
        session.run({"input_ids": [[1]]})
    np.testing.assert_array_equal(found, expected()[:, 3:4])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_is_refused() -> None:
    session = started()
    child = os.fork()
    if not child:
        try:
            session.run({"input_ids": [[1]]})
        except TargetError as error:
            os._exit(7 if "before this process was forked" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    step(session)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, TargetError])
def test_a_failure_at_every_boundary(when: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """Table 2 #37: position and states are as before the call, and steps go on; another session's mask lies between."""
    boundaries: list[tuple[Any, str]] = [
        (Module, "call_packed"),
        (Module, "_workspace_of"),
        (Side, "read"),
        (Lane, "open"),
        (Lane, "fits"),
        (PackedStep, "side"),
        (Step, "write_columns"),
        (Step, "refs_before"),
        (Holding, "_open_lane"),
        (Device, "host_buffer"),
    ]
    seen = set[str]()
    for owner, name in boundaries:
        for before in (0, 3, 4):
            session, far = program("cpu").session(), started(20)
            parts = engine_of(session.program).packed_step()
            assert parts is not None
            parts._kept.clear()  # whose memory has views, and is there
            for _ in range(before):
                kept = step(session)
            step(far)  # the columns are another's
            at, states = session.position, session.states.numpy() if before == 3 else None
            right = getattr(owner, name)

            def broken(*args: Any, right: Any = right, name: str = name, **more: Any) -> Any:
                seen.add(name)
                if when == "after":
                    right(*args, **more)
                raise error("injected")

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, broken)
                for _ in range(2):
                    try:
                        kept = step(session)
                        at += 1
                    except error:
                        assert session.position == at, name
            assert session.position == at, name
            if states is not None and at == before:
                for key, value in session.states.numpy().items():
                    np.testing.assert_array_equal(value, states[key])
            for _ in range(4):
                kept = step(session)
            del kept
            step(far)
    assert seen == {name for _, name in boundaries}


def test_rows_of_a_lane_are_its_own() -> None:
    """While it is open, and when its session is gone: who has fewer rows of its caches takes others or cleared ones."""
    session = started(8)
    snapshot = session.snapshot()
    forks = [session.fork() for _ in range(2)]
    for _ in range(6):
        step(session)
    assert session._lane is not None  # though the others have rows before its own
    assert session._lane.is_open
    now = session._line[-1]
    caches = now.lease.caches
    assert caches.extend(Lease(caches, now.lease.rows), now.lease.rows + 1).caches is not caches
    step(forks[0])
    assert forks[0]._line[-1].lease.caches is not caches
    views = [session.program.device.host_view(array) for array in caches.arrays]
    for view in views:  # rows that it has written
        assert view is not None
        view[..., 8:14, :] = np.nan
    del session, now
    gc.collect()
    step(forks[1])
    assert forks[1]._line[-1].lease.caches is caches
    for view in views:
        assert view is not None
        assert np.isfinite(view).all()
    for one in (*forks, program("cpu").session(snapshot)):
        for _ in range(8):
            step(one)


def test_two_threads_in_a_session_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    session, right = started(), Module.call_packed
    inside, go_on, errors = threading.Event(), threading.Event(), list[BaseException]()

    def slow(*args: Any) -> None:
        inside.set()
        assert go_on.wait(20)
        right(*args)

    monkeypatch.setattr(Module, "call_packed", slow)
    thread = threading.Thread(target=step, args=(session,))
    thread.start()
    assert inside.wait(20)
    for call in (lambda: step(session), session.snapshot, session.reset):
        with pytest.raises(StateError, match="in use by another thread"):
            call()
    go_on.set()
    thread.join()
    assert not errors
    monkeypatch.setattr(Module, "call_packed", right)
    step(session)
    assert session.position == 6


def test_sessions_in_threads() -> None:
    """Their tokens, positions and masks lie in the same memory, each call's for itself."""
    failures = list[BaseException]()

    def play() -> None:
        try:
            for _ in range(3):
                session = program("cpu").session()
                for _ in range(40):
                    step(session)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=play) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def play(seed: int, count: int, folder: Path) -> int:
    """Sessions of one program, between whose steps anything comes; each holds the first tokens that it says it does."""
    rng, calls = random.Random(seed), 0
    loaded = program("cpu")
    sessions = [loaded.session(window=rng.choice([0, 0, 2])) for _ in range(2)]
    snapshots, kept = list[Any](), list[tuple[int, np.ndarray]]()
    module = engine_of(loaded).module
    for _ in range(count):
        session = rng.choice(sessions)
        at, kind = session.position, rng.randrange(16)
        if at >= 44:
            session.reset()
        elif kind < 6:
            for _ in range(rng.randrange(1, 4)):
                found = step(session)
                if rng.random() < 0.2:
                    kept.append((session.position - 1, found[0]))
                calls += session._lane is not None
        elif kind == 6:
            np.testing.assert_array_equal(general(session, at), expected()[:, at : at + 1])
        elif kind == 7:
            snapshots.append(session.snapshot())
        elif kind == 8 and snapshots:
            session.restore(rng.choice(snapshots))
        elif kind == 9:
            sessions[rng.randrange(2)] = session.fork() if rng.random() < 0.7 else loaded.session()
        elif kind == 10:
            before = session.states.numpy()
            right = module.call_packed, module.call_step

            def broken(*args: Any) -> Any:
                raise KeyboardInterrupt

            module.call_packed = module.call_step = broken  # type: ignore[method-assign]
            try:
                step(session)
                raise AssertionError("was not broken")
            except KeyboardInterrupt:
                module.call_packed, module.call_step = right  # type: ignore[method-assign]
            for name, value in session.states.numpy().items():
                np.testing.assert_array_equal(value, before[name])
        elif kind == 11:
            name = rng.choice(loaded.states).name
            session.set_state(name, session.states[name].numpy())
        elif kind == 12 and session._window:
            back = rng.randrange(min(2, len(session._line)))
            session.rollback(back)
        elif kind == 13 and at:
            snapshot = session.snapshot()
            how = None if rng.random() < 0.5 else Sampling(1.0, seed=rng.randrange(9))
            for _ in zip(range(rng.randrange(1, 6)), generate(session, IDS[0, at : at + 1], 6, how), strict=False):
                pass
            session.restore(snapshot)
        elif kind == 14:
            session.reset()
        elif kind == 15:
            session.save(folder / "s")
            sessions[sessions.index(session)] = Session.load(loaded, folder / "s")
        if rng.random() < 0.05:
            kept.clear()
    for at, row in kept:
        np.testing.assert_array_equal(row, expected()[0, at : at + 1])
    return calls


def test_random_plays(tmp_path: Path) -> None:
    assert sum(play(seed, 60, tmp_path) for seed in range(40)) > 500


def test_the_end_of_the_context() -> None:
    loaded = Program.load(module_bytes())
    session = loaded.session()
    for at in range(64):
        session.run({"input_ids": IDS[:, at : at + 1]})
    with pytest.raises(StateError, match="context full"):
        session.run({"input_ids": [[1]]})
    assert session.position == 64 < CONTEXT
