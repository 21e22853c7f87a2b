"""Compiling in a process of its own, kept between calls: no model and no option can end the caller's.

LLVM and IREE abort where they have no diagnostic, and then nothing in their process can be caught.
"""

from __future__ import annotations

import atexit
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from linattn.install import install_hint
from linattn.runtime.errors import InputError, LinattnError, LoweringError, UnsupportedModelError, require
from linattn.runtime.outputs import remove_partial

from ..options import CompiledModel, CompileOptions
from ..plan.report import BundleReport, Progress
from .messages import ProgressSpec, Reply, Request, Text, receive, send
from .waiting import Waiting

if TYPE_CHECKING:
    import onnx

_PATIENCE = 5  # seconds for a process to be gone, and for its pipes: a grandchild may hold them
_TELLING = re.compile(r"LLVM ERROR|rror:|ssertion|terminate called|what\(\)")


class CompilerError(Exception):
    """Where an error came from in the compiler's process, shown as its cause."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _Worker:
    """The compiler's process and the talk with it."""

    def __init__(self) -> None:
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        theirs, ours = os.pipe()
        given = [theirs] if sys.platform == "linux" else []
        with os.fdopen(theirs, "rb"):
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", f"{__package__}.worker", *map(str, given)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path},
                pass_fds=given,
            )
        self._lifeline = os.fdopen(ours, "wb")  # closed by the system at the latest, when this process ends
        self._requests = cast(BinaryIO, self.process.stdin)
        self._replies = cast(BinaryIO, self.process.stdout)
        self._lines: list[bytes] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        """Keep what the compiler's libraries print, so that they are never kept waiting."""
        for line in cast(BinaryIO, self.process.stderr):
            self._lines.append(line)

    def call(self, request: Request, progress: Progress) -> Reply:
        """Have something done and wait for the end.

        Raises:
            LoweringError: if the process dies.
        """
        with Waiting() as waiting:
            try:
                message = self._hear(request)
                while not isinstance(message, Reply):
                    assert isinstance(message, Text)
                    if message.is_progress:
                        waiting.say(message.text, progress.write, progress.is_live)
                    else:
                        waiting.say(message.text, _to_stderr, sys.stderr.isatty())
                    message = self._hear()
            except BaseException as error:
                waiting.end("died" if isinstance(error, LoweringError) else "stopped")
                raise
        return message

    def _hear(self, request: Request | None = None) -> object:
        try:
            if request is not None:
                send(self._requests, request)
            return receive(self._replies)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise self._death() from error

    def end(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        self._lifeline.close()

    def said(self) -> str:
        """What the compiler's libraries have printed since this was asked last."""
        lines, self._lines = self._lines, []
        return os.fsdecode(b"".join(lines))

    def _death(self) -> LoweringError:
        try:
            code = self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:  # it has closed its pipes, or talks nonsense
            self.end()
            code = self.process.returncode
        self._listener.join(_PATIENCE)
        lines = [line.strip() for line in self.said().splitlines() if line.strip()]
        telling = [line for line in lines if _TELLING.search(line)]
        last = (telling or lines or ["it printed nothing"])[-1][:300]
        how = _signal_name(-code) if code < 0 else f"exit code {code}"
        hint = "nothing was written; the model and the options deserve a report"
        if code == -signal.SIGKILL:
            hint = "nothing was written; the system ends processes so when its memory is full"
        return LoweringError(f"the compiler died ({how}): {last}", hint=hint)


_worker: _Worker | None = None
_lock = threading.Lock()


def run_isolated(
    function: str, arguments: Mapping[str, Any], outputs: Sequence[str | os.PathLike[str]], progress: Progress
) -> Any:
    """Call a function in the compiler's process, one call at a time.

    Args:
        function: ``module:name``.
        arguments: Its arguments by name. What Python's pickle cannot take cannot be given.
        outputs: What it writes with :mod:`linattn.runtime.outputs`; nothing half done is left of it.
        progress: Shows what the function's own `Progress` would.

    Returns:
        What the function returns.

    Raises:
        LoweringError: if the process dies.
        Exception: what the function raises.
    """
    global _worker
    request = Request(function, arguments, os.getcwd(), dict(os.environ), _umask())
    with _lock:
        if _worker is None or _worker.process.poll() is not None:
            _worker = _Worker()
        worker = _worker
        try:
            reply = worker.call(request, progress)
        except BaseException:
            _worker = None
            worker.end()
            for path in outputs:
                remove_partial(Path(path).resolve().parent, worker.process.pid)
            raise
        if reply.leaving:
            _worker = None
            worker.end()
        sys.stderr.write(worker.said())
    if reply.error is not None:
        raise reply.error from CompilerError(reply.trace)
    return reply.value


def compile_model(
    source: str | Path | onnx.ModelProto,
    options: CompileOptions | None = None,
    *,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> CompiledModel:
    """Compile an ONNX model for a target, in a process of its own that later calls use again.

    Args:
        source: Path of the model, or the model itself.
        options: What to compile for.
        output: File for the module; it appears whole or not at all. Without it the bytes are returned.
        progress: Told of each stage.

    Raises:
        UnsupportedModelError: if the model is damaged or cannot be compiled; nothing has been compiled then.
        TargetError: if the target or one of its options is not known.
        LoweringError: if a forced strategy is not legal or IREE fails, or dies.
        LinattnError: if the compiler is not installed.
    """
    require(options, (CompileOptions, type(None)), "options", "CompileOptions")
    require(output, (str, os.PathLike, type(None)), "output", "a path")
    options = options or CompileOptions()
    progress = progress or Progress(6)
    outputs = [path for path in (output, options.parameters, options.report) if path is not None]
    with tempfile.TemporaryDirectory(prefix="linattn-") as folder:
        module = Path(folder) / "module.vmfb"
        arguments = {
            "source": str(source) if isinstance(source, (str, os.PathLike)) else _serialized(source),
            "options": options,
            "output": module if output is None else output,
            "progress": ProgressSpec(progress.total, progress.done),
        }
        compiled: CompiledModel = _compile("linattn.frontend.process.tasks:compile_task", arguments, outputs, progress)
        progress.done += len(compiled.report.stages)
        progress.seconds |= compiled.report.stages
        if output is not None or options.dry_run:
            return compiled
        compiled.report.output = "in memory"
        return CompiledModel(module.read_bytes(), compiled.manifest, compiled.report)


def compile_bundle(
    source: str | Path,
    machines: Sequence[CompileOptions],
    output: str | Path,
    progress: Callable[[str], Progress] | None = None,
) -> BundleReport:
    """Compile an ONNX model for several machines: :func:`linattn.frontend.bundle.compile_bundle` in that process.

    Args:
        source: Path of the model.
        machines: What to compile for; of several for one target the better one first.
        output: The folder to write; it appears whole or not at all. Another bundle of that name is replaced.
        progress: Makes what is told of the stages of a module, by its file name; a function of a module.
    """
    arguments = {"source": source, "machines": machines, "output": output, "progress": progress}
    return _compile("linattn.frontend.bundle:compile_bundle", arguments, [output], Progress(0))


def _compile(function: str, arguments: Mapping[str, Any], outputs: Sequence[str | Path], progress: Progress) -> Any:
    try:
        return run_isolated(function, arguments, outputs, progress)
    except ModuleNotFoundError as error:
        raise LinattnError(f"the compiler needs the package {error.name}", hint=install_hint("compile")) from error


def _serialized(model: onnx.ModelProto) -> bytes:
    if not hasattr(model, "SerializeToString"):
        got = type(model).__name__
        raise InputError("not what goes here", where="source", got=got, expected="a path or an onnx.ModelProto")
    try:
        return model.SerializeToString()
    except Exception as error:  # protobuf's own errors have no common base
        hint = "save it with external data and give the path"
        raise UnsupportedModelError("cannot be handed over", where="model", got=str(error)[:200], hint=hint) from error


def _to_stderr(text: str) -> None:
    sys.stderr.write(text)


def _umask() -> int:
    """The process's mask of file modes, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _end() -> None:
    if _worker is not None:
        _worker.end()


def _forget() -> None:
    """In a forked child: the process is the parent's."""
    global _worker, _lock
    _worker, _lock = None, threading.Lock()


atexit.register(_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

__all__ = ["CompileOptions", "CompiledModel", "compile_bundle", "compile_model", "run_isolated"]
