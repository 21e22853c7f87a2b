"""Steps of one token: prepared ones give what the general call gives, and keep all that it promises."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any, Literal

import numpy as np
import pytest
from linattn.runtime import (
    InputError,
    Sampling,
    Session,
    StateError,
    TargetError,
    calling,
    generate,
    greedy,
    greedy_rows,
)
from linattn.runtime.engine import engine_of
from linattn.runtime.generation.sampling import Sampler
from linattn.runtime.held import Caches
from linattn.runtime.lane import Lane
from linattn.runtime.step import Step

from tests.stepped import CONTEXT, IDS, TARGETS, program


def run(session: Session, start: int, stop: int) -> np.ndarray:
    return session.run({"input_ids": IDS[:, start:stop]})["logits"]


def general(session: Session, start: int, stop: int) -> np.ndarray:
    """Steps that are not prepared: positions are given, as they are anyway."""
    parts = [{"input_ids": IDS[:, at : at + 1], "position_ids": np.array([[at]])} for at in range(start, stop)]
    return np.concatenate([session.run(part)["logits"] for part in parts], 1)


def steps(session: Session, start: int, stop: int) -> np.ndarray:
    return np.concatenate([run(session, at, at + 1) for at in range(start, stop)], 1)


@cache
def expected(target: str) -> np.ndarray:
    """The logits of all tokens up to 40, in calls of one."""
    return general(program(target).session(), 0, 40)


def in_lane(lane: Lane, inputs: Any, prepared: list[int], right: Any = Lane.run) -> Any:
    found = right(lane, inputs)
    prepared += [] if found is None else [lane.position - 1]
    return found


@TARGETS
def test_steps_are_prepared_and_equal_general_calls(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions at other positions in between, rollbacks and resets: the mask's columns are those of each."""
    prepared = list[int]()
    for right in (Step.call, Step.append):

        def counted(self: Step, ids: Any, now: Any, *memory: Any, right: Any = right) -> Any:
            prepared.append(now.position)
            return right(self, ids, now, *memory)

        monkeypatch.setattr(Step, right.__name__, counted)
    monkeypatch.setattr(Lane, "run", lambda self, inputs: in_lane(self, inputs, prepared))
    one, two, want = program(target).session(window=4), program(target).session(), expected(target)
    assert prepared == []
    np.testing.assert_array_equal(steps(one, 0, 20), want[:, :20])
    np.testing.assert_array_equal(steps(two, 0, 3), want[:, :3])
    np.testing.assert_array_equal(steps(one, 20, 25), want[:, 20:25])
    one.rollback(3)
    np.testing.assert_array_equal(steps(one, 22, 30), want[:, 22:30])
    two.reset()
    fork = one.fork()
    np.testing.assert_array_equal(steps(two, 0, 2), want[:, :2])
    np.testing.assert_array_equal(steps(fork, 30, 40), want[:, 30:40])
    np.testing.assert_array_equal(steps(one, 30, 40), want[:, 30:40])
    assert prepared == [*range(20), *range(3), *range(20, 25), *range(22, 30), 0, 1, *range(30, 40), *range(30, 40)]


