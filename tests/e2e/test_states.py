"""States of compiled modules: shared, taken back, saved and joined; the runtime's rows of PEERS.md, table 2."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from linattn.frontend import CompileOptions
from linattn.frontend.compile import compile_model
from linattn.runtime import Program, Session, StateError, greedy_rows
from linattn.runtime.device import Device, DeviceArray, Move, row_regions

from samples.tiny_hybrid import build
from tests.tolerances import BENIGN, error

ROWS, CONTEXT = 2, 256
IDS = np.random.default_rng(0).integers(0, 256, (ROWS, 240))
TARGETS = pytest.mark.parametrize("target", ["cpu", pytest.param("vulkan", marks=pytest.mark.vulkan)])


@cache
def module(target: str) -> bytes:
    options = CompileOptions(target=target, batch=ROWS, max_context=CONTEXT, prefill_blocks=(8,), guard="nan")
    return compile_model(build(), options).module


@cache
def program(target: str) -> Program:
    loaded = Program.load(module(target))
    assert loaded._engine.takes_results  # so that memory of states is used again
    return loaded


def run(session: Session, start: int, stop: int) -> np.ndarray:
    return session.run({"input_ids": IDS[:, start:stop]}, logits="last")["logits"]


def steps(session: Session, start: int, count: int) -> np.ndarray:
    """The logits of so many calls of one token."""
    return np.concatenate([run(session, at, at + 1) for at in range(start, start + count)], 1)


@cache
def expected(target: str) -> np.ndarray:
    """The logits of tokens 20 to 39 after a prompt of 20."""
    session = program(target).session()
    run(session, 0, 20)
    return steps(session, 20, 20)


@contextmanager
def allocations(monkeypatch: pytest.MonkeyPatch, poison: bool = False) -> Iterator[list[int]]:
    """Bytes of each array that is allocated; full of NaN on demand."""
    empty, sizes = Device._empty, list[int]()

    def allocated(self: Device, shape: Any, dtype: str, *args: Any) -> DeviceArray:
        array = empty(self, shape, dtype, *args)
        sizes.append(array.nbytes)
        if poison and dtype == "float32" and not args:
            fill_with_nan(self, array)
        return array

    with monkeypatch.context() as patch:
        patch.setattr(Device, "_empty", allocated)
        yield sizes


def fill_with_nan(device: Device, array: DeviceArray) -> None:
    poison = device.upload(np.full(array.shape, np.nan, np.float32), "float32")
    device.move([Move(poison, array, ((0, 0, array.nbytes),))])


@TARGETS
def test_poisoned_memory(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table 2 #17: whatever free and spare memory holds, no state and no logits are of it.

    What ended sessions leave to others has tests of its own, test_kept_memory.py.
    """
    device = program(target).device
    program(target).trim()
    monkeypatch.setattr(device, "clears_new", False)
    with allocations(monkeypatch, poison=True):
        session = program(target).session(window=2)
        for turn in range(2):
            run(session, 0, 20)
            forks = [session.fork(), program(target).session(session.snapshot(), window=1)]
            for one in (session, *forks):
                got = steps(one, 20, 4)
                for spare in one._spare:
                    for array in spare:
                        fill_with_nan(device, array)
                got = np.concatenate([got, steps(one, 24, 6)], 1)
                np.testing.assert_array_equal(got, expected(target)[:, :10])
            if turn == 0:
                session.rollback(2)
                np.testing.assert_array_equal(steps(session, 28, 4), expected(target)[:, 8:12])
            session.reset()


@TARGETS
def test_memory_of_a_snapshot_is_not_used_again(target: str) -> None:
    session = program(target).session(window=3)
    run(session, 0, 20)
    snapshots = []
    for at in range(20, 28):
        snapshots.append(session.snapshot())
        run(session, at, at + 1)
        if at == 24:
            session.rollback(2)
            run(session, 23, 25)
    for at, snapshot in enumerate(snapshots):
        once = program(target).session(snapshot)
        np.testing.assert_array_equal(steps(once, 20 + at, 3), expected(target)[:, at : at + 3])


@TARGETS
def test_rollback_of_the_whole_last_call(target: str) -> None:
    """Table 2 #18 and #22: of any length, on both sides of the blocks' edges, and NaN in what is taken back."""
    session = program(target).session(window=1)
    run(session, 0, 20)
    for tokens in (1, 2, 7, 8, 9, 17):
        run(session, 100, 100 + tokens)
        caches = session._line[-1].lease.caches
        for spec, array in zip(caches.specs, caches.arrays, strict=True):
            poison = session.program.device.upload(np.full(array.shape, np.nan, np.float32), "float32")
            rows = row_regions(array, spec.length_axis or 0, 20, 20 + tokens)
            session.program.device.move([Move(poison, array, rows)])
        session.rollback(tokens)
        fork = session.fork()
        np.testing.assert_array_equal(steps(fork, 20, 2), expected(target)[:, :2])
    np.testing.assert_array_equal(steps(session, 20, 4), expected(target)[:, :4])


