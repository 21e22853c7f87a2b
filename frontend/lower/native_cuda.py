"""Native code for NVIDIA GPUs beside the PTX in a module: what depends on IREE is all here.

After its phase ``hal`` the module has one executable with all kernels, in the FlatBuffer that IREE 3.13's CUDA driver
reads (``cuda_executable_def.fbs``). That driver hands its ``ptx_image`` to CUDA as it is, and CUDA takes PTX, native
code of one GPU, or a container of both. IREE's own flag ``--iree-cuda-use-ptxas`` does nothing.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from iree.compiler import ir

from ..targets.base import NativeCuda
from .executables import inside
from .fatbinary import fatbinary

_HEADER = 64  # before the FlatBuffer: magic, version, size of what follows
_SIZE_AT = 8
_IDENTIFIER = b"CDA1"
_EXPORTS, _MODULES = 0, 1  # fields of an ExecutableDef
_KERNEL_NAME, _IMAGE = 1, 0  # of an ExportDef, of a ModuleDef
_Tables = Mapping[int, "_Tables | list[_Tables]"]
_PLACE: _Tables = {}
_DEBUG: _Tables = {1: _PLACE, 2: [{1: _PLACE}]}
_EXECUTABLE: _Tables = {_EXPORTS: [{6: _DEBUG}], _MODULES: [{}], 2: [{}]}
"""Field -> the table in it, or the one of which it has a list."""
_ALIGNMENT = 16


@dataclass(frozen=True)
class CudaExecutable:
    """What IREE wrote for its CUDA driver.

    Attributes:
        data: All of it.
        kernels: Names of the kernels that it calls.
        image: What CUDA is given.
    """

    data: bytes
    kernels: tuple[str, ...]
    image: bytes

    @staticmethod
    def read(data: bytes) -> CudaExecutable:
        """Take it apart."""
        buffer = data[_HEADER:]
        assert buffer[4:8] == _IDENTIFIER, "not an executable of IREE's CUDA driver"
        root = _follow(buffer, 0)
        names = [_string(buffer, _field(buffer, export, _KERNEL_NAME)) for export in _tables(buffer, root, _EXPORTS)]
        (module,) = _tables(buffer, root, _MODULES)
        return CudaExecutable(
            data, tuple(name.decode() for name in names), _string(buffer, _field(buffer, module, _IMAGE))
        )

    def with_image(self, image: bytes) -> bytes:
        """The same with another image: what IREE wrote behind the old one, the tables' layouts, moves."""
        buffer = bytearray(self.data[_HEADER:])
        root = _follow(buffer, 0)
        (module,) = _tables(buffer, root, _MODULES)
        old = _follow(buffer, _field(buffer, module, _IMAGE))
        behind = old + 4 + len(self.image) + 1
        room = -(-(len(image) - len(self.image)) // _ALIGNMENT) * _ALIGNMENT
        for table in list(_walk(buffer, root, _EXECUTABLE)):
            (layout,) = struct.unpack_from("<i", buffer, table)
            if table - layout >= behind:
                struct.pack_into("<i", buffer, table, layout - room)
        code = struct.pack("<I", len(image)) + image
        buffer[old:behind] = code + bytes(behind - old + room - len(code))
        head = bytearray(self.data[:_HEADER])
        struct.pack_into("<Q", head, _SIZE_AT, len(buffer))
        return bytes(head + buffer)


def add_native_code(module: ir.Operation, native: NativeCuda) -> None:
    """Put native code beside the PTX of each executable.

    Args:
        module: After IREE's phase ``hal``, in a context.
        native: What is wanted.

    Raises:
        LoweringError: if the assembler does not take the PTX.
    """
    for executable in inside(module, "hal.executable"):
        for code in inside(executable, "hal.executable.binary"):
            values: Any = code.attributes["data"]
            found = CudaExecutable.read(bytes(memoryview(values)))
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(functools.partial(native.assembler.assemble, found.image), native.architectures)
                cubins = dict(zip(native.architectures, made, strict=True))
            data = found.with_image(fatbinary(found.image, native.ptx_architecture, cubins))
            kind = ir.Type.parse(f"vector<{len(data)}xi8>")
            code.attributes["data"] = ir.DenseElementsAttr.get(np.frombuffer(data, np.int8), type=kind)


def _follow(buffer: bytes | bytearray, place: int) -> int:
    """Where a reference leads."""
    return place + struct.unpack_from("<I", buffer, place)[0]


def _optional_field(buffer: bytes | bytearray, table: int, number: int) -> int | None:
    """Where a field of a table is."""
    layout = table - struct.unpack_from("<i", buffer, table)[0]
    (size,) = struct.unpack_from("<H", buffer, layout)
    at = 4 + 2 * number
    offset = struct.unpack_from("<H", buffer, layout + at)[0] if at < size else 0
    return table + offset if offset else None


def _field(buffer: bytes | bytearray, table: int, number: int) -> int:
    place = _optional_field(buffer, table, number)
    assert place is not None, f"field {number} is not there"
    return place


def _tables(buffer: bytes | bytearray, table: int, number: int) -> list[int]:
    """The tables in a field that is a vector of them."""
    return _elements(buffer, _field(buffer, table, number))


def _elements(buffer: bytes | bytearray, field: int) -> list[int]:
    vector = _follow(buffer, field)
    (count,) = struct.unpack_from("<I", buffer, vector)
    return [_follow(buffer, vector + 4 + 4 * i) for i in range(count)]


def _walk(buffer: bytes | bytearray, table: int, kinds: _Tables) -> Iterator[int]:
    """A table and all that are in it."""
    yield table
    for number, kind in kinds.items():
        field = _optional_field(buffer, table, number)
        if field is None:
            continue
        for inner in _elements(buffer, field) if isinstance(kind, list) else [_follow(buffer, field)]:
            yield from _walk(buffer, inner, kind[0] if isinstance(kind, list) else kind)


def _string(buffer: bytes | bytearray, field: int) -> bytes:
    place = _follow(buffer, field)
    (size,) = struct.unpack_from("<I", buffer, place)
    return bytes(buffer[place + 4 : place + 4 + size])
