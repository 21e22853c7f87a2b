"""Programs that close, fork and fail well: the first error is the one seen, nothing hangs, copies share nothing."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from linattn.runtime import Program, Session, StateError, TargetError
from linattn.runtime.module import Module
from needed import need_device
from tiny_hybrid import Hybrid

IDS = {"input_ids": np.array([[1, 2, 3]])}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lifecycle") / "hybrid.vmfb"
    path.write_bytes(Hybrid().compile())
    return path


class MyError(Exception):
    """Somebody else's."""


def fails_in_a_method(file: Path) -> None:
    Program.load(file).run(None, {})  # type: ignore[call-arg]


def fails_beside_a_session(file: Path) -> None:
    session = Program.load(file, "local-sync").session()
    session.run(IDS)
    raise MyError


def fails_within(file: Path) -> None:
    with Program.load(file, "local-sync") as program:
        program.session().run(IDS)
        raise MyError


def fails_without_a_device(file: Path) -> None:
    Program.load(file, "local-sync", "weights.irpa")


@pytest.mark.parametrize(
    "fails", [fails_in_a_method, fails_beside_a_session, fails_within, fails_without_a_device], ids=lambda f: f.__name__
)
def test_the_first_error_is_the_one_seen(
    fails: Callable[[Path], None], file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((TypeError, MyError, TargetError)):
        fails(file)
    gc.collect()
    assert capfd.readouterr().err == ""


def test_errors_that_nobody_keeps(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The program is freed while the exception travels, in other threads and by the cycle collector too."""

    def use() -> None:
        program = Program.load(file, "local-sync")
        cycle: list[Any] = [program, program.session()]
        cycle.append(cycle)
        raise MyError

    def often() -> None:
        for _ in range(5):
            try:
                use()
            except MyError:
                gc.collect()

    threads = [threading.Thread(target=often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert capfd.readouterr().err == ""


def test_a_file_that_may_only_be_read(file: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "read_only.vmfb")
        path.write_bytes(file.read_bytes())
        path.chmod(0o444)
        Path(folder).chmod(0o755)
        user = os.geteuid()
        if user == 0:  # who may write everything
            os.seteuid(65534)
        try:
            Program.load(path, "local-sync").close()
        finally:
            os.seteuid(user)


USES: dict[str, Callable[[Program, Session], object]] = {
    "run": lambda program, session: program.run(IDS),
    "session": lambda program, session: program.session(),
    "call": lambda program, session: program._engine.call(program.manifest.entry_points[0], [], [], 0),
    "exclusive": lambda program, session: program._engine.exclusive(),
    "enter": lambda program, session: program.__enter__(),
    "session.run": lambda program, session: session.run(IDS),
    "session.run of nothing": lambda program, session: session.run({"input_ids": np.zeros((1, 0), np.int64)}),
    "session.reset": lambda program, session: session.reset(),
    "session.state": lambda program, session: session.states["past.0.rec"].numpy(),
    "session.states": lambda program, session: session.states.numpy(),
    "session.set_state": lambda program, session: session.set_state("past.0.rec", [[1, 2, 3, 4]]),
    "session.reset_state": lambda program, session: session.reset_state("past.0.rec"),
}


@pytest.mark.parametrize("name", USES)
def test_closed(name: str, file: Path) -> None:
    program = Program.load(file, "local-sync")
    session = program.session()
    session.run(IDS)
    program.close()
    program.close()
    with pytest.raises(StateError, match=r"hybrid.vmfb: the program is closed; load it again") as caught:
        USES[name](program, session)
    assert "\n" not in str(caught.value)
    assert program.manifest.model_name == "tiny-hybrid"
    assert session.position == 3


def test_close_gives_the_file_back(file: Path, tmp_path: Path) -> None:
    file = shutil.copy(file, tmp_path)
    program = Program.load(file)
    session = program.session()
    session.run(IDS)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(file) in maps.read_text()
    program.close()
    if maps.exists():
        assert str(file) not in maps.read_text()


def test_with(file: Path) -> None:
    with Program.load(file, "local-sync") as program, Program.load(file, "local-sync") as other:
        session = program.session()
        with_one = session.run(IDS)["logits"]
        other.close()
        np.testing.assert_array_equal(program.session().run(IDS)["logits"], with_one)
    with pytest.raises(StateError, match="closed"):
        session.run(IDS)


def test_sessions_keep_the_program(file: Path) -> None:
    session = Program.load(file).session()
    gc.collect()
    assert session.run(IDS)["logits"].shape == (1, 3, 4)
    session.program.close()


def test_closed_by_another_thread(file: Path) -> None:
    """A call that is under way ends; the next one is refused; nobody waits for ever."""
    program = Program.load(file)
    found: list[BaseException] = []
    started = threading.Barrier(4)

    def use() -> None:
        session = program.session()
        started.wait(60)
        try:
            while True:
                session.run({"input_ids": np.ones((1, 12), np.int64)})
                session.reset()
        except StateError as error:
            found.append(error)

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    started.wait(60)
    program.close()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert ["closed" in str(error) for error in found] == [True] * 3


COPIES: list[Callable[[object], object]] = [copy.copy, copy.deepcopy, pickle.dumps]


@pytest.mark.parametrize("of", COPIES, ids=lambda f: f.__name__)
def test_copies_are_refused(of: Callable[[object], object], file: Path) -> None:
    program = Program.load(file, "local-sync")
    session = program.session()
    for thing, hint in (
        (session, "fork()"),
        (program, "load it again"),
        (program.device, "open_device"),
        (Module(file), "load it again"),
    ):
        with pytest.raises(StateError, match="cannot be copied or pickled") as caught:
            of(thing)
        assert hint in str(caught.value)
        assert "\n" not in str(caught.value)


FORKED = """
import gc, os, signal, sys, threading
sys.path.insert(0, sys.argv[1])
import numpy as np
from linattn.runtime import Program, StateError, TargetError, devices
IDS = {"input_ids": np.array([[1, 2, 3]])}
file, device, what = sys.argv[2:]
program = Program.load(file, device)
session = program.session()
want = session.run(IDS)["logits"]
if what == "locks":  # the child is born while another thread of its parent holds every lock
    inside = program._engine.exclusive(), session._exclusive()
    ready = threading.Event()
    def hold():
        with inside[0], inside[1]:
            ready.set()
            threading.Event().wait()
    threading.Thread(target=hold, daemon=True).start()
    ready.wait()
child = os.fork()
if child:
    _, status = os.waitpid(child, 0)
    if what != "locks":
        again = program.session().run(IDS)["logits"]  # the parent goes on
        assert (again == want).all()
    os._exit(os.waitstatus_to_exitcode(status))

signal.alarm(50)

def refused(use):
    try:
        use()
    except TargetError as error:
        text = str(error)
        assert "forked" in text and "spawn" in text and "\\n" not in text, text
    else:
        raise AssertionError("not refused")

if what in ("uses", "locks"):
    for use in (
        lambda: program.run(IDS),
        lambda: program.session(),
        lambda: program._engine.exclusive(),
        lambda: program.__enter__(),
        lambda: program._engine.call(program.manifest.entry_points[0], [], [], 0),
        lambda: session.run(IDS),
        lambda: session.reset(),
        lambda: session.states["past.0.rec"].numpy(),
        lambda: session.states.numpy(),
        lambda: program.device.zeros([4], "float32"),
        lambda: program.device.upload(np.zeros(4, np.float32), "float32"),
    ):
        refused(use)
    program.close()
    refused(lambda: session.run(IDS))
elif what == "close":
    with open(os.devnull):
        program.close()
        program.close()
elif what == "free":
    del program, session
    gc.collect()
elif what == "devices":
    rows = devices()
    assert "cpu" in [row.target for row in rows]
    assert device == "cpu" or ["forked" in row.why_not for row in rows if row.target == "vulkan"] == [True], rows
elif what == "load":
    if device == "vulkan":
        refused(lambda: Program.load(file, device))
    else:
        with Program.load(file, device) as mine:
            assert (mine.session().run(IDS)["logits"] == want).all()
sys.exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("what", ["exit", "uses", "locks", "close", "free", "devices", "load"])
@pytest.mark.parametrize("target", ["cpu", pytest.param("vulkan", marks=pytest.mark.vulkan)])
def test_a_forked_child_does_not_hang(what: str, target: str, tmp_path: Path) -> None:
    need_device("vulkan" if target == "vulkan" else "local-sync")
    path = tmp_path / "hybrid.vmfb"
    path.write_bytes(Hybrid(target).compile())
    command = [sys.executable, "-W", "ignore", "-c", FORKED, str(Path(__file__).parent), str(path), target, what]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")


AT_THE_END = """
import sys
import numpy as np
import linattn.runtime.device as last
from linattn.runtime import Program
file, device, what = sys.argv[1:]
program = Program.load(file, device)
session = program.session()
session.run({"input_ids": np.array([[1, 2, 3]])})
if what == "cycle":
    cycle = [program, session]
    cycle.append(cycle)
    del program, session
elif what == "function":
    last.keep = lambda: program  # a cycle with our own modules, and all they hold
elif what == "state":
    kept = session._line
    del session, program
elif what == "tensor":
    kept = session.run({"input_ids": [1, 2]}, device_outputs=True)["logits"]
    shared = np.from_dlpack(kept) if kept.device != "vulkan" else None
    del session, program, kept
"""


@pytest.mark.parametrize("what", ["plain", "cycle", "function", "state", "tensor"])
@pytest.mark.parametrize("target", ["cpu", pytest.param("vulkan", marks=pytest.mark.vulkan)])
def test_the_interpreter_ends_in_any_order(what: str, target: str, tmp_path: Path) -> None:
    """What lies on a device is freed before the device, whatever Python frees first."""
    need_device("vulkan" if target == "vulkan" else "local-sync")
    path = tmp_path / "hybrid.vmfb"
    path.write_bytes(Hybrid(target).compile())
    command = [sys.executable, "-c", AT_THE_END, str(path), target, what]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
