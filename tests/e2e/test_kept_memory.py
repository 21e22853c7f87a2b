"""Memory that ended sessions and dropped snapshots leave to the next ones: what is in it is nobody's state."""

from __future__ import annotations

import gc
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from linattn.runtime import Program, Session, TargetError, greedy
from linattn.runtime import pool as pool_module
from linattn.runtime.device import DeviceArray, Move, row_regions
from linattn.runtime.engine import engine_of
from linattn.runtime.pool import ALL, Pool

from tests.allocations import allocations
from tests.kept_play import Play
from tests.stepped import IDS, TARGETS, module

ROWS = 2
"""The axis of a cache's tokens."""


@cache
def program(target: str) -> Program:
    """One of this file's own: an error that another file's test keeps holds sessions, which would be counted here."""
    return Program.load(module(target))


def pool_of(loaded: Program) -> Pool:
    return engine_of(loaded).pool


def steps(session: Session, start: int, stop: int) -> np.ndarray:
    return np.concatenate([session.run({"input_ids": IDS[:, i : i + 1]})["logits"] for i in range(start, stop)], 1)


def prompt(loaded: Program, tokens: int) -> Session:
    session = loaded.session()
    session.run({"input_ids": IDS[:, :tokens]}, "last")
    return session


def kept(loaded: Program) -> list[tuple[list[DeviceArray], int]]:
    return [entry for kind in pool_of(loaded)._in_order for entry in kind.entries]


def poison(loaded: Program) -> int:
    """NaN wherever what is kept says that it may hold anything; elsewhere there are zeros."""
    device = loaded.device
    for arrays, filled in kept(loaded):
        for array in arrays:
            last = min(filled, array.shape[ROWS]) if filled != ALL else 0
            regions = [(0, 0, array.nbytes)] if filled == ALL else row_regions(array, ROWS, 0, last)
            assert filled == ALL or not np.take(device.to_host(array), range(last, array.shape[ROWS]), ROWS).any()
            device.move([Move(device.upload(np.full(array.shape, np.nan, np.float32), "float32"), array, regions)])
    return len(kept(loaded))


