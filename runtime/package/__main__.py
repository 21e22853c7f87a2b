"""`python -m linattn compile|run|bench ...`: the three commands where their scripts are not on the path."""

from __future__ import annotations

import importlib
import sys

from linattn.install import install_hint

_COMMANDS = {
    "compile": "linattn.frontend.cli",
    "run": "linattn.runtime.cli",
    "bench": "linattn.runtime.bench.cli",
}


def main() -> int:
    """Runs the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in _COMMANDS:
        wanted = name in ("-h", "--help")
        print("usage: python -m linattn {compile,run,bench} ...", file=sys.stdout if wanted else sys.stderr)
        return 0 if wanted else 2
    try:
        command = importlib.import_module(_COMMANDS[name])
    except ModuleNotFoundError as error:
        hint = install_hint("compile" if error.name == "onnx" else "")
        print(f"linattn-{name}: error: it needs the package {error.name}; {hint}", file=sys.stderr)
        return 2
    return command.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
