"""Every Python block of every page runs, in the order of the page; every command line of ours is one that we take."""

from __future__ import annotations

import argparse
import contextlib
import shutil
from pathlib import Path
from typing import NoReturn

import pytest
from linattn.frontend import cli as compile_cli
from linattn.runtime import cli as run_cli
from linattn.runtime.bench import cli as bench_cli
from pages import PAGES, ROOT, Block, blocks, commands

PARSERS = {
    "linattn-compile": compile_cli.make_parser,
    "linattn-run": run_cli.make_parser,
    "linattn-bench": bench_cli.make_parser,
}
LANGUAGES = {"python", "sh", "text", "json", "mlir", "toml", "c"}
SHELL = [block for page in PAGES for block in blocks(page) if block.language == "sh"]


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language == "python" for b in blocks(page))])
def test_python_blocks_run(page: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of their own with model.onnx, its tokenizer and model.vmfb; names go on from block to block."""
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page}
    for block in blocks(page):
        if block.language == "python" and not block.not_run:
            code = "\n" * (block.line - 1) + block.code  # so that a traceback names the page's own lines
            exec(compile(code, str(ROOT / page), "exec"), names)


class RefusedError(Exception):
    """What a parser would have ended the process for."""


@pytest.fixture(autouse=True)
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
        raise RefusedError(f"{parser.prog}: {message}")

    monkeypatch.setattr(argparse.ArgumentParser, "error", refuse)


def parse(words: list[str]) -> None:
    """Lets the command of these words read its arguments, and do nothing; --version and such end it."""
    with contextlib.suppress(SystemExit):
        PARSERS[words[0]]().parse_args(words[1:])


@pytest.mark.parametrize("block", SHELL, ids=lambda block: f"{block.page}:{block.line}")
def test_command_lines_are_ours(block: Block) -> None:
    for words in commands(block):
        parse(words)


def test_every_block_says_what_it_is() -> None:
    """Blocks of any other name would be checked by nobody."""
    unknown = [
        f"{b.page}:{b.line} {b.language!r}" for page in PAGES for b in blocks(page) if b.language not in LANGUAGES
    ]
    assert not unknown


def test_a_stale_command_line_is_found() -> None:
    code = "A=1 env/bin/linattn-run m.vmfb --generte 3 | head\nlinattn-compile m.onnx \\\n  --quiet >out  # why\nls\n"
    stale, right = commands(Block("x.md", 1, "sh", code, ""))
    assert stale == ["linattn-run", "m.vmfb", "--generte", "3"]
    assert right == ["linattn-compile", "m.onnx", "--quiet"]
    parse(right)
    with pytest.raises(RefusedError, match="--generte"):
        parse(stale)
