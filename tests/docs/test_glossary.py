"""One word for each thing: those that the glossary gives up stand nowhere, those that it has are used."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields

from linattn.frontend import CompileOptions
from linattn.frontend import cli as compile_cli
from linattn.frontend.options import _flag
from linattn.runtime import Program
from linattn.runtime import cli as run_cli
from linattn.runtime.bench import cli as bench_cli
from pages import PAGES, ROOT

GLOSSARY = "docs/glossary.md"
FOREIGN = {"frontend/lower/onnx_backend.py"}  # ONNX's word for its interface
CODE = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("frontend", "dialect_patterns", "runtime", "samples")
    for path in (ROOT / folder).rglob("*.py")
)


def rows() -> Iterator[tuple[list[str], list[str]]]:
    """The words of each row, and those that are not used for it."""
    for line in (ROOT / GLOSSARY).read_text().splitlines():
        if line.startswith("| **"):
            first, _, last = (cell.strip() for cell in line.strip("|").split(" | "))
            yield re.findall(r"\*\*(.+?)\*\*", first), [word for word in last.split(", ") if word]


def uses(text: str, words: list[str]) -> list[str]:
    """The lines of a text with one of the words, which is no part of a name."""
    pattern = re.compile(rf"(?<![-\w.])(?:{'|'.join(map(re.escape, words))})(?![-\w])")
    return [line.strip() for line in text.splitlines() if pattern.search(line)]


def test_words_given_up_are_not_used() -> None:
    given_up = [word for _, words in rows() for word in words]
    assert len(given_up) >= 8
    found = {
        name: lines
        for name in {*PAGES, *CODE} - {GLOSSARY} - FOREIGN
        if (lines := uses((ROOT / name).read_text(), given_up))
    }
    assert not found


def test_words_are_used() -> None:
    """In the pages or what the commands and classes are called, besides the glossary."""
    text = "\n".join((ROOT / name).read_text().lower() for name in {*PAGES, *CODE} - {GLOSSARY})
    assert not [word for words, _ in rows() for word in words if not re.search(rf"\b{word}s?\b", text)]


def test_a_word_is_found() -> None:
    assert uses("the backend runs\nx.backend\nbackends\na backend.", ["backend"]) == ["the backend runs", "a backend."]


def options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Those of a command and of its parts."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for part in action.choices.values():
                yield from options(part)
        elif action.option_strings:
            yield action


def test_options_are_called_as_their_arguments_in_python() -> None:
    known = [
        {name for each in options(cli.make_parser()) for name in each.option_strings} for cli in (compile_cli, run_cli)
    ]
    assert {_flag(each.name) for each in fields(CompileOptions)} <= known[0]
    arguments = set(inspect.signature(Program.load).parameters) - {"source"}
    assert {f"--{name.replace('_', '-')}" for name in arguments} <= known[1]


def test_a_kind_of_file_has_one_option_in_all_commands() -> None:
    """`--params` wrote what `--parameters` read."""
    names: dict[str, set[str]] = {}
    for cli in (compile_cli, run_cli, bench_cli):
        for each in options(cli.make_parser()):
            if re.fullmatch(r"FILE\.\w+", str(each.metavar)) and "--output" not in each.option_strings:
                names.setdefault(str(each.metavar), set()).update(each.option_strings)
    assert {"FILE.irpa", "FILE.json", "FILE.png"} <= set(names)
    assert {kind: found for kind, found in names.items() if len(found) > 1} == {}
