"""The three commands: their scripts, and `python -m linattn compile|run|bench ...` where those are not on the path.

What a command rests on takes half a second to load, and Ctrl-C may come in it. Extension modules make ImportErrors of
it then, so it waits until they are there.
"""

from __future__ import annotations

import importlib
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_COMMANDS = {
    "compile": "linattn.frontend.cli",
    "run": "linattn.runtime.cli",
    "bench": "linattn.runtime.bench.cli",
}
_STOPPED = 130


def main() -> int:
    """Runs the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in _COMMANDS:
        wanted = name in ("-h", "--help")
        print("usage: python -m linattn {compile,run,bench} ...", file=sys.stdout if wanted else sys.stderr)
        return 0 if wanted else 2
    return _run(name, sys.argv[2:])


def compile_command() -> int:
    """The script `linattn-compile`."""
    return _run("compile")


def run_command() -> int:
    """The script `linattn-run`."""
    return _run("run")


def bench_command() -> int:
    """The script `linattn-bench`."""
    return _run("bench")


def _run(name: str, arguments: Sequence[str] | None = None) -> int:
    try:
        try:
            command = _load(_COMMANDS[name])
        except ModuleNotFoundError as error:
            from linattn.install import install_hint

            hint = install_hint("compile" if error.name == "onnx" else "")
            print(f"linattn-{name}: error: it needs the package {error.name}; {hint}", file=sys.stderr)
            return 2
        return command.main(arguments)
    except KeyboardInterrupt:  # while it was loaded; later ones the command answers itself
        print(f"linattn-{name}: stopped", file=sys.stderr)
        return _STOPPED


def _load(module: str) -> Any:
    """Imports a module; Ctrl-C in the meantime counts when it is there."""
    pressed: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, as in the background of a shell
        return importlib.import_module(module)
    signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        found = importlib.import_module(module)
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
    return found


if __name__ == "__main__":
    sys.exit(main())
