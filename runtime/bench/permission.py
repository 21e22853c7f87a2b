"""Linux's permission for the matrix unit (AMX) in a tool that does not ask for it, `iree-benchmark-module`.

A process that starts another program loses the permission, so this one cannot ask for it: a shared library does, which
the system's loader (`LD_PRELOAD`) starts first. It is made here, of five instructions: there is no compiler for C.
Sources: the System V ABI and its supplement for AMD64; `linattn.runtime.amx` for the call.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path

from linattn.runtime.amx import REQUEST, permitted

_HEADER, _SEGMENT, _ENTRY, _SYMBOL = 64, 56, 16, 24
_ALL = 7  # may be read, written (the loader does) and run


def environment(folder: Path) -> Mapping[str, str] | None:
    """The environment of a tool that may use the matrix unit, None where it needs no other one.

    Args:
        folder: For the library, while the tool runs.
    """
    if not permitted():
        return None
    file = folder / "permission.so"
    file.write_bytes(library(*REQUEST))
    others = os.environ.get("LD_PRELOAD")
    return {**os.environ, "LD_PRELOAD": f"{file}:{others}" if others else str(file)}


def library(call: int, first: int, second: int = 0) -> bytes:
    """A shared library for x86-64 that makes a system call when it is loaded, whatever comes back.

    Args:
        call: Its number.
        first: Its first argument.
        second: Its second one.
    """
    code = b"\xb8%b\xbf%b\xbe%b\x0f\x05\xc3" % tuple(struct.pack("<I", value) for value in (call, first, second))
    table_at = _HEADER + 2 * _SEGMENT
    names = ("DT_HASH", "DT_STRTAB", "DT_SYMTAB", "DT_STRSZ", "DT_SYMENT", "DT_INIT", "DT_NULL")
    tags = dict(zip(names, (4, 5, 6, 10, 11, 12, 0), strict=True))
    code_at = table_at + _ENTRY * len(tags)
    strings_at = code_at + len(code)
    symbols_at = -(-(strings_at + 1) // 8) * 8
    hash_at = symbols_at + _SYMBOL
    buckets = struct.pack("<4I", 1, 1, 0, 0)
    size = hash_at + len(buckets)
    values = (hash_at, strings_at, symbols_at, 1, _SYMBOL, code_at, 0)
    table = b"".join(struct.pack("<QQ", *entry) for entry in zip(tags.values(), values, strict=True))
    kind = (b"\x7fELF\x02\x01\x01", 3, 62, 1)  # 64 bits, a shared object, x86-64
    header = struct.pack("<16sHHIQQQIHHHHHH", *kind, 0, _HEADER, 0, 0, _HEADER, _SEGMENT, 2, _HEADER, 0, 0)
    loaded = struct.pack("<IIQQQQQQ", 1, _ALL, 0, 0, 0, size, size, 4096)
    dynamic = struct.pack("<IIQQQQQQ", 2, 6, table_at, table_at, table_at, len(table), len(table), 8)
    return (header + loaded + dynamic + table + code).ljust(hash_at, b"\0") + buckets