@TARGETS
def test_a_fork_goes_the_shortest_way_from_its_first_step(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So do the session that it comes from and one that went back to a snapshot: nobody's states change another's."""
    want = expected(target)
    monkeypatch.setattr(Step, "call", None)  # the longer way
    monkeypatch.setattr(Session, "_run", None)  # the longest
    session = program(target).session()
    steps(session, 0, 10)
    snapshot = session.snapshot()
    forks = [session.fork() for _ in range(3)]
    for at in range(10, 20):
        for one in (*forks, session):
            np.testing.assert_array_equal(run(one, at, at + 1), want[:, at : at + 1])
    session.restore(snapshot)
    np.testing.assert_array_equal(steps(session, 10, 20), want[:, 10:20])
    np.testing.assert_array_equal(steps(program(target).session(snapshot), 10, 20), want[:, 10:20])


@TARGETS
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failure_at_every_boundary_of_a_fork_s_first_step(
    target: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fork stands where it stood and shares what it shared; the other goes on in between."""
    loaded, want = program(target), expected(target)
    engine = engine_of(loaded)
    step = engine.step(1)
    boundaries = [(engine.module, "_invoke"), (loaded.device, "_empty"), (loaded.device, "move")]
    session = loaded.session()
    steps(session, 0, 10)
    snapshot = session.snapshot()
    for owner, name in [*boundaries, (step, "append"), (step, "read_all"), (engine.pool, "take_like")]:
        session.restore(snapshot)
        fork = session.fork()
        steps(session, 10, 11)  # so that the fork must copy
        loaded.trim()
        right = getattr(owner, name)

        def broken(*args: Any, right: Any = right) -> Any:
            if when == "after":
                right(*args)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            with pytest.raises(KeyboardInterrupt):
                run(fork, 10, 11)
        assert fork.position == 10, name
        np.testing.assert_array_equal(steps(session, 11, 13), want[:, 11:13])
        np.testing.assert_array_equal(steps(fork, 10, 13), want[:, 10:13])


@TARGETS
@pytest.mark.parametrize("has_last", [True, False])
def test_blocks_are_prepared_and_equal_general_calls(
    target: str, has_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of one block, its logits all or the last ones, at other positions in between; two blocks are not.

    The last ones by their own function or, where the module has none, cut from all.
    """
    right, prepared = Step.call, list[tuple[int, int]]()

    def counted(self: Step, ids: Any, now: Any, into: Any) -> Any:
        prepared.append((now.position, self.tokens))
        return right(self, ids, now, into)

    def block(session: Session, at: int, which: Literal["all", "last"] = "all") -> np.ndarray:
        given = {"input_ids": IDS[:, at : at + 8], "position_ids": np.arange(at, at + 8)[None]}
        return session.run(given, logits=which)["logits"]

    monkeypatch.setattr(Step, "call", counted)
    engine = engine_of(program(target))
    if not has_last:
        entries = [dataclasses.replace(entry, last=None) for entry in engine.manifest.entry_points]
        monkeypatch.setattr(engine, "manifest", dataclasses.replace(engine.manifest, entry_points=tuple(entries)))
        monkeypatch.setattr(engine, "_steps", {})
    one, two, plain = (program(target).session(window=4) for _ in range(3))
    want = {at: block(plain, at) for at in (0, 8, 16)}
    last = block(program(target).session(), 0, "last")
    assert prepared == []
    np.testing.assert_array_equal(run(one, 0, 8), want[0])
    np.testing.assert_array_equal(one.run({"input_ids": IDS[0, 8:16].tolist()})["logits"], want[8])
    np.testing.assert_array_equal(two.run({"input_ids": IDS[:, :8]}, logits="last")["logits"], last)
    assert last.shape[1] == 1
    assert has_last or np.array_equal(last, want[0][:, -1:])
    assert prepared == [(0, 8), (8, 8), (0, 8)]
    step = run(one, 16, 17)
    one.rollback(1)
    np.testing.assert_array_equal(run(one, 16, 24), want[16])
    np.testing.assert_array_equal(run(two, 8, 16), want[8])
    np.testing.assert_array_equal(run(two, 16, 17), step)
    assert prepared[3:] == [(16, 1), (16, 8), (8, 8), (16, 1)]
    one.reset()
    run(one, 0, 16)
    run(one, 16, 26)
    with pytest.raises(StateError, match="context full"):
        run(one, 20, 20 + CONTEXT)
    assert len(prepared) == 7


@TARGETS
def test_a_ctrl_c_while_the_mask_is_written(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever of the columns is written by then, the next step has its own."""
    step = engine_of(program(target)).step(1)
    assert step is not None
    session, far = program(target).session(), program(target).session()
    steps(session, 0, 12)
    run(far, 0, 32)

    class Interrupting:
        def __init__(self, columns: np.ndarray) -> None:
            self._columns = columns

        def __setitem__(self, place: Any, value: Any) -> None:
            self._columns[place] = value
            raise KeyboardInterrupt

    columns = step._columns
    with monkeypatch.context() as patch:
        patch.setattr(step, "_columns", Interrupting(columns))
        with pytest.raises(KeyboardInterrupt):
            run(far, 32, 33)
    assert columns is not None
    assert columns[..., 31].all()
    assert (session.position, far.position) == (12, 32)
    np.testing.assert_array_equal(steps(session, 12, 14), expected(target)[:, 12:14])


@TARGETS
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failure_at_every_boundary_of_a_step(target: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table 2 #37: session, snapshot and window are as before, and the memory of nobody is lost."""
    injected = TargetError("injected") if when == "before" else KeyboardInterrupt()
    loaded = program(target)
    step, session = engine_of(loaded).step(1), loaded.session(window=2)
    steps(session, 0, 10)
    snapshot, want = session.snapshot(), expected(target)
    module, device = engine_of(loaded).module, loaded.device
    boundaries: list[tuple[Any, str]] = [
        (module, "_invoke"),
        (module, "_wait_for"),
        (device, "_empty"),
        (device, "move"),
    ]
    boundaries += [(step, "_write"), (step, "read"), (step, "call"), (session, "_commit")]
    for owner, name in boundaries:
        other = session.fork()
        steps(other, 10, 11)  # so that the session must copy
        loaded.trim()
        right = getattr(owner, name)

        def broken(*args: Any, right: Any = right) -> Any:
            if when == "after":
                right(*args)
            raise injected

        if (name, when) == ("_commit", "after"):
            continue  # it has happened
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            with pytest.raises(type(injected)):
                run(session, 10, 11)
        assert session.position == 10
        np.testing.assert_array_equal(steps(session.fork(), 10, 12), want[:, 10:12])
        np.testing.assert_array_equal(steps(loaded.session(snapshot), 10, 12), want[:, 10:12])
    session.rollback(1)
    np.testing.assert_array_equal(steps(session, 9, 13), want[:, 9:13])


@TARGETS
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failure_in_a_step_in_place(target: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table 2 #37: where nobody else holds its states, a session's step replaces them in place, all or none.

    On a CPU so do the steps of a generation; those of `run` go on in a lane (test_lane.py).
    """
    injected = TargetError if when == "before" else KeyboardInterrupt
    loaded, want = program(target), expected(target)
    step, session, at = engine_of(loaded).step(1), loaded.session(), 12
    monkeypatch.setattr(engine_of(loaded), "packed_step", lambda: None)
    steps(session, 0, at)
    module, far = engine_of(loaded).module, loaded.session()
    run(far, 0, 32)
    boundaries: list[tuple[Any, str]] = [(module, "_invoke"), (module, "_wait_for"), (module, "call_step")]
    boundaries += [(step, "append"), (step, "read"), (step, "write_columns"), (Caches, "grow")]
    for owner, name in boundaries:
        steps(far, far.position, far.position + 1)  # so that the columns are another's
        right, number = getattr(owner, name), id(session._line[-1])  # whoever holds it keeps it from being in place

        def broken(*args: Any, right: Any = right) -> Any:
            if when == "after":
                right(*args)
            raise injected("injected")

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            with pytest.raises(injected):
                run(session, at, at + 1)
        assert [id(one) for one in session._line] == [number]
        assert session.position == at
        np.testing.assert_array_equal(steps(session, at, at + 2), want[:, at : at + 2])
        at += 2


@TARGETS
def test_steps_in_place_are_seen_by_nobody_else(target: str) -> None:
    """Not while a snapshot or a fork holds what was there; and again when it is gone."""
    session, want = program(target).session(), expected(target)
    steps(session, 0, 10)
    now = session._line[-1]
    steps(session, 10, 14)
    assert session._line == [now]  # in place
    snapshot = session.snapshot()
    fork = session.fork()
    np.testing.assert_array_equal(steps(session, 14, 18), want[:, 14:18])
    assert session._line[-1] is not now
    np.testing.assert_array_equal(steps(fork, 14, 16), want[:, 14:16])
    other = program(target).session(snapshot)
    np.testing.assert_array_equal(steps(other, 14, 16), want[:, 14:16])
    del snapshot, other, fork
    now = session._line[-1]
    np.testing.assert_array_equal(steps(session, 18, 22), want[:, 18:22])
    assert session._line == [now]
    session.set_state(name := program(target).states[0].name, session.states[name].numpy())
    np.testing.assert_array_equal(steps(session, 22, 26), want[:, 22:26])


def test_what_a_step_refuses() -> None:
    """As the general call does, and before anything runs."""
    session = program("cpu").session()
    run(session, 0, 5)
    for feed, message in (
        ([[1000]], r"input_ids\[0, 0\]: index out of range, got 1000, expected -256 to 255"),
        (np.array([[3]], np.float32), r"input_ids: wrong dtype, got float32, expected int64"),
        ([[1], [2]], r"input_ids: wrong shape, got \[2, 1\], expected \[batch=1, sequence\]"),
        (1, r"input_ids: wrong shape, got \[\], expected \[batch=1, sequence\]"),
        ([["a"]], r"input_ids: not an array"),
    ):
        with pytest.raises(InputError, match=message):
            session.run({"input_ids": feed})
    with pytest.raises(InputError, match="padding would enter the state"):
        session.run({"input_ids": [[1]], "attention_mask": [[0]]})
    assert session.position == 5
    np.testing.assert_array_equal(steps(session, 5, 8), expected("cpu")[:, 5:8])
    run(session, 8, CONTEXT)
    with pytest.raises(StateError, match="context full, got 512"):
        session.run({"input_ids": [[1]]})
    assert session.position == CONTEXT


@TARGETS
def test_generation_takes_prepared_steps_alone(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the prompt nothing is checked, completed and cut anew; tokens are those of general calls."""
    session, want = program(target).session(), list[int]()
    feed = IDS[:, :9]
    for _ in range(12):
        logits = session.run({"input_ids": feed, "position_ids": session.position + np.arange(feed.shape[1])[None]})
        feed = logits["logits"][:, -1].argmax(-1)[:, None]
        want.append(int(feed[0, 0]))
    right, calls = calling.prepare, list[int]()

    def counted(*args: Any) -> Any:
        calls.append(1)
        return right(*args)

    monkeypatch.setattr(calling, "prepare", counted)
    for loop in (
        lambda ids: list(greedy(program(target).session(), ids, 12)),
        lambda ids: [token for (token,) in greedy_rows(program(target).session(), ids, 12)],
        lambda ids: list(generate(program(target).session(), ids, 12, Sampling(temperature=1, top_k=1, seed=3))),
    ):
        calls.clear()
        assert loop(IDS[:, :9]) == want
        assert len(calls) == 1


def test_a_chosen_token_without_a_row_in_the_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits may be more than the embedding's rows."""
    session = program("cpu").session()
    monkeypatch.setattr(Sampler, "choose", lambda *_: 256)
    with pytest.raises(InputError, match=r"input_ids\[0, 0\]: index out of range, got 256, expected -256 to 255"):
        list(generate(session, [1, 2, 3], 4))
    assert session.position == 3
