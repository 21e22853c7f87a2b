"""States by name: what they are, copies of them, writing and resetting one."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from linattn.runtime import InputError, Program, Session, StateError
from linattn.runtime.dlpack import from_outside
from linattn.runtime.manifest import StateSpec
from needed import need_device
from tiny_hybrid import Hybrid, open_form, reference

IDS = np.random.default_rng(0).integers(1, 8, (1, 12))
VULKAN = pytest.param("vulkan", marks=pytest.mark.vulkan)


@functools.cache
def program(uri: str = "local-sync", form: Hybrid = Hybrid()) -> Program:  # noqa: B008
    need_device(uri)
    return Program.load(form.compile(), uri)


def started(uri: str = "local-sync", window: int = 0) -> Session:
    session = program(uri, Hybrid("vulkan" if uri == "vulkan" else "cpu")).session(window=window)
    session.run({"input_ids": IDS[:, :4]})
    session.run({"input_ids": IDS[:, 4:7]})
    return session


def test_views() -> None:
    session = started()
    states = session.states
    assert list(states) == ["past.0.rec", "past.0.conv", "past.1.kv"]
    assert "present.1.kv" in states
    assert "past" not in states
    cache = states["present.1.kv"]
    assert (cache.name, cache.output, cache.kind, cache.dtype) == ("past.1.kv", "present.1.kv", "kv_cache", "float32")
    assert (cache.shape, cache.nbytes, cache.device) == ((1, 2, 7, 4), 224, "local-sync")
    session.run({"input_ids": IDS[:, 7:8]})
    assert cache.shape == (1, 2, 8, 4)  # as it is now
    assert str(cache) == "StateView('past.1.kv', kv_cache, float32, [1, 2, 8, 4], on local-sync)"
    with pytest.raises(StateError, match=r"no such state, got nope, expected past\.0\.rec, past\.0\.conv, past\.1\.kv"):
        states["nope"]
    waiting = program(form=open_form(Hybrid())).session().states["past.0.rec"]
    assert "batch still open" in str(waiting)
    with pytest.raises(StateError, match="the batch is open until the first call"):
        _ = waiting.shape


@pytest.mark.parametrize("uri", ["local-task", VULKAN])
def test_numpy_and_dlpack_out(uri: str) -> None:
    """Copies of one's own: what is written to them changes no state."""
    session, want = started(uri), reference(IDS[:, :7])[1]
    for name, view in session.states.items():
        for got in (view.numpy(), np.asarray(view), np.from_dlpack(view)):
            np.testing.assert_allclose(got, want[name], rtol=1e-6)
        view.numpy()[...] = np.nan
        np.testing.assert_allclose(np.array(view, np.float64), want[name], rtol=1e-6)
    with pytest.raises(ValueError, match="only a copy of it"):
        np.array(session.states["past.0.rec"], copy=False)


@pytest.mark.parametrize("uri", ["local-task", VULKAN])
@pytest.mark.parametrize("shared", [False, True])
def test_setting_all_of_another_sequence(uri: str, shared: bool) -> None:
    """A session with the states of another one goes on like that one, and nobody else does."""
    session, other = started(uri, window=1), started(uri)
    fork = session.fork() if shared else None
    other_ids = np.random.default_rng(1).integers(1, 8, (1, 7))
    other.reset()
    other.run({"input_ids": other_ids})
    for name, view in other.states.items():
        session.set_state(name, view)  # which speaks DLPack
    whole = np.concatenate([other_ids, IDS[:, 7:]], 1)
    got = session.run({"input_ids": IDS[:, 7:]})["logits"]
    np.testing.assert_allclose(got, reference(whole)[0][:, 7:], rtol=1e-6)
    session.rollback(5)
    for name, want in reference(other_ids)[1].items():
        np.testing.assert_allclose(session.states[name], want, rtol=1e-6)
    if fork is not None:
        got = fork.run({"input_ids": IDS[:, 7:]})["logits"]
        np.testing.assert_allclose(got, reference(IDS)[0][:, 7:], rtol=1e-6)


def test_what_rollback_goes_back_to_stays() -> None:
    session = started(window=1)
    for name in session.states:
        session.reset_state(name)
        assert not session.states[name].numpy().any()
    session.rollback(3)
    got = session.run({"input_ids": IDS[:, 4:]})["logits"]
    np.testing.assert_allclose(got, reference(IDS)[0][:, 4:], rtol=1e-6)


def test_resetting_one() -> None:
    session, want = started(), reference(IDS[:, :7])[1]
    session.reset_state("present.0.rec")
    assert not session.states["past.0.rec"].numpy().any()
    for name in ("past.0.conv", "past.1.kv"):
        np.testing.assert_allclose(session.states[name], want[name], rtol=1e-6)
    assert session.position == 7


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("nope", 0, "no such state, got nope"),
        ("past.0.rec", np.zeros((1, 4)), "past.0.rec: wrong dtype, got float64, expected float32"),
        ("past.0.rec", [1.0, 2, 3, 4], "past.0.rec: wrong shape, got [4], expected [1, 4]"),
        (
            "past.1.kv",
            np.zeros((1, 2, 24, 4), np.float32),
            "past.1.kv: wrong shape, got [1, 2, 24, 4], expected [1, 2, 7",
        ),
        ("past.0.rec", None, "past.0.rec"),
    ],
)
def test_what_cannot_be_set(name: str, value: Any, words: str) -> None:
    session, want = started(), reference(IDS[:, :7])[1]
    with pytest.raises((InputError, StateError)) as caught:
        session.set_state(name, value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    for other, view in session.states.items():
        np.testing.assert_allclose(view, want[other], rtol=1e-6)


def test_dlpack_that_numpy_cannot_have() -> None:
    class Elsewhere:
        def __dlpack__(self, **options: object) -> object:
            raise BufferError("a GPU's memory")

        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

    with pytest.raises(StateError, match=r"not an array that numpy can have, got .*; copy it to the CPU first"):
        from_outside(Elsewhere())
    session = started()
    spec = StateSpec("past.0.rec", "present.0.rec", "recurrent", "bfloat16", ("batch_size", 4))
    view = session.states["past.0.rec"]
    view._spec, view.dtype = spec, "bfloat16"
    view._read = lambda _: np.zeros((1, 4), "bfloat16")
    with pytest.raises(StateError, match=r"past.0.rec: DLPack cannot have it, got bfloat16; use numpy\(\)"):
        np.from_dlpack(view)
