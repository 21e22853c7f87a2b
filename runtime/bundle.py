"""A bundle: a folder with modules of one model for several machines, their weights in one file.

The frontend writes `bundle.json` with `Bundle.to_json` (README.md has the format); `read_bundle` reads it back and
trusts nothing: names, sizes and versions are checked, and no file is read that lies outside the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import TargetError
from .integrity import read_seal
from .manifest_reader import Reader, bad
from .manifest_rules import is_plain_name
from .manifest_target import Target, read_target

FORMAT = 1
INDEX = "bundle.json"
_MAX_INDEX_BYTES = 4 << 20
_MAX_FILE_BYTES = 1 << 46


@dataclass(frozen=True)
class BundledFile:
    """A file of the bundle.

    Attributes:
        file: Its name, without a folder.
        size: In bytes, its seal included.
        sha256: Hash of its bytes before the seal, hex, as the seal has it.
    """

    file: str
    size: int
    sha256: str


@dataclass(frozen=True)
class BundledModule(BundledFile):
    """A `.vmfb` of the bundle.

    Attributes:
        target: What it was compiled for, as its own manifest says.
    """

    target: Target


@dataclass(frozen=True)
class Bundle:
    """What `bundle.json` says.

    Attributes:
        model_name: Name of the model.
        model_sha256: Hash of the graph and of what all weights hold, hex.
        weights: The file that all modules take their weights from.
        modules: The modules; of several for one target the better one comes first.
        producer: Versions that made it.
    """

    model_name: str
    model_sha256: str
    weights: BundledFile
    modules: tuple[BundledModule, ...]
    producer: Mapping[str, str]

    def to_json(self) -> str:
        """The text of `bundle.json`; checked by reading it back.

        Raises:
            TargetError: It breaks a rule of the format.
        """
        content = {
            "format": FORMAT,
            "producer": dict(self.producer),
            "model": {"name": self.model_name, "sha256": self.model_sha256},
            "weights": asdict(self.weights),
            "modules": [asdict(module) for module in self.modules],
        }
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        _parse(text, INDEX)
        return text

    @property
    def names(self) -> list[str]:
        """All of its files."""
        return [INDEX, self.weights.file, *(module.file for module in self.modules)]


def read_bundle(folder: Path) -> Bundle:
    """Reads and checks the `bundle.json` of a folder, and that its files are there and as large as it says.

    Raises:
        TargetError: Not a bundle, a damaged one, or one of another version.
    """
    index = folder / INDEX
    where = str(index)
    if not index.is_file():
        hint = f"a folder that linattn-compile wrote has a {INDEX}; for a single module give the .vmfb file"
        raise TargetError("not a bundle", where=str(folder), hint=hint)
    try:
        with index.open("rb") as file:
            data = file.read(_MAX_INDEX_BYTES + 1)
        if len(data) > _MAX_INDEX_BYTES:
            raise TargetError("too large", where=where, got=f"more than {_MAX_INDEX_BYTES} bytes")
        bundle = _parse(data.decode(), where)
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError("cannot be read", where=where, got=str(error).splitlines()[0]) from error
    for file in (bundle.weights, *bundle.modules):
        _check_file(folder, file)
    return bundle


def describe_file(path: Path) -> BundledFile:
    """What the index says of a file that has been written.

    Raises:
        TargetError: It has no seal.
    """
    return BundledFile(path.name, path.stat().st_size, read_seal(path).whole.hex())


def _check_file(folder: Path, file: BundledFile) -> None:
    path, hint = folder / file.file, "copy the bundle again, whole"
    try:
        if path.resolve().parent != folder.resolve():
            raise TargetError("a link to outside of the bundle", where=str(path), hint="put the file itself there")
        if not path.is_file():
            raise TargetError("the bundle is damaged", where=str(path), got="no such file", hint=hint)
        found = describe_file(path)
    except (OSError, ValueError, RuntimeError) as error:  # half a character, a loop of links
        raise TargetError("cannot be read", where=str(path), got=str(error).splitlines()[0], hint=hint) from error
    if found.size != file.size:
        got, expected = f"{found.size} bytes", f"{file.size} bytes"
        raise TargetError("the bundle is damaged", where=str(path), got=got, expected=expected, hint=hint)
    if found.sha256 != file.sha256:
        raise TargetError(f"another file than {INDEX} says", where=str(path), hint=hint)


def _parse(text: str, where: str) -> Bundle:
    try:
        raw: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        message = str(error).splitlines()[0] if isinstance(error, ValueError) else "nested too deep"
        raise TargetError("not JSON", where=where, hint=message) from error
    top = Reader(raw, where, "bundle")
    version = top.whole("format", 0)
    if version != FORMAT:
        hint = "use the linattn.runtime version that fits the compiler"
        raise TargetError("unknown bundle format", where=where, got=version, expected=FORMAT, hint=hint)
    model, weights = top.child("model"), top.child("weights")
    rows = top.rows("modules")
    bundle = Bundle(
        model_name=model.text("name"),
        model_sha256=model.text("sha256"),
        weights=BundledFile(*_read_file(weights, where, "weights")),
        modules=tuple(
            BundledModule(*_read_file(row, where, f"modules[{i}]"), read_target(row.child("target"), where))
            for i, row in enumerate(rows)
        ),
        producer={name: str(value) for name, value in top.raw_object("producer").items()},
    )
    if not bundle.modules:
        raise bad(where, "modules", "empty")
    twice = sorted({name for name in bundle.names if bundle.names.count(name) > 1})
    if twice:
        raise bad(where, "file names", "not unique", ", ".join(twice))
    return bundle


def _read_file(row: Reader, where: str, place: str) -> tuple[str, int, str]:
    name, sha256 = row.text("file"), row.text("sha256")
    if not is_plain_name(name):
        raise bad(where, f"{place}.file", "not a plain file name", repr(name))
    if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        raise bad(where, f"{place}.sha256", "not a SHA-256", repr(sha256))
    return name, row.whole("size", 0, _MAX_FILE_BYTES), sha256
