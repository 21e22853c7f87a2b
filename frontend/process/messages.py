"""What the compiler's process and the one that started it say to each other: a length and a pickle each."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO


@dataclass(frozen=True)
class Request:
    """What to do.

    Attributes:
        function: ``module:name``.
        arguments: By name; a :class:`ProgressSpec` becomes a `Progress` whose text the caller shows.
        folder: The caller's working directory.
        environment: The caller's environment variables.
        umask: The caller's mask of file modes.
    """

    function: str
    arguments: Mapping[str, Any]
    folder: str
    environment: Mapping[str, str]
    umask: int


@dataclass(frozen=True)
class ProgressSpec:
    """A `Progress` to be had here: how many stages there are, and how many are done."""

    total: int
    done: int


@dataclass(frozen=True)
class Text:
    """Something to show, by the caller's progress or on its standard error."""

    text: str
    is_progress: bool


@dataclass(frozen=True)
class Reply:
    """The end of a request.

    Attributes:
        value: What the function returned.
        error: What it raised instead.
        trace: Where, as text.
        leaving: The process ends after this.
    """

    value: Any = None
    error: BaseException | None = None
    trace: str = ""
    leaving: bool = False


def send(stream: BinaryIO, message: object) -> None:
    """Write a message."""
    data = pickle.dumps(message, protocol=5)
    stream.write(len(data).to_bytes(8, "big"))
    stream.write(data)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """Read a message.

    Raises:
        EOFError: the other side is gone.
    """
    head = stream.read(8)
    data = stream.read(int.from_bytes(head, "big")) if len(head) == 8 else b""
    if len(head) < 8 or len(data) < int.from_bytes(head, "big"):
        raise EOFError
    return pickle.loads(data)
