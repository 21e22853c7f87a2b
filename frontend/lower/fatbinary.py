"""CUDA's container of one program's code for several GPUs, as ``fatbinary`` of the CUDA toolkit writes it.

The driver takes the native code that fits the GPU, and compiles the PTX where none does. The tool itself is in no
package beside a ptxas of CUDA 12, hence the few lines here; a test compares them with the tool's bytes.

    16 bytes   magic, version, size of this header, size of all that follows
    64 bytes   of each entry: kind, version, size of this header, size of the code; version of the code, GPU, flags
    16 bytes   of PTX: the options of its assembler, none
    ...        the code, padded to 8 bytes
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping

MAGIC = 0xBA55ED50
_VERSION, _ENTRY_VERSION = 1, 0x0101
_PTX, _ELF = 1, 2
_64_BIT_LINUX = 0x11
_ENTRY = "<HHIQIIHHIQQQQ"
_OPTIONS_AT = 64  # of an entry of PTX: where they are (72), then the empty text
_OPTIONS = struct.pack("<QQ", _OPTIONS_AT + 8, 0)
_ABI_VERSION_AT = 8  # in an ELF header


def fatbinary(ptx: bytes, ptx_architecture: int, cubins: Mapping[int, bytes]) -> bytes:
    """The container.

    Args:
        ptx: PTX, for GPUs without native code.
        ptx_architecture: The least GPU that takes it, such as 80.
        cubins: GPU -> its native code.
    """
    entries = b"".join(_entry(_ELF, gpu, (cubin[_ABI_VERSION_AT], 1), cubin) for gpu, cubin in cubins.items())
    version = re.search(rb"^\.version (\d+)\.(\d+)", ptx, re.MULTILINE)
    assert version is not None, "PTX without a version"
    entries += _entry(_PTX, ptx_architecture, (int(version[2]), int(version[1])), ptx + b"\0", _OPTIONS)
    return struct.pack("<IHHQ", MAGIC, _VERSION, 16, len(entries)) + entries


def _entry(kind: int, gpu: int, version: tuple[int, int], code: bytes, options: bytes = b"") -> bytes:
    padded = code + bytes(-len(code) % 8)
    size, options_at = struct.calcsize(_ENTRY) + len(options), _OPTIONS_AT if options else 0
    head = (kind, _ENTRY_VERSION, size, len(padded), 0, options_at, *version, gpu, 0, _64_BIT_LINUX, 0, 0)
    return struct.pack(_ENTRY, *head) + options + padded
