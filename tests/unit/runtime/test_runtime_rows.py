"""Rows of a batch: dropped, repeated, reordered, started anew, and of different lengths; each as if it were alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from linattn.runtime import InputError, Program, Session, StateError, TargetError
from needed import need_device
from tiny_hybrid import Hybrid, open_form, reference

URIS = ["local-task", pytest.param("vulkan", marks=pytest.mark.vulkan)]
OPEN = Hybrid(batch=None)


@functools.cache
def program(uri: str = "local-task", form: Hybrid = OPEN) -> Program:
    need_device(uri)
    return Program.load(replace(form, target="vulkan" if uri == "vulkan" else "cpu").compile(), uri)


def some_ids(rows: int, tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 8, (rows, tokens))


def step(session: Session, seen: list[np.ndarray], tokens: int = 1, seed: int = 5) -> None:
    """Appends tokens to every row; each gets the logits that it gets alone."""
    new = some_ids(len(seen), tokens, seed)
    got = session.run({"input_ids": new})["logits"]
    for row in range(len(seen)):
        seen[row] = np.concatenate([seen[row], new[row]])
        want = reference(seen[row][None])[0][0, -tokens:]
        np.testing.assert_allclose(got[row], want, rtol=1e-6, err_msg=f"row {row}")


@pytest.mark.parametrize("uri", URIS)
@pytest.mark.parametrize("indices", [[0, 2, 2, 1], [2], [1, 0, 2], [0, 1, 2], np.array([2, 2])], ids=str)
def test_rows(uri: str, indices: Sequence[int]) -> None:
    session, ids = program(uri).session(), some_ids(3, 9)
    session.run({"input_ids": ids})
    fork = session.fork()
    session.rows(indices)
    assert (session.batch, session.position) == (len(indices), 9)
    seen = [ids[row] for row in indices]
    for tokens in (1, 4):
        step(session, seen, tokens)
    others = list(ids)
    step(fork, others, 2)  # which knows nothing of it


@pytest.mark.parametrize("form", [Hybrid(batch=3), open_form(Hybrid())], ids=["fixed", "open context"])
def test_a_beam_search(form: Hybrid) -> None:
    session, rng, seen = program(form=form).session(batch=3), np.random.default_rng(1), [np.zeros(0, int)] * 3
    for seed in range(8):
        step(session, seen, int(rng.integers(1, 4)), seed)
        chosen = rng.integers(0, 3, 3)
        session.rows(chosen)
        seen = [seen[row] for row in chosen]
    step(session, seen)


def test_which_rows_there_are() -> None:
    session = program().session()
    with pytest.raises(StateError, match="the batch is open until the first call"):
        session.rows([0])
    session.run({"input_ids": some_ids(2, 3)})
    for indices, words in (([], "got 0, expected at least one row"), ([0, 2], "no such row, got 2, expected 0 to 1")):
        with pytest.raises(InputError, match=words):
            session.rows(indices)
    with pytest.raises(InputError, match="no such row, got -1"):
        session.reset_rows([-1])
    with pytest.raises(InputError, match="wrong number of rows, got 2, expected 3"):
        program(form=Hybrid(batch=3)).session().rows([0, 1])
    assert session.batch == 2
    session.reset()
    assert session.batch is None


@pytest.mark.parametrize("uri", URIS)
def test_a_row_starts_anew(uri: str) -> None:
    session, seen = program(uri).session(), list(some_ids(3, 6))
    session.run({"input_ids": np.stack(seen)})
    session.reset_rows([1])
    seen[1] = seen[1][:0]
    step(session, seen, 3)
    session.reset_rows([0, 1])
    seen[0], seen[1] = seen[0][:0], seen[1][:0]
    step(session, seen)
    step(session, seen, 4)


@pytest.mark.parametrize("uri", URIS)
def test_prompts_of_different_lengths(uri: str) -> None:
    """Table 2 #23: a row is independent of its neighbours, and of the columns before it."""
    prompts = [some_ids(1, length, length)[0] for length in (5, 9, 1, 9)]
    session, logits = program(uri).batch(prompts)
    check_batch(session, logits, prompts)


def test_prompts_of_different_lengths_in_a_fixed_batch() -> None:
    prompts = [some_ids(1, length, length)[0].tolist() for length in (7, 2, 4)]
    session, logits = program(form=Hybrid(batch=3)).batch(prompts)
    check_batch(session, logits, [np.array(prompt) for prompt in prompts])
    with pytest.raises(InputError, match="wrong batch, got 2, expected 3"):
        program(form=Hybrid(batch=3)).batch(prompts[:2])


