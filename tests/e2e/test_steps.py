"""Steps of one token: prepared ones give what the general call gives, and keep all that it promises."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import pytest
from linattn.frontend import CompileOptions
from linattn.frontend.compile import compile_model
from linattn.runtime import (
    InputError,
    Program,
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
from linattn.runtime.generation.loop import chosen_where
from linattn.runtime.generation.sampling import Sampler
from linattn.runtime.held import Caches
from linattn.runtime.step import Step

from samples.tiny_hybrid import build
from tests.tolerances import BENIGN, error

CONTEXT = 512
IDS = np.random.default_rng(0).integers(0, 256, (1, CONTEXT))
TARGETS = pytest.mark.parametrize("target", ["cpu", pytest.param("vulkan", marks=pytest.mark.vulkan)])


@cache
def program(target: str) -> Program:
    options = CompileOptions(target=target, max_context=CONTEXT, prefill_blocks=(8,), sampler="draw")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("linattn.frontend.compile.LEAST_TOKENS", 8)  # the block has a function for its last logits
        patch.setattr("linattn.frontend.graph.last_position.LEAST_BYTES", 0)
        return Program.load(compile_model(build(), options).module)


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


@TARGETS
def test_steps_are_prepared_and_equal_general_calls(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions at other positions in between, rollbacks and resets: the mask's columns are those of each."""
    prepared = list[int]()
    for right in (Step.call, Step.append):

        def counted(self: Step, ids: Any, now: Any, into: Any, right: Any = right) -> Any:
            prepared.append(now.position)
            return right(self, ids, now, into)

        monkeypatch.setattr(Step, right.__name__, counted)
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
    """Table 2 #37: where nobody else holds its states, a session's step replaces them in place, all or none."""
    injected = TargetError if when == "before" else KeyboardInterrupt
    loaded, want = program(target), expected(target)
    step, session, at = engine_of(loaded).step(1), loaded.session(), 12
    steps(session, 0, at)
    module, far = engine_of(loaded).module, loaded.session()
    run(far, 0, 32)
    boundaries: list[tuple[Any, str]] = [(module, "_invoke"), (module, "_wait_for"), (module, "call_step")]
    boundaries += [(step, "append"), (step, "read"), (step, "_write_columns"), (Caches, "grow")]
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


@cache
def greedy_tokens(target: str) -> list[int]:
    """What general calls and numpy choose, 60 tokens after a prompt of 9."""
    session, feed, found = program(target).session(), IDS[:, :9], list[int]()
    for _ in range(60):
        positions = session.position + np.arange(feed.shape[1])[None]
        feed = session.run({"input_ids": feed, "position_ids": positions})["logits"][:, -1].argmax(-1)[:, None]
        found.append(int(feed[0, 0]))
    return found


