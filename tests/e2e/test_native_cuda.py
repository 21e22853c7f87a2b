"""Native code for NVIDIA GPUs in a module, read with other tools than those that write it; no GPU runs it here."""

from __future__ import annotations

import itertools
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flatbuffers.encode
import flatbuffers.number_types as numbers
import flatbuffers.table
import pytest
from linattn.frontend.compile import CompiledModel, compile_model
from linattn.frontend.lower.fatbinary import fatbinary
from linattn.frontend.lower.native_cuda import CudaExecutable
from linattn.frontend.options import CompileOptions
from linattn.frontend.targets.ptxas import find_assembler
from linattn.runtime.describe import describe, describe_text

from samples.tiny_hybrid import build

GPUS = (80, 89, 90)
HEADER = 64  # of IREE, before the FlatBuffer
PTX = b".version 8.4\n.target sm_80\n.address_size 64\n" + b"\n" * 9

is_missing = find_assembler() is None and "ptxas" not in os.environ.get("LINATTN_REQUIRE", "").split(",")
needs_ptxas = pytest.mark.skipif(is_missing, reason="no ptxas (the package of linattn's extra cuda)")


@dataclass(frozen=True)
class Compiled:
    """A module, and its executable before the native code went in."""

    model: CompiledModel
    before: bytes


@pytest.fixture(scope="module")
def native() -> Compiled:
    seen: list[bytes] = []
    insert = CudaExecutable.with_image

    def note(self: CudaExecutable, image: bytes) -> bytes:
        seen.append(self.data)
        return insert(self, image)

    names = ",".join(f"sm_{gpu}" for gpu in GPUS)
    options = CompileOptions(target="cuda", gpu_target=names, prefill_blocks=(), max_context=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CudaExecutable, "with_image", note)
        model = compile_model(build(), options)
    (before,) = seen
    return Compiled(model, before)


def executables(module: bytes) -> list[tuple[list[dict[str, Any]], bytes]]:
    """The exports and the image of each CUDA executable, by Google's reader of FlatBuffers."""
    found: list[tuple[list[dict[str, Any]], bytes]] = []
    for match in re.finditer(b"CDA1", module):
        start = match.start() - 4
        if start < HEADER or module[start - HEADER : start - HEADER + 4] != b"CDA1":
            continue  # the header's own
        (size,) = struct.unpack_from("<Q", module, start - HEADER + 8)
        data = bytearray(module[start : start + size])
        root = flatbuffers.table.Table(data, flatbuffers.encode.Get(flatbuffers.packer.uoffset, data, 0))
        exports = [
            {
                "name": bytes(table.String(table.Pos + table.Offset(6))).decode(),
                "block": struct.unpack_from("<3I", data, table.Pos + table.Offset(8)),
                "shared": scalar(table, 10, numbers.Uint32Flags),
                "constants": scalar(table, 12, numbers.Uint32Flags),
                "bindings": table.VectorLen(table.Offset(14)) if table.Offset(14) else 0,
                "debug": bytes(debug.String(debug.Pos + debug.Offset(4))) if (debug := inner(table, 16)) else None,
            }
            for table in tables(root, 4)
        ]
        (module_def,) = tables(root, 6)
        image = bytes(module_def.String(module_def.Pos + module_def.Offset(4)))
        assert (
            data[module_def.Indirect(module_def.Pos + module_def.Offset(4)) + 4 + len(image)] == 0
        )  # CUDA reads to it
        found.append((exports, image))
    return found


def scalar(table: Any, at: int, flags: Any) -> int:
    return table.Get(flags, table.Pos + table.Offset(at)) if table.Offset(at) else 0


def inner(table: Any, at: int) -> Any:
    return (
        flatbuffers.table.Table(table.Bytes, table.Indirect(table.Pos + table.Offset(at))) if table.Offset(at) else None
    )


def tables(table: Any, at: int) -> list[Any]:
    offset = table.Offset(at)
    places = [table.Indirect(table.Vector(offset) + 4 * i) for i in range(table.VectorLen(offset))]
    return [flatbuffers.table.Table(table.Bytes, place) for place in places]