def check_batch(session: Session, logits: np.ndarray, prompts: list[np.ndarray]) -> None:
    longest = max(map(len, prompts))
    assert (session.batch, session.position) == (len(prompts), longest)
    for row, prompt in enumerate(prompts):
        np.testing.assert_allclose(logits[row, 0], reference(prompt[None])[0][0, -1], rtol=1e-6)
    fork, seen, others = session.fork(), list(prompts), list(prompts)
    step(session, seen)
    step(session, seen, 5)
    step(fork, others, 4, 9)
    if session.program.manifest.batch is None:
        fork.rows([2, 0, 0])
        others = [others[row] for row in (2, 0, 0)]
    fork.reset_rows([1])
    others[1] = others[1][:0]
    step(fork, others, 2, 10)


def test_a_batch_is_saved_with_its_lengths(tmp_path: Path) -> None:
    prompts = [some_ids(1, length, length)[0] for length in (3, 8)]
    session, _ = program().batch(prompts)
    session.save(tmp_path / "state")
    loaded, seen = Session.load(program(), tmp_path / "state", window=1), list(prompts)
    step(loaded, seen, 3)
    loaded.rollback(3)
    step(loaded, list(prompts), 2)


@pytest.mark.parametrize("uri", URIS)
def test_nothing_of_a_dropped_row_is_left(uri: str) -> None:
    session, ids = program(uri).session(), some_ids(2, 6)
    session.run({"input_ids": ids})
    for name, view in session.states.items():
        array = view.numpy()
        array[0] = np.nan
        session.set_state(name, array)
    session.rows([1, 1])
    step(session, [ids[1], ids[1]], 3)
    session.rows([0])
    step(session, [np.concatenate([ids[1], some_ids(2, 3, 5)[0]])], 1, 6)


def test_a_failure_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    session, ids = program().session(), some_ids(2, 6)
    session.run({"input_ids": ids})

    def broken(*_: Any) -> Any:
        raise TargetError("injected")

    for name in ("move", "_empty"):
        with monkeypatch.context() as patch:
            patch.setattr(program().device, name, broken)
            for use in (lambda: session.rows([1]), lambda: session.reset_rows([0])):
                with pytest.raises(TargetError, match="injected"):
                    use()
        assert session.batch == 2
    step(session, list(ids))


def test_models_that_go_by_the_number_of_tokens() -> None:
    """GroupQueryAttention has no mask: one length, or a session for each."""
    loaded = program()
    plain = Program(loaded._engine.module, replace(loaded.manifest, row_masks=False))
    words = "tiny-hybrid: rows of different lengths, expected one length; give each its own session"
    with pytest.raises(StateError, match=words):
        plain.batch([[1, 2], [3]])
    prompts = [some_ids(1, 4, seed)[0] for seed in (1, 2)]
    session, logits = plain.batch(prompts)
    check = list(prompts)
    np.testing.assert_allclose(logits[1, 0], reference(prompts[1][None])[0][0, -1], rtol=1e-6)
    step(session, check)
    with pytest.raises(StateError, match=words):
        session.reset_rows([0])
    step(session, check, 2)


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []], [[[1], [2]]], ["a"], [[1.5]]], ids=str)
def test_what_is_no_prompt(prompts: Any) -> None:
    with pytest.raises(InputError) as caught:
        program().batch(prompts)
    assert "\n" not in str(caught.value)


def test_padding_is_refused_all_the_same() -> None:
    """A session of rows of different lengths takes no masked tokens, and no other mask of those before."""
    session, _ = program().batch([[1, 2, 3], [4]])
    for mask, words in (
        ([[1], [0]], "padding would enter the state"),
        ([[1, 1, 1, 1], [1, 1, 1, 1]], "another mask of tokens that the states have seen; pass the mask of the new"),
        ([[1, 1, 0, 1], [0, 0, 1, 1]], "another mask of tokens that the states have seen"),
    ):
        with pytest.raises(InputError, match=words):
            session.run({"input_ids": [[1], [2]], "attention_mask": mask})
    got = session.run({"input_ids": [[5], [6]], "attention_mask": [[1, 1, 1, 1], [0, 0, 1, 1]]})["logits"]
    np.testing.assert_allclose(got[1, 0], reference(np.array([[4, 6]]))[0][0, -1], rtol=1e-6)
