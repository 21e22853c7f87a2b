"""What a shell completes after <Tab>: `eval "$(linattn-run --print-completion bash)"`, by the package shtab."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Any, cast

from linattn.install import install_hint

SHELLS = ("bash", "zsh", "tcsh")
_FILES = "FILE", "DIR", "MODEL", "OUT", "RESULT"
"""Words in the metavar of an option that takes a file or a folder."""


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Adds `--print-completion SHELL`."""
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=SHELLS,
        help="print a script for the shell, which completes options and files after <Tab>; needs the package shtab",
    )


class _PrintCompletion(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        del namespace, option_string
        try:
            shtab = cast(Any, importlib.import_module("shtab"))
        except ImportError:
            parser.error(f"completion needs the package shtab; {install_hint('completion')}")
        _complete_files(parser, shtab.FILE)
        print(shtab.complete(parser, values))
        parser.exit()


def _complete_files(parser: argparse.ArgumentParser, files: object) -> None:
    for action in cast(list[Any], parser._actions):  # pyright: ignore[reportPrivateUsage]
        if isinstance(action, argparse._SubParsersAction):  # pyright: ignore[reportPrivateUsage]
            commands = cast(Any, action)
            for command in commands.choices.values():
                _complete_files(command, files)
        elif any(word in str(action.metavar) for word in _FILES):
            action.complete = files
