"""The process in which models are compiled: where the compiler aborts, it is this one that dies.

``isolated`` starts it: requests come in on standard input, replies go out on standard output (``messages``). It ends
with the process that started it.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import io
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

from linattn.runtime.outputs import remove_all_partial

from ..plan.report import Progress
from .messages import ProgressSpec, Reply, Request, Text, receive, send

if sys.platform == "linux":
    import fcntl

_KEPT_BYTES = 1 << 30
"""Memory with which it waits for more work; a large model's is given back by ending."""


class _Shown(io.TextIOBase):
    """A stream whose text the caller shows."""

    def __init__(self, replies: BinaryIO, is_progress: bool) -> None:
        self._replies = replies
        self._is_progress = is_progress

    def write(self, text: str, /) -> int:
        send(self._replies, Text(text, self._is_progress))
        return len(text)


def serve(request: Request, replies: BinaryIO) -> Reply:
    """Do what is asked for."""
    progress = _Shown(replies, is_progress=True)
    arguments = dict(request.arguments)
    for name, value in arguments.items():
        if isinstance(value, ProgressSpec):
            arguments[name] = Progress(value.total, progress)  # pyright: ignore[reportArgumentType]
            arguments[name].done = value.done
    module, _, name = request.function.partition(":")
    try:
        os.environ.clear()
        os.environ.update(request.environment)
        os.chdir(request.folder)
        os.umask(request.umask)
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return Reply(function(**arguments))
    except Exception as error:
        trace = traceback.format_exc()
        error.__traceback__ = error.__cause__ = error.__context__ = None
        return Reply(error=error, trace=trace)


def _end_with_caller(lifeline: int) -> None:
    """End when the caller does, even where native code keeps the interpreter's lock and `_listen` is never heard.

    Nothing is written to the lifeline, a pipe: the system signals only that its other end has closed. The handler is
    C's own `alarm`, which takes the signal's number for seconds: ten in which `_listen` may tidy up, then SIGALRM.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGUSR1, ctypes.cast(libc.alarm, ctypes.c_void_p))
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGUSR1)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)


def main(lifeline: int | None = None) -> None:
    """Serve requests until there are no more."""
    if lifeline is not None:
        _end_with_caller(lifeline)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)  # what libraries print must not get between replies
    sys.stderr = _Shown(replies, is_progress=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller hears it too, and ends this process
    waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests, waiting), daemon=True).start()
    while True:
        reply = serve(waiting.get(), replies)
        gc.collect()
        reply = Reply(reply.value, reply.error, reply.trace, _resident_bytes() > _KEPT_BYTES)
        try:
            send(replies, reply)
        except (pickle.PicklingError, TypeError, AttributeError):
            text = f"{type(reply.error).__name__}: {reply.error}"
            send(replies, Reply(None, RuntimeError(text), reply.trace, reply.leaving))
        if reply.leaving:
            os._exit(0)


def _listen(requests: BinaryIO, waiting: queue.SimpleQueue[Request]) -> None:
    """Take requests, and end the process in the middle of its work when nobody waits for it any more."""
    try:
        while True:
            waiting.put(receive(requests))
    except EOFError:
        remove_all_partial()
        os._exit(0)


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
