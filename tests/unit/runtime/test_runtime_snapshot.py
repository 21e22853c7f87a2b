"""Snapshots, forks and rollback: values that nothing changes, and nothing pretended (PEERS.md, table 2)."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from linattn.runtime import InputError, Program, Session, Snapshot, StateError, TargetError
from linattn.runtime.device import Device, DeviceArray, Move, row_regions
from linattn.runtime.manifest import Manifest
from tiny_hybrid import Hybrid, open_form, reference

from tests.allocations import allocations

Load = Callable[..., Program]


def some_ids(tokens: int, seed: int = 0, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 8, (batch, tokens))


def run(session: Session, ids: np.ndarray) -> np.ndarray:
    return session.run({"input_ids": ids})["logits"]


def assert_holds(session: Session, ids: np.ndarray) -> None:
    """The session's position and states are those of these tokens from nothing."""
    assert session.position == ids.shape[1]
    for name, want in reference(ids)[1].items():
        np.testing.assert_allclose(session.states[name].numpy(), want, rtol=1e-6, err_msg=name)


def assert_goes_on(session: Session, ids: np.ndarray, seed: int = 7) -> None:
    """What comes after these tokens is what comes after them in a session that never saw others."""
    assert_holds(session, ids)
    more = some_ids(4, seed, ids.shape[0])
    whole = np.concatenate([ids, more], 1)
    np.testing.assert_allclose(run(session, more), reference(whole)[0][:, -4:], rtol=1e-6)
    assert_holds(session, whole)


@functools.cache
def _loaded(uri: str, form: Hybrid) -> Program:
    return Program.load(form.compile(), uri)


@pytest.fixture
def load(device: Device) -> Load:
    """Programs that all tests share: loading one takes Vulkan a second."""
    target = "vulkan" if device.driver == "vulkan" else "cpu"
    return lambda **form: _loaded(device.uri, Hybrid(target, **form))


@pytest.fixture
def cpu() -> Program:
    return _loaded("local-sync", Hybrid())


@pytest.mark.parametrize("batch", [1, 2])
def test_a_fork_goes_on_by_itself(load: Load, batch: int) -> None:
    session, ids = load(batch=batch).session(), some_ids(9, batch=batch)
    run(session, ids)
    forks = [session.fork() for _ in range(3)]
    assert_goes_on(forks[0], ids, 1)
    assert_goes_on(session, ids, 2)
    assert_goes_on(forks[1], ids, 3)
    again = forks[0].fork()
    first = np.concatenate([ids, some_ids(4, 1, batch)], 1)
    assert_goes_on(again, first, 4)
    assert_goes_on(forks[0], first, 5)
    assert_goes_on(forks[2], ids, 6)


def test_a_snapshot_does_not_change(load: Load) -> None:
    """Neither by its session, which goes on, is reset and freed, nor by those that go on from it."""
    program, ids = load(), some_ids(9)
    session = program.session()
    run(session, ids)
    snapshot = session.snapshot()
    assert (snapshot.position, snapshot.batch) == (9, 1)
    run(session, some_ids(6, 1))
    session.reset()
    run(session, some_ids(20, 2))
    assert_goes_on(program.session(snapshot), ids)
    session.restore(snapshot)
    assert_goes_on(session, ids)
    del session
    gc.collect()
    assert_goes_on(program.session(snapshot), ids)
    assert_goes_on(program.session(snapshot).fork(), ids)
    assert str(snapshot).startswith("Snapshot(position 9, batch 1, ")


def test_snapshots_along_a_sequence(load: Load) -> None:
    """Of one memory for the cache, whoever goes on first from wherever."""
    session, ids = load().session(), some_ids(12)
    snapshots = [session.snapshot()]
    for at in range(0, 12, 3):
        run(session, ids[:, at : at + 3])
        snapshots.append(session.snapshot())
    for order in (range(5), range(4, -1, -1)):
        for at in order:
            assert_goes_on(session.program.session(snapshots[at]), ids[:, : 3 * at])
    for at in (1, 4, 0, 2):
        session.restore(snapshots[at])
        assert_goes_on(session, ids[:, : 3 * at])


