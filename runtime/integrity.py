"""The seal at the end of each file that linattn-compile writes (`.vmfb`, `.irpa`): its size and hashes.

IREE checks neither: a module with other bytes among its constants runs and answers, one with other bytes in its code
crashes. The seal is the last bytes of the file, which IREE and its tools leave alone; a `.vmfb` is a zip archive too,
and there it is the archive's comment. README.md has the format.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zipfile
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO, cast

from .errors import TargetError

_MAGIC = b"linattn seal 1\r\n"
_SEAL = struct.Struct("<16sQQQ32s32s")
SEAL_BYTES = _SEAL.size
_CHUNK = 1 << 18
_EDGE = 1 << 16
_ZIP_END, _ZIP_END_BYTES = b"PK\x05\x06", 22
_ARCHIVE, _STORAGE = b"IRPA", struct.Struct("<72xQQ")
_HINT = "copy it again, whole, or compile it again"


@dataclass(frozen=True)
class Seal:
    """What a file is when it is whole.

    Attributes:
        size: Bytes before the seal.
        start: The weights' bytes that `core` leaves out: those from here on
        stop: up to here.
        core: SHA-256 of all other bytes: code, tables, the first and the last 64 KiB of the weights.
        whole: SHA-256 of all bytes.
    """

    size: int
    start: int
    stop: int
    core: bytes
    whole: bytes


def seal_file(path: Path) -> None:
    """Adds the seal to a file that has been written; reads all of it once."""
    with path.open("r+b") as file:
        _add_seal(file)


def sealed(data: bytes) -> bytes:
    """The bytes of a file with the seal added."""
    file = io.BytesIO(data)
    _add_seal(file)
    return file.getvalue()


def read_seal(path: Path) -> Seal:
    """What a file says of itself; it is not compared with what is in the file.

    Raises:
        TargetError: It has no seal.
    """
    with path.open("rb") as file:
        return _seal_of(file, str(path))


def check_seal(source: Path | bytes, where: str, *, whole: bool = False) -> None:
    """Finds out whether a file is as it was written, before anything in it is used.

    Args:
        source: The file, or its bytes.
        where: What errors name.
        whole: Read the weights too, at the speed of SHA-256.

    Raises:
        TargetError: It has no seal, another size or other content.
    """
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file:
        seal, size = _seal_of(file, where), file.seek(0, os.SEEK_END) - SEAL_BYTES
        if seal.size != size:
            raise TargetError("wrong size", where=where, got=f"{size} bytes", expected=seal.size, hint=_HINT)
        is_sound = seal.start <= seal.stop <= size
        core, every = _hashes(file, size, seal.start, seal.stop, whole=whole) if is_sound else (b"", b"")
        if core != seal.core or (whole and every != seal.whole):
            raise TargetError("damaged: its bytes are not those that were written", where=where, hint=_HINT)


def _add_seal(file: io.BufferedIOBase) -> None:
    size = file.seek(0, os.SEEK_END)
    start, stop = _weights(file, size)
    if _read(file, size - _ZIP_END_BYTES, size)[:4] == _ZIP_END:
        file.seek(size - 2)
        file.write(struct.pack("<H", SEAL_BYTES))
    start, stop = (start + _EDGE, stop - _EDGE) if stop - start > 2 * _EDGE else (0, 0)
    core, whole = _hashes(file, size, start, stop, whole=True)
    file.seek(size)
    file.write(_SEAL.pack(_MAGIC, *astuple(Seal(size, start, stop, core, whole))))


def _weights(file: io.BufferedIOBase, size: int) -> tuple[int, int]:
    """The range of a file that holds weights and nothing else; empty where there is none."""
    header = _read(file, 0, _STORAGE.size)
    if header.startswith(_ARCHIVE) and len(header) == _STORAGE.size:
        start, length = _STORAGE.unpack(header)
        return min(start, size), min(start + length, size)
    try:
        members = zipfile.ZipFile(cast(BinaryIO, file)).infolist()
    except zipfile.BadZipFile:
        return 0, 0
    constants = [member for member in members if member.filename.startswith("_const")]
    if not constants:
        return 0, 0
    largest = max(constants, key=lambda member: member.file_size)
    sizes = struct.unpack("<26xHH", _read(file, largest.header_offset, largest.header_offset + 30))
    start = largest.header_offset + 30 + sum(sizes)
    return start, start + largest.file_size


def _seal_of(file: io.BufferedIOBase, where: str) -> Seal:
    size = file.seek(0, os.SEEK_END) - SEAL_BYTES
    magic, *fields = _SEAL.unpack(_read(file, size, size + SEAL_BYTES)) if size >= 0 else (b"",)
    if magic != _MAGIC and where.endswith(".onnx"):
        raise TargetError("an ONNX model, not a module", where=where, hint="compile it with linattn-compile first")
    if magic != _MAGIC:
        hint = f"it is cut off or was not written by linattn-compile: {_HINT}"
        raise TargetError("no seal at its end", where=where, hint=hint)
    return Seal(*fields)


def _hashes(file: io.BufferedIOBase, size: int, start: int, stop: int, *, whole: bool) -> tuple[bytes, bytes]:
    """SHA-256 without the bytes from `start` to `stop`, and, if asked for, with them."""
    core, every = hashlib.sha256(), hashlib.sha256()
    buffer = memoryview(bytearray(min(_CHUNK, size)))
    for first, last, is_core in ((0, start, True), (start, stop, False), (stop, size, True)):
        if is_core or whole:
            file.seek(first)
            while first < last and (count := file.readinto(buffer[: last - first])):
                first += count
                if is_core:
                    core.update(buffer[:count])
                if whole:
                    every.update(buffer[:count])
    return core.digest(), every.digest()


def _read(file: io.BufferedIOBase, start: int, stop: int) -> bytes:
    file.seek(max(start, 0))
    return file.read(stop - max(start, 0))
