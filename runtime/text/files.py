"""The files of text that exporters write beside a model, in a folder or inside the module that was compiled from it.

A `.vmfb` is a zip archive; `linattn-compile` puts the files into it under `linattn/text/`, where IREE does not look.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
GENAI = "genai_config.json"
GENERATION = "generation_config.json"

LIMITS: Mapping[str, int] = {
    TOKENIZER: 256 << 20,
    CONFIG: 16 << 20,
    TEMPLATE: 1 << 20,
    GENAI: 1 << 20,
    GENERATION: 1 << 20,
}
"""File name -> bytes that it may have."""

PREFIX = "linattn/text/"


@dataclass(frozen=True)
class TextFiles:
    """What was found.

    Attributes:
        where: The folder or the module, for errors.
        contents: File name -> bytes; `tokenizer.json` is always there.
        paths: The files that they were read from; none inside a module.
    """

    where: str
    contents: Mapping[str, bytes]
    paths: tuple[Path, ...] = ()

    def place(self, name: str) -> str:
        """What errors call one of them."""
        return f"{self.where}: {name}"


def read_folder(path: Path) -> TextFiles:
    """Reads the files of a folder, or a tokenizer file of any name and what lies beside it.

    Raises:
        InputError: No such file, or one that is too large.
    """
    folder = path if path.is_dir() else path.parent
    names = {name: folder / name for name in LIMITS}
    names[TOKENIZER] = path / TOKENIZER if path.is_dir() else path
    if not names[TOKENIZER].is_file():
        raise InputError("no tokenizer", where=str(names[TOKENIZER]), hint="give its folder or its tokenizer.json")
    found = {name: file for name, file in names.items() if file.is_file()}
    contents = {name: _read(file, LIMITS[name]) for name, file in found.items()}
    return TextFiles(str(folder), contents, tuple(found.values()))


def read_module(file: Path) -> TextFiles | None:
    """Reads the files inside a compiled module, None if it was compiled without.

    Raises:
        InputError: One of them is damaged or too large.
    """
    contents: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for name, limit in LIMITS.items():
                try:
                    member = archive.getinfo(PREFIX + name)
                except KeyError:
                    continue
                with archive.open(member) as stream:
                    contents[name] = _limited(stream.read(limit + 1), limit, f"{file}: {name}")
    except (zipfile.BadZipFile, zlib.error, OSError, NotImplementedError, RuntimeError) as error:
        raise InputError("its text files cannot be read", where=str(file), got=str(error).partition("\n")[0]) from error
    return TextFiles(str(file), contents) if TOKENIZER in contents else None


def find(module: Path | None, given: str | os.PathLike[str] | None = None) -> TextFiles:
    """The files for a module: those that the caller names, those inside it, or those beside it.

    Args:
        module: The `.vmfb` file, None if it was loaded from bytes.
        given: A folder or a `tokenizer.json`.

    Raises:
        InputError: There are none, or they cannot be read.
    """
    if given is not None:
        return read_folder(Path(given))
    found = read_module(module) if module is not None else None
    if found is not None:
        return found
    if module is not None and (module.parent / TOKENIZER).is_file():
        return read_folder(module.parent)
    hint = "give its folder or tokenizer.json (linattn-run --tokenizer), or compile with --tokenizer"
    raise InputError("no tokenizer", where=str(module) if module else "module bytes", hint=hint)


def _read(file: Path, limit: int) -> bytes:
    try:
        with file.open("rb") as stream:
            return _limited(stream.read(limit + 1), limit, str(file))
    except OSError as error:
        raise InputError("cannot be read", where=str(file), got=error.strerror or str(error)) from error


def _limited(data: bytes, limit: int, where: str) -> bytes:
    if len(data) > limit:
        raise InputError("too large", where=where, got=f"more than {limit} bytes")
    return data