def test_what_is_copied(cpu: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot and a fork copy nothing; the second who writes from a position gets a cache of its own, once."""
    session = cpu.session()
    run(session, some_ids(9))
    cache = session.snapshot()._held.lease.caches
    with allocations(monkeypatch) as sizes:
        snapshot = session.snapshot()
        fork, other = session.fork(), cpu.session(snapshot)
        assert sizes == []
        run(session, some_ids(1))  # at the end of the rows in use: goes on in place
        assert cache.arrays[0].nbytes not in sizes
        run(fork, some_ids(1))
        assert sizes.count(cache.arrays[0].nbytes) == 1
        run(fork, some_ids(3))
        run(other, some_ids(1))
        assert sizes.count(cache.arrays[0].nbytes) == 2
    assert session.snapshot()._held.lease.caches is cache
    assert fork.snapshot()._held.lease.caches is not cache


@pytest.mark.parametrize("first", ["session", "fork"])
def test_whoever_is_left_goes_on_in_place(cpu: Program, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """What nobody holds any more is nobody's obstacle, and its rows, NaN among them, are gone."""
    session, ids = cpu.session(), some_ids(9)
    run(session, ids)
    fork = session.fork()
    goes, stays = (session, fork) if first == "session" else (fork, session)
    run(goes, some_ids(5, 3))
    cache = stays.snapshot()._held.lease.caches
    poison_rows(cache.arrays[0], 9, 14, cpu.device)
    del goes, session, fork
    with allocations(monkeypatch) as sizes:
        assert_goes_on(stays, ids)
    assert cache.arrays[0].nbytes not in sizes


def poison_rows(array: DeviceArray, first: int, last: int, device: Device) -> None:
    poison = device.upload(np.full(array.shape, np.nan, np.float32), array.dtype)
    device.move([Move(poison, array, row_regions(array, 2, first, last))])


def test_rollback_of_the_whole_last_call(load: Load) -> None:
    """Table 2 #18: afterwards it is as if the call had never been, whatever it was and whatever it left behind."""
    session, ids = load().session(window=1), some_ids(6)
    run(session, ids)
    for tokens in (1, 3, 11, 18):
        run(session, some_ids(tokens, tokens))
        cache = session.snapshot()._held.lease.caches.arrays[0]
        poison_rows(cache, 6, 6 + tokens, session.program.device)  # as if its tokens had been NaN
        session.rollback(tokens)
        assert_holds(session, ids)
        with pytest.raises(StateError):
            session.rollback(1)
        fork = session.fork()
        assert_goes_on(fork, ids)
    assert_goes_on(session, ids)


def test_rollback_within_the_window(load: Load) -> None:
    """Table 2 #21: of a prompt in blocks its start is kept, and what is asked for inside of it is an error."""
    session, ids = load().session(window=3), some_ids(12)
    for part in np.split(ids, [4, 6, 7, 11], 1):
        run(session, part)
    with pytest.raises(StateError) as caught:
        session.rollback(2)
    assert str(caught.value) == (
        "cannot roll back, got 2 tokens, expected 1, 5, 6 tokens; "
        "program.session(window=N) keeps the states before each of the last N calls"
    )
    for tokens in (-1, 3, 8, 12, 13):
        with pytest.raises(StateError, match="cannot roll back"):
            session.rollback(tokens)
    session.rollback(0)
    assert_holds(session, ids)
    session.rollback(1)
    session.rollback(4)
    assert_goes_on(session, ids[:, :7])  # which is a call again
    session.rollback(4)
    session.rollback(1)
    assert_goes_on(session, ids[:, :6])
    session.reset()
    with pytest.raises(StateError, match="expected nothing to be taken back"):
        session.rollback(1)


def test_nothing_is_kept_without_a_window(cpu: Program) -> None:
    session = cpu.session()
    run(session, some_ids(2))
    with pytest.raises(
        StateError, match=r"got 2 tokens, expected nothing to be taken back; program.session\(window=N\)"
    ):
        session.rollback(2)
    with pytest.raises(InputError, match="wrong window, got -1"):
        cpu.session(window=-1)


def test_rollback_anywhere_with_caches_only(cpu: Program) -> None:
    """Rows of caches stay where they are: there is nothing to be kept. (The other two states are none here.)"""
    manifest: Manifest = cpu.manifest
    session, ids = cpu.session(), some_ids(9)
    run(session, ids)
    session._manifest = replace(manifest, states=tuple(spec for spec in manifest.states if spec.in_place))
    session.rollback(5)
    assert session.position == 4
    np.testing.assert_array_equal(session.states["past.1.kv"].numpy(), reference(ids[:, :4])[1]["past.1.kv"])
    with pytest.raises(StateError, match="cannot roll back"):
        session.rollback(5)


def test_an_open_context_forks_and_rolls_back() -> None:
    program, ids = Program.load(open_form(Hybrid()).compile()), some_ids(5, batch=2)
    session = program.session(window=2)
    empty = session.snapshot()
    run(session, ids)
    assert_goes_on(session.fork(), ids)
    assert_goes_on(session, ids)
    session.rollback(4)
    assert_goes_on(session, ids)
    session.rollback(9)
    assert session.position == 0
    assert empty.batch is None
    session.restore(empty)
    assert (session.batch, session.position) == (None, 0)
    run(session, some_ids(3, batch=3))
    assert program.session(session.snapshot()).batch == 3
    with pytest.raises(StateError, match="a snapshot of another batch, got 3, expected 2"):
        program.session(session.snapshot(), batch=2)


def test_masks_go_with_the_states(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linattn.runtime.binding.refuse_padding", lambda *_: None)  # as if the model had caches only
    session, ids = load().session(window=2), some_ids(9)
    mask = np.array([[0, 0, 1, 1, 1, 1, 0, 1, 1]])
    session.run({"input_ids": ids[:, :6], "attention_mask": mask[:, :6]})
    fork = session.fork()
    session.run({"input_ids": some_ids(1, 3), "attention_mask": [[0]]})
    session.run({"input_ids": some_ids(1, 3)})
    session.rollback(2)
    for one in (fork, session):
        got = one.run({"input_ids": ids[:, 6:], "attention_mask": mask[:, 6:]})["logits"]
        positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
        assert got.shape == (1, 3, 4)
        np.testing.assert_allclose(got, masked_reference(ids, mask, positions)[:, 6:], rtol=1e-6)


def masked_reference(ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The logits where the rows of the cache stand at other positions than their columns."""
    columns, head = np.arange(4), np.arange(2)
    logits = reference(ids, mask)[0]
    for t in range(ids.shape[1]):
        seen = slice(0, t + 1)
        kept, wrong = (
            ids[:, seen, None] * ((at[..., None] + columns) % 4 + 1)
            for at in (positions[:, seen], np.arange(t + 1)[None])
        )
        logits[:, t] += 0.25 * len(head) * ((kept - wrong) * mask[:, seen, None]).sum(1)
    return logits


def test_another_program_is_refused(load: Load) -> None:
    program, other = load(), load(batch=2)
    session = program.session()
    run(session, some_ids(3))
    snapshot = session.snapshot()
    for use in (lambda: other.session(snapshot), lambda: other.session().restore(snapshot)):
        with pytest.raises(StateError, match="a snapshot of another program, got tiny-hybrid on") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_a_closed_program_is_refused() -> None:
    program = Program.load(Hybrid().compile(), "local-sync")
    session = program.session(window=1)
    run(session, some_ids(3))
    snapshot = session.snapshot()
    program.close()
    for use in (
        lambda: program.session(snapshot),
        lambda: session.restore(snapshot),
        session.snapshot,
        session.fork,
        lambda: session.rollback(3),
    ):
        with pytest.raises(StateError, match="the program is closed") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert (snapshot.position, snapshot.nbytes, session.position) == (3, 0, 3)


@pytest.mark.parametrize("of", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused(cpu: Program, of: Callable[[Snapshot], object]) -> None:
    with pytest.raises(StateError, match=r"a Snapshot cannot be copied or pickled; threads may share it"):
        of(cpu.session().snapshot())


@pytest.mark.parametrize("name", ["_empty", "move", "read_rows", "call", "_wait_for"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failure_at_every_boundary(load: Load, monkeypatch: pytest.MonkeyPatch, name: str, when: str) -> None:
    """Table 2 #37: whatever call of the device fails, session, snapshot and window are as before."""
    error = TargetError("injected") if when == "before" else KeyboardInterrupt()
    program, ids = load(), some_ids(9)
    engine = program._engine
    owner: Any = {"call": engine, "_wait_for": engine.module}.get(name, program.device)
    right, left = getattr(owner, name), [0]

    def broken(*args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and when == "before":
            raise error
        result = right(*args)
        if left[0] == 0:
            raise error
        return result

    session = program.session(window=1, guard="nan")
    run(session, ids[:, :6])
    run(session, ids[:, 6:])
    snapshot = session.snapshot()
    other = session.fork()
    run(other, some_ids(2, 5))  # so that the session must copy
    monkeypatch.setattr(owner, name, broken)
    boundaries = 0
    while True:
        boundaries += 1
        left[0] = boundaries
        try:
            run(session, some_ids(5, 8))  # two blocks and more
        except (TargetError, KeyboardInterrupt):
            left[0] = 0
            assert_holds(session, ids)
            assert_goes_on(session.fork(), ids)
            assert_goes_on(program.session(snapshot), ids)
        else:
            break
    assert boundaries > 1
    left[0] = 0
    assert_holds(session, np.concatenate([ids, some_ids(5, 8)], 1))
    session.rollback(5)
    assert_goes_on(session, ids)


def test_eight_threads_fork_from_one_snapshot(load: Load) -> None:
    """Table 2 #38: each goes on as if it were alone."""
    program, ids, wrong = load(), some_ids(8), list[object]()
    session = program.session()
    run(session, ids)
    snapshot, barrier = session.snapshot(), threading.Barrier(8)

    def work(seed: int) -> None:
        try:
            barrier.wait(30)
            for round_ in range(2):
                mine = program.session(snapshot, window=1)
                assert_goes_on(mine, ids, 100 * seed + round_)
                mine.rollback(4)
                assert_goes_on(mine, ids, 100 * seed + round_ + 50)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    assert_goes_on(session, ids)


def test_an_error_that_somebody_keeps_costs_no_copy(cpu: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its traceback holds what the failed call had taken."""
    session = cpu.session()
    run(session, some_ids(3))
    with monkeypatch.context() as patch:
        patch.setattr(cpu._engine, "call", lambda *_: (_ for _ in ()).throw(TargetError("injected")))
        with pytest.raises(TargetError) as kept:
            run(session, some_ids(3))
    with allocations(monkeypatch) as sizes:
        run(session, some_ids(3))
    assert session.snapshot()._held.lease.caches.arrays[0].nbytes not in sizes
    assert kept.value.args == ("injected",)
