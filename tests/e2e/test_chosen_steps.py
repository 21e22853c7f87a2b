"""Steps whose tokens the module chooses or draws: those of general calls, also where the next one is under way."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from linattn.frontend import CompileOptions
from linattn.frontend.compile import compile_model
from linattn.runtime import (
    Program,
    Sampling,
    Session,
    StateError,
    TargetError,
    calling,
    generate,
    greedy,
)
from linattn.runtime.engine import engine_of
from linattn.runtime.generation.loop import chosen_where
from linattn.runtime.generation.sampling import Sampler
from linattn.runtime.held import Caches
from linattn.runtime.step import Step

from samples.tiny_hybrid import build
from tests.stepped import CONTEXT, IDS, TARGETS, Counted, program
from tests.tolerances import BENIGN, error


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
        queue = module._submissions
        names += [(queue, "submit"), (queue, "wait"), (Step, "submit"), (Step, "_write"), (Step, "chosen")]
    else:  # one by one; tests/e2e/test_step_series.py has those of several
        names += [(module, "call_step"), (Step, "append"), (Caches, "grow")]
        monkeypatch.setattr("linattn.runtime.follower.MOST_STEPS", 1)
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
