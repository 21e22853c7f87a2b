"""The CUDA context of a thread: IREE makes it current in the thread that opens a device, CUDA wants it in every one.

Without it, what a new thread asks of the driver ends with CUDA_ERROR_INVALID_CONTEXT. IREE works in the device's
primary context, which is one for a process, so that the driver hands out the same.
Source: CUDA Driver API, Context Management and Primary Context Management.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from typing import Any

from .errors import TargetError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


class ThreadContext:
    """The primary context of one device, for the threads of this process.

    Args:
        ordinal: Number of the device among those that the driver lists.
        load: Opens the driver's library, which IREE has opened already.
    """

    def __init__(self, ordinal: int, load: Callable[[str], Any] = ctypes.CDLL) -> None:
        self._ordinal, self._load = ordinal, load
        self._context: tuple[Any, Any] | None = None
        self._lock = threading.Lock()
        self._of_thread = threading.local()

    def make_current(self) -> None:
        """Makes it this thread's, once.

        Raises:
            TargetError: The driver refuses.
        """
        if getattr(self._of_thread, "is_current", False):
            return
        library, context = self._retained()
        self._check(library.cuCtxSetCurrent(context), "cuCtxSetCurrent")
        self._of_thread.is_current = True

    def _retained(self) -> tuple[Any, Any]:
        """The library and the context, which is held until the process ends, as the device is."""
        with self._lock:
            if self._context is None:
                try:
                    library = self._load(LIBRARY)
                except OSError as error:
                    raise TargetError("does not load", where=LIBRARY, hint=str(error)) from error
                device, context = ctypes.c_int(), ctypes.c_void_p()
                self._check(library.cuDeviceGet(ctypes.byref(device), self._ordinal), "cuDeviceGet")
                retained = library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
                self._check(retained, "cuDevicePrimaryCtxRetain")
                self._context = library, context
            return self._context

    def _check(self, result: int, what: str) -> None:
        if result:
            hint = "start the process anew; if that does not help, look at nvidia-smi"
            raise TargetError(
                f"{what} failed in a new thread",
                where=f"cuda, device {self._ordinal}",
                got=f"CUDA error {result}",
                hint=hint,
            )
