"""Models are compiled in a process of their own: whatever ends it, the caller gets one line and no half a file."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from linattn.frontend import CompileOptions, compile_model
from linattn.frontend.cli import main
from linattn.frontend.compile import compile_model as compile_here
from linattn.frontend.plan.report import Progress, module_progress
from linattn.frontend.process import isolated
from linattn.frontend.process.isolated import compile_bundle, run_isolated
from linattn.runtime.errors import InputError, LinattnError, LoweringError, TargetError
from onnx import helper


def small_model(op: str = "Relu") -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"])], "small", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def call(function: str, **arguments: object) -> object:
    return run_isolated(function, arguments, (), Progress(1))


def process() -> int:
    pid = call("os:getpid")
    assert isinstance(pid, int)
    return pid


class When(io.StringIO):
    """A progress's stream that does something when a stage has begun."""

    def __init__(self, stage: str, action: Callable[[], object]) -> None:
        super().__init__()
        self._stage, self._action = stage, action

    def write(self, text: str, /) -> int:
        written = super().write(text)
        if self._stage in text:
            self._action()
        return written


def test_it_is_kept_between_calls(tmp_path: Path) -> None:
    first = process()
    with pytest.raises(TargetError):
        compile_model(small_model(), CompileOptions(cpu_features="nonsense"))
    progress = Progress(6, io.StringIO())
    compiled = compile_model(small_model(), progress=progress)
    assert process() == first != os.getpid()
    assert progress.done == len(progress.seconds) == 6
    assert re.search(r"\[6/6\] write \.\.\. \d+\.\d s\n", progress._stream.getvalue())  # type: ignore[union-attr]
    onnx.save(small_model(), tmp_path / "model.onnx")
    report = compile_model(tmp_path / "model.onnx", output=tmp_path / "out.vmfb").report
    assert len((tmp_path / "out.vmfb").read_bytes()) == report.output_bytes
    here = compile_here(small_model())
    assert (compiled.manifest, len(compiled.module)) == (here.manifest, len(here.module))


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV])
def test_death_while_compiling(ending: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "out.vmfb").write_bytes(b"what was there")
    pid = process()
    options = CompileOptions(parameters=tmp_path / "weights.irpa")
    progress = Progress(6, When("generate code", lambda: os.kill(pid, ending)))
    with pytest.raises(LoweringError, match=rf"the compiler died \({ending.name}\)") as caught:
        compile_model(small_model(), options, output=tmp_path / "out.vmfb", progress=progress)
    assert "\n" not in str(caught.value)
    assert progress._stream.getvalue().endswith(") ... died\n")  # type: ignore[union-attr]
    assert [path.name for path in tmp_path.iterdir()] == ["out.vmfb"]
    assert (tmp_path / "out.vmfb").read_bytes() == b"what was there"
    assert process() != pid
    assert compile_model(small_model()).module


def test_death_while_a_bundle_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(small_model(), tmp_path / "model.onnx")
    pid = process()
    monkeypatch.setattr(sys, "stderr", When("[5/6] generate", lambda: os.kill(pid, signal.SIGKILL)))
    with pytest.raises(LoweringError, match=r"the compiler died \(SIGKILL\)"):
        compile_bundle(tmp_path / "model.onnx", [CompileOptions()], tmp_path / "b.linattn", module_progress)
    said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "cpu.vmfb\n[1/6] load and check the model ... " in said
    assert said.endswith(") ... died\n")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert process() != pid


def test_real_ends_of_llvm(capfd: pytest.CaptureFixture[str]) -> None:
    """Pages of text, then ``exit`` or ``abort`` inside a library: a line here."""
    query = "linattn.frontend.targets.cpu_query:query"
    with pytest.raises(LoweringError, match=r"the compiler died .*LLVM ERROR: 64-bit code requested"):
        call(query, architecture="x86_64", cpu="nonsense")
    with pytest.raises(LoweringError, match=r"the compiler died \(SIGABRT\)"):
        call("os:abort")
    assert capfd.readouterr() == ("", "")


def test_dead_between_calls() -> None:
    os.kill(process(), signal.SIGKILL)
    time.sleep(0.1)
    assert process() != os.getpid()


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError, EOFError])
def test_the_caller_fails_meanwhile(error: type[BaseException], tmp_path: Path) -> None:
    """Ctrl-C, or a reader of the progress that is gone (``2>&1 | head``)."""

    def interrupt() -> None:
        raise error

    pid = process()
    progress = Progress(6, When("generate code", interrupt))
    with pytest.raises(error):
        compile_model(small_model(), output=tmp_path / "o", progress=progress)
    assert progress._stream.getvalue().endswith(") ... stopped\n")  # type: ignore[union-attr]
    assert not list(tmp_path.iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def error(compiler: Callable[..., object], *arguments: object) -> tuple[type, str, object]:
    with pytest.raises((LinattnError, OSError)) as caught:
        compiler(*arguments)
    return type(caught.value), str(caught.value), getattr(caught.value, "where", None)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (small_model("Relux"), CompileOptions()),
        ("/nowhere/model.onnx", CompileOptions()),
        (small_model(), CompileOptions(cpu_features="zenver4")),
        (small_model(), CompileOptions(dims={"n": 3})),
        (small_model(), CompileOptions(dump_ir=Path("/proc/nothing"))),
    ],
    ids=["operator", "file", "cpu", "dim", "os-error"],
)
def test_errors_are_the_same(model: onnx.ModelProto | str, options: CompileOptions) -> None:
    assert error(compile_model, model, options) == error(compile_here, model, options)


