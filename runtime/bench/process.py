"""A subject in a process of its own: a fresh interpreter, started by spawning, that serves calls over a pipe.

Subjects may not share a process (thread pools of one spin while another is timed) nor a crash. Such a process ends
without tearing anything down: in a third of those that PyTorch's profiler had watched, glibc found a double free or
the process crashed while CUDA's libraries went (H100, PyTorch 2.11, IREE 3.13).
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from linattn.runtime.errors import LinattnError

from .lazy import stderr_to
from .timing import settle

TIMEOUT = 1800.0


class SubjectError(LinattnError):
    """A subject failed or died; the others go on."""


class Subject:
    """A runner object in its own process.

    Args:
        name: How messages call it.
        factory: `package.module:Class` of the runner.
        arguments: Keyword arguments of the class.

    Raises:
        SubjectError: The runner could not be made; one line says why.
    """

    def __init__(self, name: str, factory: str, arguments: Mapping[str, Any]) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._log = Path(tempfile.mkstemp(prefix="linattn-bench-", suffix=".log")[1])
        self._process = context.Process(
            target=_serve, args=(theirs, factory, dict(arguments), str(self._log)), daemon=True
        )
        with _deaf_to_ctrl_c():
            self._process.start()
        theirs.close()
        try:
            self._reply("start")
        except SubjectError:
            self.close()
            raise

    @property
    def pid(self) -> int | None:
        """Its process."""
        return self._process.pid

    def call(self, method: str, **arguments: Any) -> Any:
        """Calls a method of the runner and waits until its process is quiet again.

        Raises:
            SubjectError: The method failed, the process died, or half an hour went by.
        """
        try:
            self._pipe.send((method, arguments))
        except (BrokenPipeError, OSError) as error:
            raise self._died(method) from error
        return self._reply(method)

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._log.unlink(missing_ok=True)

    def _reply(self, method: str) -> Any:
        try:
            if not self._pipe.poll(TIMEOUT):
                self._process.kill()
                raise SubjectError("did not answer", where=self.name, got=f"{TIMEOUT:.0f} s of '{method}'")
            ok, value = self._pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._died(method) from error
        if not ok:
            raise SubjectError(str(value))
        return value

    def _died(self, method: str) -> SubjectError:
        self._process.join(5)
        said = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        hint = f"it said: {said[-1][:200]}" if said else None
        code = self._process.exitcode
        return SubjectError("its process died", where=self.name, got=f"status {code} in '{method}'", hint=hint)


@contextmanager
def _deaf_to_ctrl_c() -> Generator[None]:
    """Inside: processes are started that Ctrl-C does not reach, since the one that started them ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which unblocks Ctrl-C when it starts, at the first process otherwise
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, factory: str, arguments: dict[str, Any], log: str) -> None:
    """The child: makes the runner, then answers calls until the pipe closes."""
    module, _, name = factory.partition(":")
    runner: Any = None
    method = ""
    with stderr_to(Path(log)):
        while True:
            try:
                if runner is None:
                    runner = getattr(importlib.import_module(module), name)(**arguments)
                    value: Any = None
                else:
                    value = getattr(runner, method)(**arguments)
                settle()
                answer = (True, value)
            except Exception as error:  # a subject's failure is a result: the parent reports it
                traceback.print_exc()
                text = " ".join(str(error).split())
                answer = (
                    False,
                    text[:300] if isinstance(error, LinattnError) else f"{type(error).__name__}: {text[:300]}",
                )
            try:
                pipe.send(answer)
                if runner is None:
                    break
                method, arguments = pipe.recv()
            except (EOFError, OSError):
                break
    os._exit(0)
