"""The pages that people read, and the blocks of code in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = tuple(
    sorted(
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.md", "docs/**/*.md", "runtime/**/*.md", "samples/**/*.md")
        for path in ROOT.glob(pattern)
    )
)
COMMANDS = ("linattn-compile", "linattn-run", "linattn-bench")
_FENCE = re.compile(r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        page: The file, relative to the repository.
        line: Of its first line of code, from 1 on.
        language: What the fence says: ``python``, ``sh`` or, for all that is only shown, anything else.
        code: What is between the fences.
        not_run: Why it cannot run in a test, from the comment before it; "" where it can.
        section: The heading above it, without its marks; "" above the first.
    """

    page: str
    line: int
    language: str
    code: str
    not_run: str
    section: str = ""


def blocks(page: str) -> list[Block]:
    """The blocks of a page, the first one first."""
    text = (ROOT / page).read_text()
    found: list[Block] = []
    section, end = "", 0
    for match in _FENCE.finditer(text):
        section = [section, *re.findall(r"^#+ (.+)$", text[end : match.start()], re.M)][-1]
        line, end = text.count("\n", 0, match.start("code")) + 1, match.end()
        found.append(Block(page, line, match["language"], match["code"], match["why"] or "", section))
    return found


def commands(block: Block) -> Iterator[list[str]]:
    """The lines of a shell block that call one of our commands, as words without redirections."""
    for line in block.code.replace("\\\n", " ").splitlines():
        if not any(name in line for name in COMMANDS):
            continue
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*|time|timeout|\d+", words[0]):
            words.pop(0)
        if words and Path(words[0]).name in COMMANDS:
            end = next((i for i, word in enumerate(words) if re.match(r"[|<>&;]|2>", word)), len(words))
            yield [Path(words[0]).name, *words[1:end]]


def links(page: str) -> list[str]:
    """Where the links and pictures of a page lead, without those in code."""
    text = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", (ROOT / page).read_text()))
    return re.findall(r"\]\(([^()\s]+)\)", text)


def anchors(page: str) -> set[str]:
    """The names of a page's headings in links."""
    text = _FENCE.sub("", (ROOT / page).read_text())
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in re.findall(r"^#+ (.+)$", text, re.M))
    return {word.strip().replace(" ", "-") for word in words}