@TARGETS
def test_the_next_ones_take_it(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ended sessions, forks and snapshots: a second time nothing is allocated; the same logits every time."""
    loaded, found = program(target), list[np.ndarray]()
    loaded.trim()
    for turn in range(2):
        with allocations(monkeypatch) as sizes:
            session = prompt(loaded, 20)
            snapshot = session.snapshot()
            forks = [session.fork() for _ in range(3)] + [loaded.session(snapshot)]
            found.append(np.stack([steps(fork, 20, 22) for fork in forks]))
            steps(session, 20, 22)
            before = loaded.memory().held
            del session, snapshot, forks
        assert loaded.memory().held == 0
        assert loaded.memory().kept == pool_of(loaded).nbytes == before, turn
        assert bool(sizes) == (turn == 0)
        poison(loaded)
    assert np.isfinite(found[0]).all()
    assert (np.stack(found) == found[0][0]).all()


@pytest.mark.parametrize(
    ("target", "how"),
    [
        *(("cpu", how) for how in ("session", "rows", "fork", "reset", "load", "set_state", "series")),
        *(pytest.param("vulkan", how, marks=pytest.mark.vulkan) for how in ("session", "fork")),
    ],
)
def test_stale_memory_is_nobody_s_state(target: str, how: str, tmp_path: Path) -> None:
    """Whatever is made of it: NaN that others left behind is in no state and in no logits."""
    loaded = program(target)
    loaded.trim()
    want = steps(prompt(loaded, 4), 4, 10)
    states = prompt(loaded, 4).states.numpy()
    file = tmp_path / "state.safetensors"
    for _ in range(2):
        ends = [prompt(loaded, tokens) for tokens in (48, 40)]  # more than anybody has afterwards
        del ends
        assert poison(loaded) >= 4
        if how == "reset":
            session = prompt(loaded, 40)
            session.reset()
            session.run({"input_ids": IDS[:, :4]}, "last")
        else:
            session = prompt(loaded, 4)
        if how == "rows":
            session.rows([0])
        elif how == "fork":
            base = session
            session = base.fork()
            steps(base, 4, 6)
        elif how == "load":
            session.save(file)
            session = Session.load(loaded, file)
        elif how == "set_state":
            for name in states:
                session.set_state(name, states[name])
        elif how == "series":
            list(greedy(session.fork(), [int(IDS[0, 4])], 20))
        for name, state in session.states.numpy().items():
            np.testing.assert_array_equal(state, states[name], err_msg=name)
        np.testing.assert_array_equal(steps(session, 4, 10), want)
        del session


def test_what_somebody_still_refers_to_is_not_kept() -> None:
    """Other states, a step under way: an array of one set is enough."""
    loaded = program("cpu")
    loaded.trim()
    session = prompt(loaded, 8)
    array = session._line[-1].moving[0]
    cache = session._line[-1].lease.caches.arrays[1]
    del session
    assert all(one is not array and one is not cache for arrays, _ in kept(loaded) for one in arrays)
    before = loaded.device.to_host(array), loaded.device.to_host(cache)
    others = [prompt(loaded, 30) for _ in range(3)]
    np.testing.assert_array_equal(loaded.device.to_host(array), before[0])
    np.testing.assert_array_equal(loaded.device.to_host(cache), before[1])
    del others
    one = prompt(loaded, 8)
    other = one.fork()
    other.set_state(loaded.states[0].name, other.states[loaded.states[0].name].numpy())  # shares all but one
    del other
    np.testing.assert_array_equal(steps(one, 8, 12), steps(prompt(loaded, 8), 8, 12))


def test_what_ends_in_a_circle_is_kept_too() -> None:
    loaded = program("cpu")
    loaded.trim()
    session: Any = prompt(loaded, 8)
    circle = [session]
    circle.append(circle)
    held = loaded.memory().held
    del session, circle
    gc.collect()
    assert loaded.memory().kept == held


def test_what_is_done_again_and_again_adds_nothing(tmp_path: Path) -> None:
    """What is not taken from there, and goes there in the end, would be kept until there is no room for more."""
    loaded, file, found = program("cpu"), tmp_path / "state.safetensors", set[int]()
    loaded.trim()
    prompt(loaded, 8).save(file)
    for turn in range(6):
        session = Session.load(loaded, file)
        steps(session, 8, 10)
        session.rows([0])
        for name, view in session.states.items():
            session.set_state(name, view.numpy())
            session.reset_state(name)
        session.reset()
        other = prompt(loaded, 9).fork()
        steps(other, 9, 11)
        list(greedy(other, [1], 5))
        del session, other, view
        if turn > 1:
            found.add(loaded.memory().kept)
    assert len(found) == 1


def test_no_more_than_the_limit_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = program("cpu")
    loaded.trim()
    one = prompt(loaded, 8)
    steps(one, 8, 10)
    size = loaded.memory().held
    monkeypatch.setattr(pool_module, "_MOST_BYTES", 3 * size)
    sessions = [one, *(one.fork() for _ in range(9))]
    for session in sessions:
        steps(session, 10, 12)
    assert loaded.memory().held == 10 * size
    del one, session, sessions
    assert 2 * size < loaded.memory().kept <= 3 * size
    loaded.trim()
    assert loaded.memory().kept == 0
    monkeypatch.setattr(pool_module, "_MOST_BYTES", 0)
    steps(prompt(loaded, 8), 8, 10)
    assert loaded.memory().kept == 0


def test_it_is_freed_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that has nothing left is asked again without what is kept; a program that is closed keeps nothing."""
    loaded, asked = Program.load(module("cpu")), list[int]()
    steps(prompt(loaded, 8), 8, 10)
    assert loaded.memory().kept > 0
    right = loaded.device._hal_allocator

    class Full:
        """Has nothing as long as anything is kept."""

        def allocate_buffer(self, *args: Any) -> Any:
            asked.append(pool_of(loaded).nbytes)
            if asked[-1] or len(asked) > 2:
                raise RuntimeError("RESOURCE_EXHAUSTED")
            return right.allocate_buffer(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loaded.device, "_hal_allocator", Full())
        loaded.device.empty((8,), "float32")
        assert asked[1:] == [0]
        with pytest.raises(TargetError, match="cannot allocate"):
            loaded.device.empty((8,), "float32")
        assert len(asked) == 3  # there is nothing to be freed: it is not asked again
    session = prompt(loaded, 8)
    fork = session.fork()
    loaded.close()
    del session, fork
    assert pool_of(loaded).nbytes == 0


@TARGETS
def test_anything_in_any_order(target: str, tmp_path: Path) -> None:
    """What is done with states, failures in between, beside a program that keeps nothing and is given zeros."""
    play = Play(Program.load(module(target)), Program.load(module(target)), IDS, tmp_path, seed=1)
    for _ in range(300 if target == "cpu" else 12):
        play.turn()
        poison(play.program)
    play.check()
    assert play.taken > (20 if target == "cpu" else 1)