def test_errors_go_through_whole() -> None:
    with pytest.raises(InputError) as caught:
        call("linattn.frontend.cli:_positive", text="-3", option="--batch")
    told = caught.value
    assert (told.message, told.where, told.got) == ("not a positive number", "--batch", repr("-3"))
    assert isinstance(told, ValueError)


def test_debug_shows_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(small_model("Relux"), tmp_path / "model.onnx")
    for more, shown in ((), False), (("--debug",), True):
        assert main([str(tmp_path / "model.onnx"), "-o", str(tmp_path / "out.vmfb"), "--quiet", *more]) == 2
        text = capsys.readouterr().err
        assert ("in compile_task" in text) == shown, "a function of the other process"


def test_it_works_where_the_caller_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LINATTN_TEST_WORD", "seen")
    onnx.save(small_model(), "model.onnx")
    assert compile_model("model.onnx", output="out.vmfb").report.output == "out.vmfb"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "out.vmfb"]
    assert call("os:getenv", key="LINATTN_TEST_WORD") == "seen"


def test_what_libraries_print_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    call("os:system", command="echo on standard output; echo on standard error >&2")
    time.sleep(0.2)  # the text comes by another pipe than the reply
    process()
    assert capfd.readouterr() == ("", "on standard output\non standard error\n")


SCRIPT = """
import sys
import onnx
from linattn.frontend import compile_model
print("once")
print(len(compile_model(sys.argv[1]).module))
"""


def test_an_unguarded_script(tmp_path: Path) -> None:
    """Starting the process does not run the caller's script again."""
    onnx.save(small_model(), tmp_path / "model.onnx")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "script.py", tmp_path / "model.onnx"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"once\n\d+\n", done.stdout)
    assert done.stderr == ""


KILLED = """
import io, sys, time
from linattn.frontend import compile_model
from linattn.frontend.plan.report import Progress
class Stream(io.TextIOBase):
    def write(self, text):
        if "generate" in text:
            from linattn.frontend.process import isolated
            print(isolated._worker.process.pid, flush=True)
compile_model(sys.argv[1], output=sys.argv[2], progress=Progress(6, Stream()))
"""


def assert_gone(pid: int) -> None:
    for _ in range(300):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.1)
    pytest.fail("the compiler's process is still there")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_the_caller_is_killed(tmp_path: Path) -> None:
    """Nothing goes on for nobody, and nothing half done is left."""
    onnx.save(small_model(), tmp_path / "model.onnx")
    command = [sys.executable, "-c", KILLED, tmp_path / "model.onnx", tmp_path / "out.vmfb"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        pid = int(caller.stdout.readline())
        os.kill(pid, signal.SIGSTOP)
        caller.kill()
        caller.wait()
        os.kill(pid, signal.SIGCONT)
    assert_gone(pid)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


DEAF = """
import sys, threading
from linattn.frontend.plan.report import Progress
from linattn.frontend.process.isolated import run_isolated
sys.path.insert(0, sys.argv[1])
print(run_isolated("os:getpid", {}, (), Progress(1)), flush=True)
run_isolated("deaf:wait", {}, (), Progress(1))
"""


DEADLOCK = """
import ctypes
def wait():
    mutex, lock = ctypes.create_string_buffer(64), ctypes.PyDLL(None).pthread_mutex_lock
    lock(mutex), lock(mutex)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="signals of a pipe's end")
def test_the_caller_is_killed_while_native_code_keeps_the_lock(tmp_path: Path) -> None:
    """As IREE does for minutes, or for ever: no thread of Python's hears then that the caller has gone."""
    (tmp_path / "deaf.py").write_text(DEADLOCK)
    with subprocess.Popen([sys.executable, "-c", DEAF, tmp_path], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        pid = int(caller.stdout.readline())
        time.sleep(1)  # until it is deaf; a worker that hears would end as well
        caller.kill()
    assert_gone(pid)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_a_forked_child_has_its_own() -> None:
    pid = process()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, str(process()).encode())
        isolated._end()
        os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(read, 20)) != pid
    assert process() == pid


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise ModuleNotFoundError(name="iree.compiler")

    monkeypatch.setattr(isolated, "run_isolated", missing)
    with pytest.raises(LinattnError, match=r"the compiler needs the package iree.compiler; pip install"):
        compile_model(small_model())
