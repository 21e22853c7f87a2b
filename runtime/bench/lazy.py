"""Imports of what only the bench needs, with one line that says what to install."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from linattn.install import install_hint
from linattn.runtime.errors import TargetError


def need(module: str, extra: str = "", *, package: str = "") -> Any:
    """Imports a module.

    Args:
        module: Its dotted name.
        extra: The extra of linattn that it belongs to.
        package: The package to install, of what belongs to none.

    Raises:
        TargetError: It is not installed, or it does not import.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        hint = f"{f'pip install {package}' if package else install_hint(extra)} ({_short(error)})"
        raise TargetError("not installed", where=module.partition(".")[0], hint=hint) from error


@contextmanager
def compiler_side() -> Generator[None]:
    """Around imports of `linattn.frontend` and what it needs.

    Raises:
        TargetError: The compiler side is not installed.
    """
    try:
        yield
    except ImportError as error:
        hint = f"{install_hint('compile')} ({_short(error)})"
        raise TargetError("the compiler side is not installed", hint=hint) from error


def _short(error: ImportError) -> str:
    return " ".join(str(error).split())[:120]


@contextmanager
def stderr_to(log: Path) -> Generator[IO[str]]:
    """Sends this process's stderr, that of native libraries too, to a file; yields the old stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 2)
    try:
        with os.fdopen(kept, "w", closefd=False) as old:
            yield old
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