@TARGETS
def test_tokens_that_the_module_chooses(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to those of general calls; no logits of a step are read; on a device with a queue a step is ahead."""
    session, want = program(target).session(), greedy_tokens(target)
    submit, ahead = Session._submit, list[bool]()

    def counted(self: Session, base: Any, ids: Any, draw: Any) -> Any:
        ahead.append(isinstance(ids, Step))
        return submit(self, base, ids, draw)

    monkeypatch.setattr(Session, "_submit", counted)
    monkeypatch.setattr(calling, "prepare", right := Counted(calling.prepare))
    assert list(greedy(session, IDS[:, :9], 60)) == want
    assert right.calls == 1
    assert ahead == ([False] + [True] * 58 if program(target).device.has_queue else [])
    assert session.position == 9 + 59
    assert error(session.run({"input_ids": [[want[-1]]]})["logits"], logits_after(target, want)) < BENIGN["float32"]


class Counted:
    def __init__(self, function: Any) -> None:
        self._function, self.calls = function, 0

    def __get__(self, instance: Any, owner: Any) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self._function(*args)


def logits_after(target: str, tokens: list[int]) -> np.ndarray:
    session = program(target).session()
    session.run({"input_ids": IDS[:, :9]})
    return np.concatenate([session.run({"input_ids": [[token]]})["logits"] for token in tokens], 1)[:, -1:]


@TARGETS
def test_a_stop_ends_the_queue_where_it_stands(target: str) -> None:
    """The states are those at the stop, with a step submitted behind it; the next answer goes on from there."""
    want = greedy_tokens(target)
    stop = next(i for i in range(5, 60) if want[i] not in want[:i])
    session = program(target).session(window=2)
    assert list(generate(session, IDS[:, :9], 60, stop=[want[stop]])) == want[: stop + 1]
    assert session.position == 9 + stop
    assert session._ahead is None
    assert list(greedy(session, [want[stop]], 60 - stop - 1)) == want[stop + 1 :]


HOW = Sampling(0.9, top_k=40, top_p=0.95, min_p=0.02, seed=11)


@cache
def drawn(target: str, how: Sampling) -> list[int]:
    """What general calls and the host's sampler draw."""
    session, feed, found = program(target).session(), IDS[:, :9], list[int]()
    sampler = Sampler(how)
    for _ in range(60):
        positions = session.position + np.arange(feed.shape[1])[None]
        logits = session.run({"input_ids": feed, "position_ids": positions})["logits"]
        found.append(sampler.choose(logits[0, -1]))
        feed = np.array([[found[-1]]])
    return found


@TARGETS
@pytest.mark.parametrize(
    "how", [HOW, Sampling(1.0, seed=5), Sampling(1.5, top_p=0.7, seed=2**64 - 1)], ids=["all", "temperature", "top_p"]
)
def test_tokens_that_the_module_draws(target: str, how: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's for the same seed, on each target, every time; nothing of the logits is read."""
    assert chosen_where(program(target), how) == "in the module"
    want = drawn(target, how)
    assert want == drawn("cpu", how)
    assert len(set(want)) > 20
    monkeypatch.setattr(Sampler, "choose", right := Counted(Sampler.choose))
    session = program(target).session()
    assert list(generate(session, IDS[:, :9], 60, how)) == want
    assert right.calls == 1  # the prompt's
    assert session.position == 9 + 59
    session.reset()
    snapshot = session.snapshot()
    assert list(generate(session, IDS[:, :9], 20, how)) == want[:20]
    session.restore(snapshot)
    assert list(generate(session, IDS[:, :9], 20, how)) == want[:20]
    session.reset()
    assert list(generate(session, IDS[:, :9], 20, dataclasses.replace(how, seed=12))) != want[:20]


@TARGETS
def test_one_of_one_is_greedy(target: str) -> None:
    for how in (Sampling(1.0, top_k=1), Sampling(2.0, top_p=0.0), Sampling(1.0, min_p=1.0), Sampling(1e-9)):
        assert list(generate(program(target).session(), IDS[:, :9], 20, how)) == greedy_tokens(target)[:20]


@TARGETS
def test_a_penalty_is_the_hosts(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It depends on the tokens before: the module is not asked, and the host's tokens come out."""
    how = dataclasses.replace(HOW, repeat_penalty=1.3)
    sampler, session, feed, want = Sampler(how, IDS[0, :9].tolist()), program(target).session(), IDS[:, :9], []
    for _ in range(12):
        want.append(sampler.choose(session.run({"input_ids": feed})["logits"][0, -1]))
        feed = np.array([[want[-1]]])
    assert chosen_where(program(target), how) == "on the host, which knows what a repeat penalty asks for"
    monkeypatch.setattr(Session, "_follow", None)
    assert list(generate(program(target).session(), IDS[:, :9], 12, how)) == want


@TARGETS
def test_a_stop_ends_a_draw_where_it_stands(target: str) -> None:
    """The states are those at the stop, with a step submitted behind it."""
    want = drawn(target, HOW)
    stop = next(i for i in range(5, 60) if want[i] not in want[:i])
    session = program(target).session()
    assert list(generate(session, IDS[:, :9], 60, HOW, stop=[want[stop]])) == want[: stop + 1]
    assert session.position == 9 + stop
    assert session._ahead is None
    logits = session.run({"input_ids": [[want[stop]]]})["logits"]
    assert error(logits, logits_after(target, want[: stop + 1])) < BENIGN["float32"]


@TARGETS
def test_whatever_comes_between_two_draws(target: str) -> None:
    """A rollback and the same tokens by hand: the random numbers go on where they were."""
    want, session, found = drawn(target, HOW), program(target).session(window=4), list[int]()
    for at, token in enumerate(generate(session, IDS[:, :9], 60, HOW)):
        found.append(token)
        if at == 8:
            session.rollback(2)
            run_tokens(session, want[6:8])
        if at == 12:
            assert list(generate(program(target).session(), IDS[:, :9], 9, Sampling(1.0, seed=5))) != want[:9]
            assert list(greedy(program(target).session(), IDS[:, :9], 9)) == greedy_tokens(target)[:9]
    assert found == want


@TARGETS
def test_draws_of_nan(target: str) -> None:
    session = program(target).session()
    tokens = generate(session, IDS[:, :9], 20, HOW)
    next(tokens), next(tokens)
    name = next(spec.name for spec in program(target).states if spec.kind == "recurrent")
    session.set_state(name, np.full(session.states[name].shape, np.nan, np.float32))
    with pytest.raises(StateError, match="the logits are NaN"):
        next(tokens)
    assert session._ahead is None


def test_a_module_that_chooses_but_does_not_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """--sampler greedy: the likeliest comes from the module, a draw from the host."""
    options = CompileOptions(max_context=CONTEXT, prefill_blocks=(), sampler="greedy")
    loaded = Program.load(compile_model(build(), options).module)
    entry = loaded.manifest.entry_points[0]
    assert (entry.token, entry.draw) == ("decode_token", None)
    assert [chosen_where(loaded, how) for how in (Sampling(), HOW)] == ["in the module", "on the host"]
    with monkeypatch.context() as patch:  # a module that does not take its results' memory
        patch.setattr(engine_of(loaded).module, "result_specs", lambda _: None)
        patch.setattr(engine_of(loaded), "_choosers", {})
        assert chosen_where(loaded, Sampling()) == "on the host"
    want = drawn("cpu", HOW)
    monkeypatch.setattr(Sampler, "choose", right := Counted(Sampler.choose))
    assert list(greedy(loaded.session(), IDS[:, :9], 60)) == greedy_tokens("cpu")
    assert right.calls == 1
    assert list(generate(loaded.session(), IDS[:, :9], 20, HOW)) == want[:20]
    assert right.calls == 1 + 20


@TARGETS
def test_whatever_comes_between_two_tokens(target: str) -> None:
    """Each call of the session sees what was yielded and fed, and nothing of the step that is ahead."""
    want, loaded = greedy_tokens(target), program(target)
    session = loaded.session(window=4)
    tokens = greedy(session, IDS[:, :9], 60)
    found: list[int] = []
    for at, token in enumerate(tokens):
        found.append(token)
        assert session.position == 9 + at
        if at == 3:
            fork = session.fork()
            assert error(run_tokens(fork, want[3:5]), logits_after(target, want[:5])) < BENIGN["float32"]
        if at == 6:
            session.states.numpy()
        if at == 8:  # two tokens back, and the same again by hand
            session.rollback(2)
            run_tokens(session, want[6:8])
        if at == 12:
            other = list(greedy(loaded.session(), IDS[:, :9], 20))
            assert other == want[:20]
    assert found == want
    tokens = greedy(session, [want[-1]], 40)
    next(tokens), next(tokens)
    tokens.close()
    assert session._ahead is None


def run_tokens(session: Session, tokens: list[int]) -> np.ndarray:
    return np.concatenate([session.run({"input_ids": [[token]]})["logits"] for token in tokens], 1)[:, -1:]


@TARGETS
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failure_at_every_boundary_of_the_queue(target: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table 2 #37: what was yielded is committed, nothing else, whichever step it is that fails."""
    injected = TargetError("injected") if when == "before" else KeyboardInterrupt()
    want, loaded = greedy_tokens(target), program(target)
    module = engine_of(loaded).module
    names: list[tuple[Any, str]] = [(module, "_invoke")]
    if loaded.device.has_queue:
        names += [(module, "_submit"), (module, "_wait"), (Step, "submit"), (Step, "_write"), (Step, "chosen")]
    else:
        names += [(module, "call_step"), (Step, "append"), (Caches, "grow")]
    for owner, name in names:
        for failing in (1, 2, 4):
            session, found, left = loaded.session(), list[int](), [0]
            right = getattr(owner, name)

            def broken(*args: Any, right: Any = right, left: list[int] = left) -> Any:
                left[0] -= 1
                result = right(*args) if left[0] or when == "after" else None
                if left[0] == 0:
                    raise injected
                return result

            tokens = greedy(session, IDS[:, :9], 20)
            found.append(next(tokens))
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, broken)
                left[0] = failing
                try:
                    found += tokens
                except (TargetError, KeyboardInterrupt):
                    assert len(found) < 20
                else:
                    assert name == "_invoke"  # the queue does not go there
            assert session.position == 9 + len(found) - 1
            assert found == want[: len(found)]
            assert session._ahead is None
            assert list(greedy(session, [found[-1]], 6)) == want[len(found) : len(found) + 6]


@TARGETS
def test_logits_that_are_nan(target: str) -> None:
    session = program(target).session()
    tokens = greedy(session, IDS[:, :9], 20)
    next(tokens), next(tokens)
    name = next(spec.name for spec in program(target).states if spec.kind == "recurrent")
    session.set_state(name, np.full(session.states[name].shape, np.nan, np.float32))
    with pytest.raises(StateError, match="the logits are NaN"):
        next(tokens)
    assert session._ahead is None


@TARGETS
def test_threads_with_queues(target: str) -> None:
    """Table 2 #38: each has its own steps under way in one program."""
    want, loaded, wrong = greedy_tokens(target), program(target), list[object]()

    def work() -> None:
        try:
            for _ in range(2):
                assert list(greedy(loaded.session(), IDS[:, :9], 40)) == want[:40]
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong


@TARGETS
def test_a_draft(target: str) -> None:
    """Right at times: accepted tokens are kept and the others taken back, on every device (see test_speculative.py)."""
    want, rng, session = greedy_tokens(target), np.random.default_rng(1), program(target).session()

    def draft(tokens: Sequence[int], count: int) -> list[int]:
        return [token if rng.random() < 0.8 else 3 for token in want[len(tokens) - 9 : len(tokens) - 9 + count]]

    assert list(generate(session, IDS[:, :9], 60, draft=draft)) == want
    assert session.position == 9 + 59
    assert error(run_tokens(session, want[-1:]), logits_after(target, want)) < BENIGN["float32"]
