"""Linux's permission for the registers of the matrix unit (AMX), which a process must ask for before it uses them.

They are 8 KiB that the kernel would keep for every thread, so it does unless asked not to, and a first use without
permission ends the process (SIGILL). The permission is the process's, for threads that are there and those to come.
Source: Linux, Documentation/arch/x86/xstate.rst.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

FEATURES = frozenset({"amx-tile", "amx-int8", "amx-bf16"})
"""Instruction sets that need the permission."""

REQUEST = (158, 0x1023, 18)
"""The system call: arch_prctl, to request a permission, for tile data."""


@cache
def permitted() -> bool:
    """Asks for the permission, once; False where the system has none to give, or refuses."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        syscall: Any = ctypes.CDLL(None, use_errno=True).syscall
    except (OSError, AttributeError):
        return False
    syscall.restype = ctypes.c_long
    number, *arguments = REQUEST
    return syscall(ctypes.c_long(number), *(ctypes.c_ulong(value) for value in arguments)) == 0
