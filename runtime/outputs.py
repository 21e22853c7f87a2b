"""Files that a command writes: refused before work starts where they would destroy something, whole or not there."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError, LinattnError

_OTHER_NAME = "choose another name"
_being_written: set[Path] = set()


def check_outputs(outputs: Mapping[str, str | Path | None], inputs: Iterable[str | Path] = ()) -> None:
    """Finds out before the work what would fail after it, or destroy what the work needs.

    Args:
        outputs: Option -> the file that it names; None: it was left out.
        inputs: Files that are read.

    Raises:
        InputError: There is no such folder, one may not write into it, something that is not a plain file has the
            name, or it is that of an input or of another output, through links too.
    """
    known = [(Path(path), "an input") for path in inputs]
    for option, path in outputs.items():
        if path is None:
            continue
        real = _real(path)
        _check_place(path, real)
        for other, what in known:
            if _is_same(real, other):
                message = f"{option} would overwrite {what}"
                raise InputError(message, where=str(path), got=str(other), hint=_OTHER_NAME)
        known.append((real, f"what {option} writes"))


@contextmanager
def new_file(path: str | Path) -> Generator[Path]:
    """Inside: a file to write, of a name of its own, which becomes the named one in the end and is gone after an error.

    A link of that name stays one: what it leads to is replaced.

    Raises:
        LinattnError: It cannot be written: the disk is full, say.
    """
    real = _real(path)
    partial = _partial(real)
    try:
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            yield partial
            os.replace(partial, real)
        finally:
            _remove(partial)
    except OSError as error:
        raise LinattnError("cannot be written", where=str(path), got=error.strerror or str(error)) from error


@contextmanager
def partial_folder(path: Path) -> Generator[Path]:
    """Inside: a new folder beside the named one, of a name of its own, to be renamed; gone after an error."""
    partial = _partial(path)
    try:
        partial.mkdir()
        yield partial
    finally:
        _remove(partial)


def remove_partial(folder: Path, process: int) -> None:
    """Removes from a folder what a process that is no more was writing."""
    for partial in folder.glob(f".linattn-{process}-*.partial*"):
        _remove(partial)


def remove_all_partial() -> None:
    """Removes what this process is writing, before it ends in the middle of that."""
    for partial in list(_being_written):
        _remove(partial)


def _partial(real: Path) -> Path:
    partial = real.with_name(f".linattn-{os.getpid()}-{secrets.token_hex(6)}.partial{real.suffix[:16]}")
    _being_written.add(partial)
    return partial


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)
    _being_written.discard(partial)


def _real(path: str | Path) -> Path:
    try:
        return Path(path).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, a loop of links
        raise InputError("not a name for a file", where=repr(str(path)), got=error, hint=_OTHER_NAME) from error


def _check_place(path: str | Path, real: Path) -> None:
    try:
        if not real.parent.is_dir():
            raise InputError("no such folder", where=str(path), hint="create it first")
        if real.is_dir():
            raise InputError("a folder, not a file to write", where=str(path), hint=_OTHER_NAME)
        if real.exists() and not real.is_file():
            raise InputError("not a plain file that may be replaced", where=str(path), hint=_OTHER_NAME)
    except OSError as error:  # a name that is too long
        raise InputError("not a name for a file", where=str(path), got=error.strerror, hint=_OTHER_NAME) from error
    if not os.access(real.parent, os.W_OK):
        raise InputError("its folder may not be written to", where=str(path), hint="choose another folder")


def _is_same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them is not there yet
        return one == other.resolve()
