"""How much older than the code each measured table of the pages is: `python docs/ages.py`.

A table is measured if its cells have figures with a unit of time, memory or speed. It stands in a section that says at
which commit, when and on what machine its figures were made; what has changed since in the code is counted here.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = ("frontend", "dialect_patterns", "runtime/*.py", "runtime/generation", "runtime/text")
UNKNOWN = "the commit was not written down"
_FIGURE = re.compile(r"\d (?:us|ms|s|KB|MB|GB)\b|\d/s\b|\d{3} / \d|\d / \d+\.\d|\d,\d{3} \(\d")
_COMMIT = re.compile(r"\b(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{7}\b")
_DAY = re.compile(r"\b\d{4}-\d\d-\d\d\b|\b[A-Z][a-z]+ 20\d\d\b")
_MACHINE = re.compile(r"H100|H200|Xeon|Sapphire Rapids|Zen \d|EPYC|sm_\d+")
_FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


@dataclass(frozen=True)
class Measured:
    """A section with a measured table.

    Attributes:
        page: The file, relative to the repository.
        heading: Of the section.
        text: All of it.
    """

    page: str
    heading: str
    text: str

    @property
    def commits(self) -> list[str]:
        """Those that it names."""
        return list(dict.fromkeys(_COMMIT.findall(self.text)))

    @property
    def lacks(self) -> list[str]:
        """What it should say of its figures and does not."""
        commit = UNKNOWN in self.text or self.commits
        found = {"commit": commit, "day": _DAY.search(self.text), "machine": _MACHINE.search(self.text)}
        return [name for name, there in found.items() if not there]


def measured(page: str, text: str) -> Iterator[Measured]:
    """The sections of a page with measured tables; one below another of its heading's kind has its own figures.

    Args:
        page: The file's name.
        text: What is in it.
    """
    parts = re.split(r"^(#{1,2} .+)$", _FENCE.sub("", text), flags=re.M)
    for heading, body in zip(["", *parts[1::2]], parts[::2], strict=True):
        rows = [line for line in body.splitlines() if line.startswith("|")]
        if any(_FIGURE.search(row) for row in rows):
            yield Measured(page, heading.lstrip("# "), body)


def commits_since(commit: str) -> int | None:
    """How many commits since then changed the code; None where git does not know it."""
    command = ["git", "-C", str(ROOT), "rev-list", "--count", f"{commit}..HEAD", "--", *CODE]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        return None


def is_shallow() -> bool:
    """Whether git has not all of the history."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--is-shallow-repository"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() != "false"


def age(section: Measured) -> str:
    """A line: by how many commits of the code its figures are older than it."""
    where = f"{section.page}: {section.heading}"
    if not section.commits:
        return f"{where}: of an unknown commit"
    counts = ((commit, commits_since(commit)) for commit in section.commits)
    told = (f"{commit} {'unknown to git' if count is None else f'{count} commits'}" for commit, count in counts)
    return f"{where}: {', '.join(told)}"


def main() -> None:
    """Shows the ages of all pages' tables."""
    pages = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("runtime/**/*.md")})
    print("Measured tables, and how many commits have changed the code since:")
    for page in pages:
        for section in measured(page.relative_to(ROOT).as_posix(), page.read_text()):
            print(age(section))


if __name__ == "__main__":
    main()
