"""How every command of linattn ends: one line for an error, quietly where nobody reads on, `stopped` after Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import platform
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata

from .errors import LinattnError

ERROR, STOPPED, UNREAD = 2, 130, 141
"""Exit codes: an error that the user can mend; as after SIGINT; as after SIGPIPE."""


def run_command(name: str, body: Callable[[], int], argv: Sequence[str] | None) -> int:
    """Runs what a command does, and turns the exceptions that are no bugs into an exit code.

    Args:
        name: The command, for its messages.
        body: Reads the arguments, does it, and returns the exit code.
        argv: The arguments; None: those of the process. With `--debug` an error shows where it comes from.
    """
    try:
        try:
            return body()
        finally:  # after --help too, which exits
            sys.stdout.flush()
    except KeyboardInterrupt:
        return _say(f"{name}: stopped", STOPPED)
    except (LinattnError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return _say("", UNREAD)
        if "--debug" in (sys.argv if argv is None else argv):
            traceback.print_exc()
        return _say(f"{name}: error: {' '.join(_text(error).split())}", ERROR)


def _text(error: LinattnError | OSError) -> str:
    """What is said of an error; of one of the system's the file comes first, without its number."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    return str(error)


def version_line(*packages: str) -> str:
    """What `--version` prints: linattn's version and those of the packages that the command rests on, if there."""
    found: list[str] = []
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package)}")
    return f"linattn {metadata.version('linattn')} ({', '.join(found)}, Python {platform.python_version()})"


def _nobody_reads() -> bool:
    """Whether it is our own output that nobody reads, and not another pipe that broke."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        poll.register(stream, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _say(text: str, code: int) -> int:
    """Prints a last line if there is one; what nobody reads goes nowhere, at the interpreter's end too."""
    with open(os.devnull, "w") as nowhere:
        for stream in (sys.stdout, sys.stderr):
            try:
                if text and stream is sys.stderr:
                    print(text, file=stream)
                stream.flush()
            except BrokenPipeError:
                os.dup2(nowhere.fileno(), stream.fileno())
    return code