@pytest.mark.parametrize(("target", "count"), [("cpu", 50), pytest.param("vulkan", 9, marks=pytest.mark.vulkan)])
def test_many_forks_of_a_prompt(target: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more memory than one prompt and so many continuations of their own; each continues by itself."""
    program(target).trim()
    with allocations(monkeypatch) as own:
        run(program(target).session(), 0, 1)  # what a session takes for itself: states, and one set to write to
    program(target).trim()
    with allocations(monkeypatch) as prompt:
        session = program(target).session()
        run(session, 0, 200)
    with allocations(monkeypatch) as forked:
        forks = [session.fork() for _ in range(count)]
        assert forked == []
        logits = [run(fork, 200 + i % 8, 201 + i % 8) for i, fork in enumerate(forks)]
    assert sum(prompt) + sum(forked) <= 1.2 * (sum(prompt) + count * sum(own))
    for i in (0, 7, count - 1):
        alone = program(target).session()
        run(alone, 0, 200)
        np.testing.assert_array_equal(logits[i], run(alone, 200 + i % 8, 201 + i % 8))
    np.testing.assert_array_equal(logits[0], logits[8])


NEXT = """
import sys
import numpy as np
from linattn.runtime import Program, Session, StateError, greedy_rows
module, state, target, tokens = sys.argv[1:]
session = Session.load(Program.load(module, target), state)
feed, found = np.array(eval(tokens)), []
for _ in range(32):
    feed = session.run({"input_ids": feed}, logits="last")["logits"][:, -1].argmax(-1)[:, None]
    found.append(feed.ravel().tolist())
print(found)
"""


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("cpu", "cpu"),
        pytest.param("vulkan", "vulkan", marks=pytest.mark.vulkan),
        pytest.param("vulkan", "cpu", marks=pytest.mark.vulkan),
        pytest.param("cpu", "vulkan", marks=pytest.mark.vulkan),
    ],
)
def test_saved_and_continued_in_a_new_process(source: str, target: str, tmp_path: Path) -> None:
    """Table 2 #19: the next 32 tokens are those that the session itself goes on with; nothing is read again."""
    session = program(source).session()
    feed = run(session, 0, 77)[:, -1].argmax(-1)[:, None]
    session.save(tmp_path / "state.safetensors")
    (tmp_path / "model.vmfb").write_bytes(module(target))
    arguments = [str(tmp_path / "model.vmfb"), str(tmp_path / "state.safetensors"), target, str(feed.tolist())]
    done = subprocess.run(
        [sys.executable, "-c", NEXT, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    want: list[list[int]] = []
    for _ in range(32):
        feed = session.run({"input_ids": feed}, logits="last")["logits"][:, -1].argmax(-1)[:, None]
        want.append(feed.ravel().tolist())
    assert eval(done.stdout) == want
    assert len({tuple(tokens) for tokens in want}) > 1


@TARGETS
@pytest.mark.parametrize("tokens", [1, 11])
def test_states_that_are_not_finite_are_not_committed(target: str, tokens: int) -> None:
    """Whichever layer is the first to have one; the session stays where it was and goes on from a rollback."""
    session = program(target).session(window=2, guard="nan")
    assert session.fork()._guard == "nan"
    run(session, 0, 20)
    np.testing.assert_array_equal(run(session, 20, 21), expected(target)[:, :1])
    for view in list(session.states.values()):
        good = view.numpy()
        bad = good.copy()
        where = (-1, -1, 20, -1) if view.kind == "kv_cache" else (-1,) * bad.ndim  # a row that is read
        bad[where] = np.inf if view.kind == "conv" else np.nan
        session.set_state(view.name, bad)
        with pytest.raises(StateError) as caught:
            run(session, 21, 21 + tokens)
        assert f": not finite after {21 + tokens} tokens, got" in str(caught.value)
        assert str(caught.value).endswith("; not committed: the session stays at position 21")
        assert session.position == 21
        np.testing.assert_array_equal(session.states[view.name].numpy(), bad)
        session.set_state(view.name, good)
    np.testing.assert_array_equal(run(session, 21, 22), expected(target)[:, 1:2])
    session.rollback(2)
    np.testing.assert_array_equal(steps(session, 20, 5), expected(target)[:, :5])


@pytest.mark.vulkan
def test_a_guard_reads_states_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module's function does it: none comes to the host but one that is refused, which the error tells of."""
    loaded, read, right = program("vulkan"), list[tuple[int, ...]](), Device._read
    assert loaded.manifest.finite == "finite"
    assert program("cpu").manifest.finite is None  # where they are read in place
    shapes = {view.shape for view in loaded.session().states.values()}

    def counted(self: Device, array: DeviceArray, *args: Any) -> Any:
        read.append(array.shape)
        return right(self, array, *args)

    monkeypatch.setattr(Device, "_read", counted)
    session = loaded.session(guard="nan")
    run(session, 0, 20)
    steps(session, 20, 3)
    assert len(read) >= 4 * len(loaded.states)  # what tells of them
    assert not shapes & set(read)
    name = next(spec.name for spec in loaded.states if spec.kind == "recurrent")
    session.set_state(name, np.full(session.states[name].shape, np.nan, np.float32))
    with pytest.raises(StateError, match=f"{name}: not finite after 24 tokens"):
        run(session, 23, 24)
    assert shapes & set(read)


@TARGETS
def test_a_guard_changes_no_token(target: str) -> None:
    tokens = [list(greedy_rows(program(target).session(guard=guard), IDS[:, :9], 8)) for guard in (None, "nan")]
    assert tokens[0] == tokens[1]


@TARGETS
def test_prompts_of_different_lengths(target: str) -> None:
    """Table 2 #23: each row as if it were alone (in both rows of a batch), behind columns that the mask hides."""
    assert program(target).manifest.row_masks
    lengths = (37, 13)
    session, logits = program(target).batch([IDS[row, :length] for row, length in enumerate(lengths)])
    together = np.concatenate([logits, steps(session, 40, 12)], 1)
    session.rows([1, 1])
    together = np.concatenate([together, session.run({"input_ids": IDS[[1, 1], 52:61]}, logits="last")["logits"]], 1)
    for row, length in enumerate(lengths):
        alone = program(target).session()
        first = alone.run({"input_ids": IDS[[row, row], :length]}, logits="last")["logits"]
        later = [alone.run({"input_ids": IDS[[row, row], at : at + 1]})["logits"] for at in range(40, 52)]
        want = np.concatenate([first, *later], 1)
        assert error(together[row, :-1], want[row]) < BENIGN["float32"]
    last = alone.run({"input_ids": IDS[[1, 1], 52:61]}, logits="last")["logits"]
    assert error(together[:, -1:], last) < BENIGN["float32"]


def calls_in(function: Callable[[], object]) -> int:
    """How many functions of Python, numpy and IREE it calls: what grows with the steps behind it would be a loop."""
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(("target", "count"), [("cpu", 10_000), pytest.param("vulkan", 200, marks=pytest.mark.vulkan)])
def test_many_steps_are_flat(target: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table 2 #30: with snapshots, forks, rollback and resets on the way, neither work nor memory grow."""
    monkeypatch.setattr(program(target).device, "_polls", False)  # how often is asked whether a GPU is done is its own
    session, feed = program(target).session(window=2), {"input_ids": IDS[:, :1]}
    run(session, 0, 8)
    snapshot, live, work = session.snapshot(), list[int](), list[int]()
    for at in range(count):
        if at % 100 == 50:  # far from what is done every hundred steps
            work.append(calls_in(lambda: session.run(feed)))
        else:
            session.run(feed)
        if at % 100 == 99:
            session.rollback(1)
            other = session.fork()
            other.run(feed)
        if session.position > CONTEXT - 8:
            session.restore(snapshot)
        if at in (count // 4, count - 1):
            live.append(resident_bytes())
    half = len(work) // 2
    assert min(work[half:]) == min(work[:half]), work  # some have the garbage collector's calls as well
    assert live[1] - live[0] < 4 << 20
    with allocations(monkeypatch) as sizes:  # a step takes no new memory, whatever was kept on the way
        for _ in range(5):
            session.run(feed)
        session.run(feed)
        before = len(sizes)
        for _ in range(5):
            session.run(feed)
    assert len(sizes) == before


def resident_bytes() -> int:
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 if status.exists() else 0


def whole(stop: int) -> np.ndarray:
    """The last logits of a session that takes 20 tokens, then the others."""
    session = program("cpu").session()
    run(session, 0, 20)
    return run(session, 20, stop)


def test_a_lease_that_ended_before_its_session() -> None:
    """The collector ends them in any order; a generator that it closes then still feeds what was not seen."""
    session = program("cpu").session()
    run(session, 0, 20)
    session._line[-1].lease.release()
    own = session.run({"input_ids": IDS[:, 20:22]}, logits="last")["logits"]  # two tokens: no prepared step
    np.testing.assert_array_equal(own, whole(22))