def entries(image: bytes) -> list[tuple[int, int, bytes]]:
    """Kind, GPU and code of each entry of a container."""
    magic, version, head, size = struct.unpack_from("<IHHQ", image)
    assert (magic, version, head, size) == (0xBA55ED50, 1, 16, len(image) - 16)
    at, found = head, []
    while at < len(image):
        kind, _, head = struct.unpack_from("<HHI", image, at)
        (size,) = struct.unpack_from("<Q", image, at + 8)
        (gpu,) = struct.unpack_from("<I", image, at + 28)
        found.append((kind, gpu, image[at + head : at + head + size]))
        at += head + size
    return found


@needs_ptxas
def test_a_cubin_for_each_gpu_and_the_ptx(native: Compiled) -> None:
    ((exports, image),) = executables(native.model.module)
    assert len(exports) > 20
    *cubins, (kind, gpu, ptx) = entries(image)
    assert (kind, gpu) == (1, 80)
    assert ptx.rstrip(b"\0").isascii()
    assert sorted(re.findall(rb"\.entry (\w+)\(", ptx)) == sorted(export["name"].encode() for export in exports)
    assert [gpu for _, gpu, _ in cubins] == list(GPUS)
    for kind, gpu, code in cubins:
        assert kind == 2
        assert code[:4] == b"\x7fELF"
        machine, _, _, _, _, flags = struct.unpack_from("<HIQQQI", code, 18)
        assert (machine, flags & 0xFF) == (190, gpu)  # EM_CUDA, and CUDA 12's place of the GPU
        for export in exports:
            assert b"\0.text." + export["name"].encode() + b"\0" in code


@needs_ptxas
def test_the_rest_of_the_executable_is_as_iree_wrote_it(native: Compiled) -> None:
    """Kernels, threads, memory, bindings, debug names; and the PTX, byte for byte."""
    ((exports, image),), ((exports_before, ptx),) = executables(native.model.module), executables(native.before)
    assert exports == exports_before
    assert entries(image)[-1][2].rstrip(b"\0") == ptx
    assert [export["debug"] for export in exports if export["debug"]]  # they lie behind what moved


@needs_ptxas
def test_the_module_says_so(native: Compiled, tmp_path: Path) -> None:
    assert native.model.manifest.target.native == ("sm_80", "sm_89", "sm_90")
    assert any(note.startswith("native code for sm_80, sm_89, sm_90, by ptxas") for note in native.model.report.notes)
    path = tmp_path / "model.vmfb"
    path.write_bytes(native.model.module)
    assert "native    sm_80, sm_89, sm_90; other GPUs compile its PTX" in describe_text(describe(path))


# What fatbinary 13.5.37 writes: of `PTX` with --image3=kind=ptx,sm=80; heads of --image3=kind=elf,sm=N of ptxas 12.9
# (ABI version 7 in the cubin) and of ptxas 13.5 (8).
PTX_HEAD = """
    50ed55ba 01001000 88000000 00000000 01000101 50000000 38000000 00000000 00000000 40000000 04000800 50000000
    00000000 00000000 11000000 00000000 00000000 00000000 00000000 00000000 48000000 00000000 00000000 00000000
"""
ELF_HEADS = {
    (89, 7): """02000101 40000000 48000000 00000000 00000000 00000000 07000100 59000000
                00000000 00000000 11000000 00000000 00000000 00000000 00000000 00000000""",
    (90, 8): """02000101 40000000 48000000 00000000 00000000 00000000 08000100 5a000000
                00000000 00000000 11000000 00000000 00000000 00000000 00000000 00000000""",
}


def test_the_container_is_what_nvidias_tool_writes() -> None:
    assert fatbinary(PTX, 80, {}) == bytes.fromhex(PTX_HEAD) + PTX + bytes(3)
    codes = {gpu: b"\x7fELF\2\1\1\x33" + bytes([abi]) + bytes(range(63)) for gpu, abi in ELF_HEADS}
    heads = [bytes.fromhex(head) for head in ELF_HEADS.values()]
    expected = b"".join(itertools.chain(*zip(heads, codes.values(), strict=True)))
    found = fatbinary(PTX, 80, codes)
    assert found[16 : 16 + len(expected)] == expected
    assert found[16 + len(expected) :] == fatbinary(PTX, 80, {})[16:]
