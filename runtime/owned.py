"""Who may use what lies on a device: one process, and one Python object for each thing."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import cast

from .errors import StateError, TargetError

_process = os.getpid()
"""This process; asking the system each time takes microseconds of a step whose weights left nothing in the caches."""


def _is_another_process() -> None:
    global _process
    _process = os.getpid()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_is_another_process)


class Owned:
    """A thing with memory on a device: `copy.copy`, `copy.deepcopy` and `pickle` refuse it in one line."""

    _copy_hint = ""

    def __reduce_ex__(self, protocol: object) -> str:
        """What all three of them ask for.

        Raises:
            StateError: Always: two objects would write to the same memory on the device.
        """
        raise StateError(f"a {type(self).__name__} cannot be copied or pickled", hint=self._copy_hint)


def is_process(pid: int) -> bool:
    """Whether this is it."""
    return _process == pid


def check_process(pid: int, uri: str) -> None:
    """Refuses to use a device in another process than the one that opened it.

    A forked child has the parent's device, but none of the threads that work for it: it would wait for ever.

    Args:
        pid: The process that opened the device.
        uri: The device.

    Raises:
        TargetError: This process was forked from that one.
    """
    if not is_process(pid):
        hint = "load the model in the child, or start it with multiprocessing's 'spawn' method"
        raise TargetError("opened before this process was forked, and of no use in it", where=uri, hint=hint)


def never_free(thing: object) -> None:
    """Keeps a Python object for as long as the process lasts, the interpreter's end included."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def keep_to_the_end(thing: object) -> None:
    """Keeps a Python object until the interpreter frees `sys`, after all modules of users and all that they hold."""
    kept = cast(list[object], sys.modules["sys"].__dict__.setdefault("_linattn_kept", []))
    if not any(other is thing for other in kept):
        kept.append(thing)
