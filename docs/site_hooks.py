"""What mkdocs does besides: pages from beside the code, links into the repository, what commands say of themselves.

Pages are written for a reader of the repository: their links go from file to file. Here those to other pages become
links of the site, and those to source files, which the site does not have, become plain text.
"""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
BESIDE = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "runtime/README.md": "reference/module.md",
    "runtime/bench/README.md": "reference/bench.md",
    "runtime/bench/tokens.svg": "tokens.svg",
    "samples/README.md": "samples.md",
    "samples/without_linattn_c/README.md": "samples-c.md",
}
"""File of the repository -> its place in the site."""

_FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\\.)*)\]\(([^()\s]+)\)")
_HELP = re.compile(r"^<!-- help: (linattn-[a-z ]+) -->$", re.M)


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that lie beside the code."""
    for source, place in BESIDE.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts in what commands say, and turns the links, but not in code."""
    place = page.file.src_uri
    source = next((s for s, p in BESIDE.items() if p == place), f"docs/{place}")
    if place == "index.md":
        page.meta["hide"] = ["navigation", "toc"]
    pieces, end = [], 0
    for fence in _FENCE.finditer(markdown):
        pieces += [_turn(markdown[end : fence.start()], source, place), fence.group()]
        end = fence.end()
    return _HELP.sub(_help, "".join([*pieces, _turn(markdown[end:], source, place)]))


def on_page_content(html: str, **_: Any) -> str:
    """Names that docstrings refer to as Sphinx does, without the role and the path."""
    return re.sub(r":(?:class|func|mod|meth|data):<code>~?(?:[\w.]+\.)?(\w+)</code>", r"<code>\1</code>", html)


def _turn(text: str, source: str, place: str) -> str:
    def turn(match: re.Match[str]) -> str:
        picture, label, link = match.groups()
        target, hash_, anchor = link.partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match.group()
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if file == "docs":
            file = "docs/index.md"
        if file in BESIDE or file.startswith("docs/"):
            goal = posixpath.relpath(BESIDE.get(file, file.removeprefix("docs/")), posixpath.dirname(place))
            return f"{picture}[{label}]({goal}{hash_}{anchor})"
        if not (ROOT / file).exists():
            return match.group()  # broken: mkdocs says so
        return label if "`" in label else f"`{label}`"

    # GitHub wants `a\|b` in tables, Python-Markdown `a|b`.
    text = re.sub(r"`[^`\n]+`", lambda code: code.group().replace(r"\|", "|"), text)
    return _LINK.sub(turn, text)


def _help(match: re.Match[str]) -> str:
    """What a command says with --help, as a block of text."""
    name, *rest = match[1].split()
    command = [str(Path(sys.executable).parent / name), *rest, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "100"})
    return f"```text\n$ {match[1]} --help\n{done.stdout.rstrip()}\n```"
